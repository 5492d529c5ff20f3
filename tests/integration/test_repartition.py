"""Optimizer states that go on with another number of ranks, or another ZeRO stage: exact, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training_tiny import run_ranks

# "TYPE [OPTIONS] RANKSxSTAGE ...": each number of ranks goes on with what the one before has saved
CHAINS = [
    f"{kind} 2x{stage} 1x{stage} 3x{stage}" for kind, stages in (("fp32", "0123"), ("bf16", "02")) for stage in stages
]
CHAINS += ["fp32 2x0 1x2 3x3", "bf16 2x3 1x0 3x1", "fp32 2x1 1x3 3x0"]  # other stages
CHAINS += ["fp32 8bit 2x1 1x1 3x1", "fp32 8bit 2x3 1x3 3x3", "bf16 8bit 2x2 1x3 3x0"]
CHAINS += ["fp32 offload 2x2 1x2 3x2", "fp32 robin 2x2 1x2 3x2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    worker = Path(__file__).with_name("repartition_worker.py")
    return run_ranks(worker, tmp_path_factory.mktemp("repartition"), *CHAINS, ranks=3, groups=3)


@pytest.mark.parametrize("chain", CHAINS)
def test_every_value_is_where_it_was(results, chain):
    for rank in results:
        for found in rank[chain]:
            assert found.get("differ", []) == [] and found.get("boundary", True)


@pytest.mark.parametrize("chain", [c for c in CHAINS if "0 " not in c])
def test_partitions_are_cut_up_anew(results, chain):
    for rank in results:
        assert all(found["cut up anew"] for found in rank[chain] if "differ" in found)


@pytest.mark.parametrize("chain", [c for c in CHAINS if "robin" not in c])
def test_training_goes_on_alike_in_every_stage(results, chain):
    precise = "fp32" in chain and "8bit" not in chain
    for found, plain in zip(results[0][chain], results[0]["fp32 2x0 1x0 3x0"], strict=True):
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5 if precise else 2e-2)


def test_states_that_every_rank_has_whole_are_read_once(results):
    for rank in results:
        assert {found["read"] for found in rank["fp32 2x0 1x0 3x0"] if "read" in found} == {1}

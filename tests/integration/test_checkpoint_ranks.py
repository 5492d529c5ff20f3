"""Checkpoints of real DeepSpeed runs on two ranks in the ZeRO stages, of tensor parallelism, and SAT's own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgm.util import instantiate_from_config
from tests.training_tiny import network_section, run_ranks

CASES = ["0 full", "2 lora", "3 full", "3 lora"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(3)
    whole = instantiate_from_config(network_section(4), dtype="fp32").state_dict()
    for name, value in whole.items():
        if "matrix_B" in name:
            whole[name] = torch.randn_like(value)
    torch.save(whole, folder / "whole.pt")
    return run_ranks(Path(__file__).with_name("checkpoint_worker.py"), folder, ranks=2, groups=2)


@pytest.fixture(scope="module")
def zero(found):
    return [rank["zero"] for rank in found]


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_bit_for_bit_after_loading(zero, case):
    for rank in zero:
        found = rank[case]
        assert found["restored"] and found["losses"] and found["end"]


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_are_the_models_which_stays_as_it_was(zero, case):
    for rank in zero:
        found = rank[case]
        assert found["untouched"] and found["weights"] and found["averaged differ"] and found["tidy"]


@pytest.mark.parametrize("case", [c for c in CASES if "lora" in c])
def test_adapter_files_are_small_and_say_what_they_are(zero, case):
    for rank in zero:
        found = rank[case]
        assert found["adapter file"] and found["small"]
        assert found["facts"] == [4, 1.0, "attention", 4, ["attention"]]
        assert found["merged equals adapted"] and found["merged differs from base"]


def test_one_full_disk_fails_the_save_on_every_rank_and_harms_nothing(zero):
    for rank in zero:
        found = rank["failing"]
        assert found["intact"] and found["next"] == 3
        assert [text.split(":")[0] for text in found["told"]] == ["rank 0", "rank 1"]
        assert all("the disk is full" in text for text in found["told"])


def test_rank_0_decides_what_is_resumed_for_all(zero):
    for rank in zero:
        assert rank["searching"]["found"] == "1"
        assert "args.seed: 1 -> 2" in rank["searching"]["refused"]


def test_tensor_parallel_parts_are_saved_each_and_come_together_again(found):
    for rank in found:
        weights = ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
        assert rank["parts"]["files"] == ["lora.safetensors", *weights, "resume", "run.json"]
        assert rank["parts"]["own part"] and rank["parts"]["whole again"]
        assert rank["parts"]["adapter"] and rank["parts"]["adapter parts"] and rank["parts"]["merged"]
        assert rank["parts"]["model_config"] == 2 and rank["parts"]["loads"]


def test_sats_own_loader_reads_every_kind_of_checkpoint(found):
    assert found[0]["sat"] == {
        "inference": [7, True],
        "finetune": [0, True],
        "pretrain": [7, True],
        "adapter": [7, True],
        "merged": [7, True],
        "averaged": [7, True],
        "library": [7, True],
    }

"""Checkpoints of real DeepSpeed runs on two ranks in the ZeRO stages, of tensor parallelism, and SAT's own loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("checkpoint_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
CASES = ["0 full", "2 lora", "3 full", "3 lora"]


def results_of(mode: str, folder: Path) -> list[dict]:
    """What each rank found."""
    from tests.training_tiny import environment

    start = [sys.executable, str(WORKER)] if mode == "sat" else LAUNCH
    done = subprocess.run([*start, mode, str(folder)], env=environment(), capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return results_of("zero", tmp_path_factory.mktemp("zero"))


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


def test_tensor_parallel_parts_are_saved_each_and_come_together_again(tmp_path):
    import torch

    from sgm.util import instantiate_from_config
    from tests.training_tiny import network_section

    torch.manual_seed(3)
    whole = instantiate_from_config(network_section(4), dtype="fp32").state_dict()
    for name, value in whole.items():
        if "matrix_B" in name:
            whole[name] = torch.randn_like(value)
    torch.save(whole, tmp_path / "whole.pt")
    for found in results_of("parts", tmp_path):
        weights = ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
        assert found["files"] == ["lora.safetensors", *weights, "resume", "run.json"]
        assert found["own part"] and found["whole again"]
        assert found["adapter"] and found["adapter parts"] and found["merged"]
        assert found["model_config"] == 2 and found["loads"]


def test_sats_own_loader_reads_every_kind_of_checkpoint(tmp_path):
    [found] = results_of("sat", tmp_path)
    assert found == {
        "inference": [7, True],
        "finetune": [0, True],
        "pretrain": [7, True],
        "adapter": [7, True],
        "merged": [7, True],
        "averaged": [7, True],
        "library": [7, True],
    }

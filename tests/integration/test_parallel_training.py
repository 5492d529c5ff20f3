"""Several processes that train on one clip, over real gloo ranks: the gradients, checkpoints and messages of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_video
from tests.integration.parallel_training_worker import RUNS
from tests.training_tiny import (
    command,
    configuration,
    environment,
    network_section,
    run_ranks,
    write_clips,
    write_release,
    write_yaml,
)

RATE = 100.0  # of the runs that take one step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configurations of a network of ten heads; 12 + 4 tokens a clip. Neither divides by three; by eight, tokens do."""
    made = tmp_path_factory.mktemp("parallel_training")
    sizes = {"hidden_size": 160, "num_attention_heads": 10}
    plain = network_section()
    release = write_release(made, {**plain, "params": plain["params"] | sizes})
    clips = write_clips(made / "clips", 4)
    known = {"prior_data": [str(write_clips(made / "known", 2))], "train_data_weights": [1, 3]}
    for name, lora, more in (("full", None, {}), ("lora", 4, {}), ("prior", None, known)):
        switches = {"cache_dir": str(made / "cache"), "valid_data": [str(clips)], "tensorboard": False, **more}
        config = configuration(release, clips, None, lora=lora, **switches)
        config["model"]["network_config"]["params"] |= sizes
        config["model"]["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 0.5
        write_yaml(made / f"{name}.yaml", config)
    return made


@pytest.fixture(scope="module")
def runs(folder):
    """The folder of each run, by name."""
    worker = Path(__file__).with_name("parallel_training_worker.py")
    codes = run_ranks(worker, folder, ranks=8, groups=len(RUNS))
    assert all(code == 0 for found in codes for code in found.values()), codes
    return {name: next((folder / name).glob("tiny-*")) for _, name, *_ in RUNS}


def weights(run: Path, part: str) -> dict[str, Tensor]:
    return torch.load(run / part / "mp_rank_00_model_states.pt", weights_only=True)["module"]


def told(run: Path, key: str, kind: str = "train") -> list[Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if line["kind"] == kind]


ALONE = {
    "lora by 2": "lora",
    "full by 2": "full",
    "full by 3": "full",
    "full by 8": "full",
    "prior of 2 by 4": "prior of 2",
    "lora of 8, ZeRO 2": "lora of 8",
}


@pytest.mark.parametrize("shared", ALONE)
def test_a_step_on_a_shared_clip_is_that_of_one_process(runs, shared):
    found, wanted = (weights(runs[name], "1") for name in (shared, ALONE[shared]))
    learnt = [name for name in wanted if "lora" not in shared or "matrix_B" in name]
    start = weights(runs["lora"].parents[1] / "transformer", "1000")
    steps = {name: (wanted[name] - start[name]) / RATE if name in start else wanted[name] / RATE for name in learnt}
    largest = max(float(step.abs().max()) for step in steps.values())
    assert max(float((found[n] - wanted[n]).abs().max()) for n in learnt) / RATE <= 1e-6 * largest
    for key in ("loss", "grad_norm"):
        assert told(runs[shared], key) == pytest.approx(told(runs[ALONE[shared]], key), rel=1e-6)
    assert told(runs[shared], "samples") == told(runs[ALONE[shared]], "samples")


def test_shares_of_a_clip_go_with_parts_of_a_weight(runs):
    for key in ("loss", "grad_norm"):
        found, wanted = (told(runs[name], key) for name in ("prior of 2 by 2, split in 2", "prior of 2"))
        assert found == pytest.approx(wanted, rel=1e-6)


def test_validation_is_that_of_one_process(runs):
    assert told(runs["full by 3"], "loss", "valid") == pytest.approx(told(runs["full"], "loss", "valid"), rel=1e-5)
    found, wanted = (next(runs[name].rglob("latent.pt")) for name in ("full by 3", "full"))
    found, wanted = (torch.load(file, weights_only=True) for file in (found, wanted))
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_run_goes_on_with_other_numbers_of_processes_a_clip(runs):
    assert told(runs["resumed"], "loss") == pytest.approx(told(runs["unbroken"], "loss"), rel=1e-5)
    assert told(runs["resumed"], "samples") == [1, 2, 3, 4, 5]
    for part in ("5", "5-ema"):
        found, wanted = weights(runs["resumed"], part), weights(runs["unbroken"], part)
        assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-5


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc for the ranks' process ids")
def test_a_process_that_dies_ends_those_that_wait_for_it(runs, folder):
    shares = ("--set", "args.sequence_parallel_size=2", "--set", "args.train_iters=100000")
    line = command(folder / "lora.yaml", *shares, ranks=2, port=29533)
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while " 2/100000" not in (said := job.stdout.readline()):
            assert said, "it ended before the second step"
        os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1]), signal.SIGKILL)
        _, err = job.communicate(timeout=60)
    assert job.returncode == 137 and err.count("was ended by SIGKILL") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (["args.sequence_parallel_size=2"], "asks for 2 processes a clip, and this run has 1: start a multiple, as in NPROC=2"),
        (["args.cfg_parallel=true"], "which training has not"),
        (["args.sequence_parallel_size=2", "args.distill={prompts: [x.txt]}"], "args.distill does not go with args.seq"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_said(folder, capsys, wish, said):
    words = [word for value in wish for word in ("--set", value)]
    assert train_video.main([str(folder / "full.yaml"), "--dry-run", *words]) == 2
    assert said in capsys.readouterr().err

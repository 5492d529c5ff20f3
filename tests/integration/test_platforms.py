"""What a Mac has and lacks: no Triton, and a GPU that is not used. Sampling and training work with PyTorch's operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgm.data.video_io import probe
from tests.conftest import REPO

# An entry of None in sys.modules is a package that is not there.
HIDDEN = """
import contextlib, io, json, sys

sys.modules["triton"] = None
import sample_video, train_video

found = []
for entry, words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = {"sample": sample_video, "train": train_video}[entry].main(words)
    found.append([code, out.getvalue(), err.getvalue()])
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def ends(folder: Path) -> list[list]:
    """Exit code, output and errors of three commands, all in one process: it is slow to start."""
    short = ["configs/demo_infer.yaml", "--prompt", "a small red star moves to the left", "--num-frames", "1"]
    short += ["--steps", "2", "--output-dir", str(folder)]
    commands = [
        ("sample", [*short, "--set", "accelerate.kernels=triton"]),
        ("sample", short),
        ("train", ["configs/demo_lora.yaml", "--dry-run"]),
    ]
    line = [sys.executable, "-c", HIDDEN, json.dumps(commands)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND ")[2])


def test_fused_kernels_are_refused_by_name(ends):
    code, _, said = ends[0]
    assert code == 2 and "Traceback" not in said and "triton" in said.lower()


def test_sampling(ends, folder):
    code, _, said = ends[1]
    assert code == 0, said
    (video,) = folder.rglob("*.mp4")
    assert probe(video).frames == 1


def test_training_is_planned(ends):
    code, shown, said = ends[2]
    assert code == 0 and "1300 iterations" in shown, said


def test_deepspeed_leaves_a_mac_s_gpu_alone():
    """DeepSpeed asks PyTorch for that GPU's memory to find out whether there is one."""
    mac = (
        "import sys, torch; torch.mps.current_allocated_memory = torch.mps.recommended_max_memory = lambda: 0\n"
        "here, sys.platform = sys.platform, 'darwin'; import sgm; sys.platform = here\n"
        "from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"
    )
    known = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"CUDA_VISIBLE_DEVICES": ""}
    found = [
        subprocess.run([sys.executable, "-c", code], cwd=REPO, env=known, capture_output=True, text=True, timeout=300)
        for code in (mac, mac.replace("import sgm", "pass"))
    ]
    assert [done.stdout.split()[-1] for done in found] == ["cpu", "mps"], found

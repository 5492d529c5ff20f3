"""What a Mac has and lacks: no Triton, and a GPU that is not used. Sampling and training work with PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgm.data.video_io import probe
from tests.conftest import REPO

# An entry of None in sys.modules is a package that is not there.
HIDDEN = "import sys; sys.modules['triton'] = None; import {entry}; sys.exit({entry}.main(sys.argv[1:]))"


def run(entry: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", HIDDEN.format(entry=entry), *words]
    return subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)


@pytest.fixture
def short(tmp_path: Path) -> tuple[str, ...]:
    return (
        "--prompt",
        "a small red star moves to the left",
        "--num-frames",
        "1",
        "--steps",
        "2",
        "--output-dir",
        str(tmp_path),
    )


def test_sampling(short, tmp_path):
    done = run("sample_video", "configs/demo_infer.yaml", *short)
    assert done.returncode == 0, done.stderr
    (video,) = tmp_path.rglob("*.mp4")
    assert probe(video).frames == 1


def test_fused_kernels_are_refused_by_name(short):
    done = run("sample_video", "configs/demo_infer.yaml", *short, "--set", "accelerate.kernels=triton")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "triton" in done.stderr.lower()


def test_training_is_planned():
    done = run("train_video", "configs/demo_lora.yaml", "--dry-run")
    assert done.returncode == 0 and "1300 iterations" in done.stdout, done.stderr


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

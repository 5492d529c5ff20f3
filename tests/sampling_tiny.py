"""A tiny model in the release's layout and a sampling configuration for it; `sample_video.main` in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sample_video
from tests.training_tiny import HEIGHT, REPO, WIDTH, model_section, write_release, write_yaml

__all__ = ["HEIGHT", "REPO", "WIDTH", "configuration", "environment", "main", "model_section", "start",
           "write_release", "write_yaml"]  # fmt: skip


def configuration(release: Path, **args: Any) -> dict[str, Any]:
    """A sampling configuration of two steps and one latent frame in float32; `args` go into its `args:` section."""
    model = model_section(release)
    model["sampler_config"]["params"]["num_steps"] = 2
    return {
        "args": {
            "mode": "inference", "load": str(release / "transformer"), "batch_size": 1, "input_type": "txt",
            "input_file": "prompts.txt", "sampling_num_frames": 1, "sampling_fps": 8, "force_inference": True,
            "device": "cpu", **args,
        },
        "model": model,
    }  # fmt: skip


def main(*arguments: Any) -> int:
    """The command in this process; returns its exit status."""
    return sample_video.main([str(a) for a in arguments])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(
    *arguments: Any, ranks: int = 1, script: Path = REPO / "sample_video.py", **options: Any
) -> subprocess.Popen[str]:
    """The command, or a `script` around it, as a process of its own, or several as inference.sh starts them."""
    launcher = [str(REPO / "sgm" / "launch.py"), "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Of each sample by its folder."""
    return {str(p.parent.relative_to(out)): json.loads(p.read_text()) for p in sorted(out.rglob("*.json"))}


def network_file(release: Path) -> Path:
    """The transformer's."""
    return release / "transformer" / "1000" / "mp_rank_00_model_states.pt"


def changed(release: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of the transformer's file with `change` applied to its content."""
    content = torch.load(network_file(release), weights_only=True)
    content = change(content) or content
    torch.save(content, target)
    return target

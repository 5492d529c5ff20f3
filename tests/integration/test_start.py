"""What a command loads before it does anything: the start takes seconds where it is much."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import REPO

LOADED = """
import sys, {entry}
try: code = {entry}.main(sys.argv[1:])
except SystemExit as end: code = end.code
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
NEVER = {"transformers", "datasets", "pandas", "wandb", "requests", "sympy", "torch._dynamo", "sat.model.official"}


def loaded(entry: str, *words: str) -> set[str]:
    line = [sys.executable, "-c", LOADED.format(entry=entry), *words]
    done = subprocess.run(line, cwd=REPO, capture_output=True, timeout=120)
    said = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in said, said
    assert b"\r" not in done.stdout + done.stderr, "no bars where there is no terminal"
    return set(said.splitlines()[-1].split())


def test_help_loads_no_library():
    for entry in ("sample_video", "train_video"):
        assert not {"torch", "omegaconf", "sat", "yaml"} & loaded(entry, "--help")


@pytest.mark.parametrize(
    ("entry", "words", "never"),
    [
        ("sample_video", ["configs/demo_infer.yaml"], NEVER | {"deepspeed", "triton", "imageio"}),
        ("train_video", ["configs/demo_lora.yaml", "--set", "deepspeed.zero_optimization.stage=2"], NEVER),
    ],
    ids=["sample", "train"],
)
def test_a_dry_run_loads_no_models_of_others(entry, words, never):
    assert not never & loaded(entry, *words, "--dry-run")


def test_sampling_loads_no_compiler(tmp_path):
    short = ("--prompt", "a star", "--num-frames", "1", "--steps", "2", "--output-dir", str(tmp_path))
    found = loaded("sample_video", "configs/demo_infer.yaml", *short)
    assert not NEVER & found


def test_starts_are_measured_against_another_checkout():
    line = [sys.executable, "tools/bench/start.py", "--only", "help", "--runs", "1", "--against", str(REPO)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wall, cpu = map(json.loads, done.stdout.splitlines())
    assert (wall["part"], wall["figure"], cpu["figure"]) == ("help", "wall_s", "cpu_s")
    assert wall["median"] > 0 and wall["ratio"] == pytest.approx(wall["median"] / wall["against"], rel=1e-2)


@pytest.mark.parametrize(
    ("given", "turns"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000")]
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, turns):
    """What OpenMP says of itself when it is loaded."""
    known = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", "import sgm, torch"], cwd=REPO, env=known | {"OMP_DISPLAY_ENV": "VERBOSE"} | given,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (said,) = re.findall(r"GOMP_SPINCOUNT\s*=\s*'?(\w+)", done.stderr)
    assert said == turns

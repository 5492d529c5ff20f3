"""Shared fixtures. Golden cases that are always there lie in `tests/golden`; the full set is optional."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def logs_outlive_captures() -> None:
    """SAT and DeepSpeed log to what was the standard error (or output) at import: it may have been a test's own."""
    for name in ("sat", "DeepSpeed"):
        for handler in logging.getLogger(name).handlers:
            if getattr(getattr(handler, "stream", None), "closed", False):
                handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def golden() -> Path:
    """The committed golden cases."""
    return REPO / "tests" / "golden"


GOLDEN_SET = Path(os.environ.get("COGVIDEOX_GOLDEN", REPO.parent / "shared" / "golden"))


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The full set of reference tensors; tests that need it are skipped where it is absent."""
    if not (GOLDEN_SET / "dit_io.safetensors").is_file():
        pytest.skip(f"the full reference set is not at {GOLDEN_SET} (COGVIDEOX_GOLDEN)")
    return GOLDEN_SET


@pytest.fixture(scope="session")
def family_golden() -> Path:
    """Reference tensors of 5B, 5B-I2V, 1.5 and 1.5-I2V, in a folder beside the full set; skipped where absent."""
    folder = GOLDEN_SET.parent / "golden_family"
    if not (folder / "t2v_5b.safetensors").is_file():
        pytest.skip(f"the family's reference set is not at {folder} (beside COGVIDEOX_GOLDEN)")
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny model to sample with, in the release's layout."""
    from tests.training_tiny import write_release

    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def config(release: Path, tmp_path: Path) -> Path:
    """Its configuration for sampling; what is made goes into `out` beside it."""
    from tests.sampling_tiny import configuration, write_yaml

    return write_yaml(tmp_path / "c.yaml", configuration(release, output_dir=str(tmp_path / "out")))


@pytest.fixture(scope="module")
def sat_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release in SAT's layout to convert, alone in its folder."""
    from tests.convert_tiny import make_release

    return make_release(tmp_path_factory.mktemp("convert") / "sat")


@pytest.fixture(scope="module")
def sat_yaml(sat_release: Path) -> Path:
    """Its configuration."""
    return sat_release / "infer.yaml"

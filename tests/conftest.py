"""Shared fixtures. Golden cases that are always there lie in `tests/golden`; the full set is optional."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The committed golden cases."""
    return REPO / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The full set of reference tensors; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("COGVIDEOX_GOLDEN", REPO.parent / "shared" / "golden"))
    if not (folder / "dit_io.safetensors").is_file():
        pytest.skip(f"the full reference set is not at {folder} (COGVIDEOX_GOLDEN)")
    return folder

"""tools/setup_env.sh, as inference.sh sources it: a start that was interrupted, and a second one meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that requires nothing, so that its environment is made quickly."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPO / "tools" / "setup_env.sh", tmp_path / "tools")
    (tmp_path / "requirements.txt").write_text("")
    return tmp_path


def source(project: Path) -> subprocess.Popen:
    """Source the script and print what it chose, and pip's version there; only this Python's own folder is searched."""
    known = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    base = Path(sys.base_prefix, "bin")
    script = 'set -euo pipefail; source tools/setup_env.sh; echo "$PYTHON"; "$PYTHON" -m pip --version'
    return subprocess.Popen(
        ["bash", "-c", script], cwd=project, env={**known, "PATH": f"{base}:/usr/bin:/bin"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_an_interrupted_start_is_repaired(project):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)  # killed before pip
    (project / ".venv" / "mine").write_text("")
    command = source(project)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0 and "setting up" in err, err
    python, pip = out.splitlines()
    assert python == str(project / ".venv" / "bin" / "python") and pip.startswith("pip ")
    assert (project / ".venv" / "mine").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock commands do not wait for one another")
def test_a_second_command_waits_for_the_first(project):
    with (project / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first
        command = source(project)
        assert "setting up" in command.stderr.readline() and "waiting for it" in command.stderr.readline()
        assert not (project / ".venv").exists()
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0 and str(project / ".venv") in out, err

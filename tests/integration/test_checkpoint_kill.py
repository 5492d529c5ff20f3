"""`kill -9` during a save, at every point: what is found afterwards is complete, and the next save tidies up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgm.training.checkpoints.load import find_resume, load_state
from tests.checkpoint_tiny import configuration, leftovers
from tests.training_tiny import environment

WORKER = Path(__file__).with_name("checkpoint_kill_worker.py")


@pytest.fixture(scope="module")
def verdicts():
    done = subprocess.run([sys.executable, str(WORKER)], env=environment(), capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_death_at_any_call_leaves_the_old_or_the_new_checkpoint_whole(verdicts):
    found = verdicts["new"]
    assert set(found) == {"2", "4"} and len(found) > 40
    assert found == sorted(found), "once the new checkpoint is found, it must stay found"
    assert found[0] == "2" and found[-1] == "4"


def test_death_while_replacing_the_only_checkpoint_leaves_one_of_the_two_whole(verdicts):
    assert set(verdicts["again"]) == {"2"} and len(verdicts["again"]) > 40


def test_a_process_killed_from_outside_while_writing_weights(tmp_path):
    folder = tmp_path / "toy-01-01-00-00"
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert any(line.strip() == "STALLED" for line in process.stdout)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    assert leftovers(folder) and not (folder / "4").exists()
    found = find_resume(tmp_path, "toy", configuration())
    assert found == folder / "2" and load_state(found).iteration == 2
    assert (folder / "latest").read_text() == "2"

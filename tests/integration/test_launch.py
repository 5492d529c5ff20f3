"""`sgm/launch.py` with real processes: one error, the ranks' exit code, no traceback of the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPO

RANK = """
import os, sys, time
sys.path.insert(0, {repo!r})
from sgm.cli import Interrupts, exit_code
from sgm.config import ConfigError

def work():
    rank = int(os.environ["RANK"])
    {body}

stop = Interrupts().listen()
sys.exit(exit_code(work, "stopped; kept"))
"""


def program(folder: Path, body: str) -> Path:
    (folder / "program.py").write_text(RANK.format(repo=str(REPO), body=body))
    return folder / "program.py"


def start(script: Path, ranks: int) -> subprocess.Popen[str]:
    line = [sys.executable, str(REPO / "sgm" / "launch.py"), "--standalone", f"--nproc_per_node={ranks}", str(script)]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHON": sys.executable}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise ConfigError('bad number')", 2, ["error: bad number"]),
        ("raise ConfigError('rank 2 only') if rank == 2 else time.sleep(60)", 2, ["error: rank 2 only"]),
        ("os._exit(7) if rank == 1 else time.sleep(60)", 7, ["stopped; kept", "error: rank 1 ended with code 7"]),
        ("pass", 0, []),
    ],
    ids=["alike", "one", "crash", "well"],
)
def test_the_end_of_a_launch_is_that_of_its_ranks(tmp_path, body, code, said):
    job = start(program(tmp_path, body), 3)
    out, err = job.communicate(timeout=120)
    assert job.returncode == code and out == ""
    found = [line for line in err.splitlines() if line]
    # Ranks that had not yet begun to listen for the launcher's SIGTERM leave without a word.
    assert found == said or (code == 7 and found == said[1:]), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_to_the_launcher_ends_all_quietly(tmp_path, number):
    body = f"open(os.path.join({str(tmp_path)!r}, 'on%d' % rank), 'w').close(); time.sleep(60)"
    job = start(program(tmp_path, body), 2)
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("on*"))) < 2:
            assert job.poll() is None and time.monotonic() < end, job.communicate()
            time.sleep(0.1)
        job.send_signal(number)
        out, err = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            job.kill()
    assert job.returncode == 128 + number and (out, err.split("\n")) == ("", ["", "stopped; kept", ""])


def test_ranks_whose_launcher_is_killed_end_as_if_it_had_ended_them(tmp_path, monkeypatch):
    """With their last words; one that does not hear of it, as within a collective, is killed later."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    deaf = "import signal; rank and signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    body = f"{deaf}; open(os.path.join({str(tmp_path)!r}, 'on%d' % os.getpid()), 'w').close(); time.sleep(60)"
    with start(program(tmp_path, body), 2) as job:
        while len(found := list(tmp_path.glob("on*"))) < 2:
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        job.kill()
        try:
            assert job.communicate(timeout=30) == ("", "\nstopped; kept\n")  # all have closed it
        finally:
            for file in found:
                with suppress(ProcessLookupError):
                    os.kill(int(file.name.removeprefix("on")), signal.SIGKILL)


def test_a_dry_run_of_two_ranks_prints_one_plan():
    line = ["bash", "inference.sh", "--nproc", "2", "configs/demo_infer.yaml", "--dry-run"]
    done = subprocess.run(line, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  mode: ") == 1, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        ("inference.sh", ["configs/demo_infer.yaml", "--prompt", "A", "--num-frames", "2"], "choose 1 or 3"),
        ("finetune.sh", ["configs/demo_lora.yaml", "--set", "args.train_iters=many"], "got 'many'"),
        ("inference.sh", ["configs/demo_infer.yaml", "--prompt", "A", "--nmu-frames", "2"], "unrecognized arguments"),
    ],
)
def test_bad_input_of_two_ranks_is_one_error(script, arguments, error):
    line = ["bash", script, "--nproc", "2", *arguments]
    done = subprocess.run(line, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("error: ") == 1 and error in done.stderr and "Traceback" not in done.stderr, done.stderr

"""A lock that one process holds, and that ends with it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sgm.files import try_lock

REPO = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from sgm.files import try_lock
with try_lock(Path(sys.argv[1])) as alone:
    child = os.fork() if len(sys.argv) > 2 else None
    os.write(1, f"{alone} {child}\\n".encode())  # in one piece, whoever else writes
    time.sleep(60)
"""


def holder(lock: Path, *more: str) -> tuple[subprocess.Popen, list[str]]:
    """A process that holds `lock`, and what it said; with "fork" its child, and what both said."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock), *more], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    return process, [word for _ in (lock, *more) for word in process.stdout.readline().split()]


def test_one_at_a_time_and_nothing_left(tmp_path):
    lock = tmp_path / "lock"
    with try_lock(lock) as first:
        with try_lock(lock) as second:
            assert first and not second
        with try_lock(lock) as third:
            assert not third  # the one that was refused has not let it go
    assert not list(tmp_path.iterdir())
    with try_lock(lock) as again:
        assert again


def test_it_ends_with_its_process(tmp_path):
    process, said = holder(tmp_path / "lock")
    try:
        assert said == ["True", "None"]
        with try_lock(tmp_path / "lock") as alone:
            assert not alone
    finally:
        process.kill()
        process.wait()
    with try_lock(tmp_path / "lock") as alone:
        assert alone


def test_a_worker_that_outlives_its_parent_does_not_hold_it(tmp_path):
    process, said = holder(tmp_path / "lock", "fork")
    process.kill()
    process.wait()
    (child,) = set(said) - {"True", "0"}
    try:
        os.kill(int(child), 0)  # it lives
        with try_lock(tmp_path / "lock") as ours:
            assert ours
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_never_two_in_a_crowd(tmp_path):
    inside, most = [], []

    def work(_):
        with try_lock(tmp_path / "lock") as alone:
            if alone:
                inside.append(1)
                most.append(len(inside))
                inside.pop()
            return alone

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, range(2000)))
    assert any(got) and max(most) == 1 and not list(tmp_path.iterdir())


def test_a_drive_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), try_lock(tmp_path / "lock") as alone:
        assert alone
    assert "has no locks (No locks available)" in caplog.text
    with try_lock(tmp_path / "lock", without_locks=False) as certain:
        assert not certain

"""Run by test_checkpoint_kill.py: a save that dies at every file-system call it makes, one process each; prints JSON.

Started with an argument FOLDER it instead saves there and stalls in the middle of the second checkpoint's weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm import files as writers
from sgm.training.checkpoints.load import find_resume, load_state
from sgm.training.checkpoints.save import save_checkpoint
from tests.checkpoint_tiny import configuration, leftovers, load_module, state_of, step, toy_run

CONFIG = configuration()
WRITES = 40  # of the many small writes, every so-manieth is a point to die at
CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
NAME = "model.diffusion_model.0.weight"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """Kills the process at the `fatal`-th call of a file-system function; half of the data of a fatal write arrives."""

    def __init__(self, fatal: int):
        self.fatal, self.calls, self.writes = fatal, 0, 0
        for name in CALLS:
            setattr(os, name, self.wrapped(getattr(os, name)))
        self.write = writers._Sink.write
        writers._Sink.write = lambda sink, data: self.torn_write(sink, data)  # noqa: PLW0108  # a method of sinks

    def count(self) -> bool:
        self.calls += 1
        return self.calls == self.fatal

    def wrapped(self, function):
        def call(*arguments, **options):
            if self.count():
                die()
            return function(*arguments, **options)

        return call

    def torn_write(self, sink, data):
        self.writes += 1
        if self.writes % WRITES == 1 and self.count():
            half = bytes(data)[: len(data) // 2]
            self.write(sink, half)
            sink.flush()
            die()
        return self.write(sink, data)


def save(folder: Path, run, iteration: int, keep_last: int | None = 1) -> None:
    save_checkpoint(folder, run, state_of(run, iteration), config=CONFIG, keep_last=keep_last)


def killed_save(template: Path, run, iteration: int, fatal: int) -> tuple[Path, int]:
    """(run folder, exit status) of a save that dies at its `fatal`-th call."""
    folder = Path(tempfile.mkdtemp(dir=template.parent)) / "toy-01-01-00-00"
    shutil.copytree(template, folder)
    child = os.fork()
    if child == 0:
        Mortal(fatal)
        save(folder, run, iteration)
        os._exit(0)
    return folder, os.waitpid(child, 0)[1]


def verdict(folder: Path, run, weights: dict[int, list[torch.Tensor]]) -> str:
    """What a new process finds: the iteration it resumes from, or what is wrong."""
    found = find_resume(folder.parent, "toy", CONFIG)
    if found is None:
        return "nothing to resume"
    state, module = load_state(found), load_module(found)
    if not any(torch.equal(module[NAME], known) for known in weights[state.iteration]):
        return "wrong weights"
    latest = (folder / "latest").read_text()
    if not (folder / latest / "mp_rank_00_model_states.pt").is_file():
        return f"latest names {latest}, which is not there"
    load_module(folder)
    save(folder, run, 9)
    if leftovers(folder):
        return f"leftovers {leftovers(folder)}"
    return str(state.iteration)


def enumerate_kills(iteration: int) -> list[str]:
    """Verdicts after a death at call 1, 2, ... until the save survives; iteration 2 is there before."""
    root = Path(tempfile.mkdtemp())
    template = root / "template"
    run = toy_run()
    step(run)
    save(template, run, 2)
    weights = {2: [run.module.state_dict()[NAME].clone()]}
    step(run)
    weights.setdefault(iteration, []).append(run.module.state_dict()[NAME].clone())
    verdicts = []
    for fatal in range(1, 1000):
        folder, status = killed_save(template, run, iteration, fatal)
        verdicts.append(verdict(folder, run, weights))
        shutil.rmtree(folder.parent)
        if status == 0:
            shutil.rmtree(root)
            return verdicts
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("the save never survived")


def stall(folder: Path) -> None:
    """Save iteration 2; then begin iteration 4, say so, and never finish it."""
    run = toy_run()
    step(run)
    save(folder, run, 2)
    write = writers._Sink.write

    def slow(sink, data):
        write(sink, bytes(data)[: len(data) // 2])
        sink.flush()
        print("STALLED", flush=True)
        time.sleep(600)

    writers._Sink.write = slow
    save(folder, run, 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a dead process loses nothing that it wrote, only a power cut would
    if len(sys.argv) > 1:
        stall(Path(sys.argv[1]))
    else:
        print("RESULT " + json.dumps({"new": enumerate_kills(4), "again": enumerate_kills(2)}), flush=True)

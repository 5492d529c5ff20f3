"""Keeps a worker alive for each device: a process of its own, so that what ends it ends neither server nor queue."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from sgm.errors import SgmError
from sgm.serve.jobs import ModelFacts
from sgm.serve.store import JobStore

LONGEST_PAUSE = 60.0  # before a worker that ends at once is started again
LIVED = 60.0  # seconds after which an end is no reason to wait longer
PATIENCE = 10.0  # with a worker that is to end


class WorkerError(SgmError):
    """A worker that does not start; says what it said."""


@dataclass(frozen=True)
class Order:
    """What a worker is told at its start, as JSON.

    Attributes:
        models: name -> files, overrides and flags of its configuration.
        adapters: name -> file.
        device: number of its GPU; None where the first worker is to find out what there is.
    """

    folder: str
    models: Mapping[str, Mapping[str, Any]]
    adapters: Mapping[str, str]
    allowed_targets: Sequence[str] = ()
    refine_model: str | None = None
    previews: bool = True
    device: int | None = None


@dataclass(frozen=True)
class Ready:
    """What a worker answers once it has read its configurations. `devices` are those it sees.

    `refines`: whether there is a language model to ask.
    """

    models: dict[str, ModelFacts]
    devices: int
    refines: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Ready:
        models = {name: ModelFacts.parse(facts) for name, facts in content["models"].items()}
        return cls(models, content["devices"], content["refines"], content["notes"])


class Worker:
    """One worker and its successors, watched by a thread."""

    def __init__(self, order: Order, store: JobStore, number: int):
        self.order, self.store, self.number = order, store, number
        self._names = (f"{number}.{k}" for k in itertools.count(1))
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self.is_ready = False

    def start(self) -> Ready:
        """Start it and wait until it has read its configurations.

        Raises:
            WorkerError: it cannot.
        """
        name = next(self._names)
        process, ready = self._spawn(name)
        if isinstance(ready, str):
            raise WorkerError(ready)
        threading.Thread(target=self._watch, args=(process, name), name=f"worker {self.number}", daemon=True).start()
        return ready

    def _spawn(self, name: str) -> tuple[subprocess.Popen[str], Ready | str]:
        """A new process, and what it says first: that it is ready, or why it cannot be."""
        command = [sys.executable, "-m", "sgm.serve.worker", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        _send(process.stdin, json.dumps(asdict(self.order)))
        said = process.stdout.readline()
        if not said:
            return process, f"a worker ended with code {process.wait()} before it was ready; see above."
        content = json.loads(said)
        if "error" in content:
            process.wait()
            return process, content["error"]
        self.is_ready = True
        return process, Ready.parse(content)

    def _watch(self, process: subprocess.Popen[str], name: str) -> None:
        """Whenever it ends, what it was making begins again with its successor."""
        pause = 1.0
        while True:
            started = time.monotonic()
            code = process.wait()
            self.is_ready = False
            if self._stopping.is_set():
                return
            self.store.requeue(name)
            pause = 1.0 if time.monotonic() - started > LIVED else min(2 * pause, LONGEST_PAUSE)
            print(f"worker {name} ended with code {code}; another one starts", file=sys.stderr, flush=True)
            name = next(self._names)
            process, ready = self._spawn(name)
            if isinstance(ready, str):
                print(f"error: worker {name}: {ready}", file=sys.stderr, flush=True)
            if self._stopping.wait(pause if isinstance(ready, str) else 0):
                return

    def wake(self) -> None:
        """There is something to do."""
        if self._process is not None and self._process.stdin is not None:
            _send(self._process.stdin, "")

    def stop(self) -> None:
        """End it; what it is making begins again with the next server."""
        self._stopping.set()
        if self._process is None:
            return
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Supervisor:
    """All workers."""

    def __init__(self, order: Order, store: JobStore):
        self.order, self.store = order, store
        self.workers: list[Worker] = []

    def start(self, say: Callable[[str], None] = lambda _: None) -> Ready:
        """Start a worker for each device that the first one sees.

        Raises:
            WorkerError: one does not start.
        """
        ready = self._start(self.order)
        for note in ready.notes:
            say(note)
        for device in range(1, ready.devices):
            self._start(Order(**{**asdict(self.order), "device": device}))
        return ready

    def _start(self, order: Order) -> Ready:
        worker = Worker(order, self.store, len(self.workers))
        self.workers.append(worker)
        return worker.start()

    def alive(self) -> int:
        return sum(worker.is_ready for worker in self.workers)

    def wake(self) -> None:
        for worker in self.workers:
            worker.wake()

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


def _send(pipe: IO[str], line: str) -> None:
    """To a worker that may have ended, which its watcher sees."""
    with suppress(OSError, ValueError):
        pipe.write(f"{line}\n")
        pipe.flush()

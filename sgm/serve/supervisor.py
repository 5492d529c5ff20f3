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
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from sgm.serve.jobs import ModelFacts, ServeError
from sgm.serve.store import JobStore

LONGEST_PAUSE = 60.0  # before a worker that ends at once is started again
LIVED = 60.0  # seconds after which an end is no reason to wait longer
COMMAND = (sys.executable, "-m", "sgm.serve.worker")
PATIENCE = 10.0  # with a worker that is to end


@dataclass(frozen=True)
class Order:
    """What a worker is told at its start, as JSON.

    Attributes:
        models: name -> files, overrides and flags of its configuration.
        adapters: name -> file.
        number: of the worker, from 0.
        device: its GPU; None where the configurations, or what there is, decide.
    """

    folder: str
    models: Mapping[str, Mapping[str, Any]]
    adapters: Mapping[str, str]
    allowed_targets: Sequence[str] = ()
    refine_model: str | None = None
    previews: bool = True
    number: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Ready:
    """What a worker answers once it has read its configurations.

    Attributes:
        adapters: name -> file, as records of clips name it.
        devices: GPUs that are there for workers.
        refines: whether there is a language model to ask.
    """

    models: dict[str, ModelFacts]
    adapters: dict[str, str]
    devices: list[str]
    refines: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Ready:
        models = {name: ModelFacts.parse(facts) for name, facts in content["models"].items()}
        return cls(models, content["adapters"], content["devices"], content["refines"], content["notes"])


class Worker:
    """One worker and its successors, watched by a thread."""

    def __init__(self, order: Order, store: JobStore, command: Sequence[str]):
        self.order, self.store, self.command = order, store, command
        self._names = (f"{order.number}.{k}" for k in itertools.count(1))
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self.is_ready = False

    def start(self) -> Ready:
        """Start it and wait until it has read its configurations.

        Raises:
            ServeError: it cannot.
        """
        name = next(self._names)
        process, ready = self._spawn(name)
        if isinstance(ready, str):
            raise ServeError(ready)
        threading.Thread(target=self._watch, args=(process, name), name=f"worker {name}", daemon=True).start()
        return ready

    def _spawn(self, name: str) -> tuple[subprocess.Popen[str], Ready | str]:
        """A new process, and what it says first: that it is ready, or why it cannot be."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*self.command, name], process_group=0, **pipes)
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
        self.is_ready = False


class Supervisor:
    """All workers.

    Args:
        count: of workers; None for one a GPU.
        command: of a worker, whose name is added.
    """

    def __init__(self, order: Order, store: JobStore, count: int | None = None, command: Sequence[str] = COMMAND):
        self.order, self.store, self.count, self.command = order, store, count, command
        self.workers: list[Worker] = []

    def start(self, say: Callable[[str], None] = lambda _: None) -> Ready:
        """Start the first worker, and as many beside it as there is room for.

        Raises:
            ServeError: one does not start.
        """
        ready = self._start(None)
        for note in ready.notes:
            say(note)
        devices: list[str | None] = list(ready.devices) or [None]
        for number in range(1, self.count or len(devices)):
            self._start(devices[number % len(devices)])
        return ready

    def _start(self, device: str | None) -> Ready:
        order = replace(self.order, number=len(self.workers), device=device)
        worker = Worker(order, self.store, self.command)
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

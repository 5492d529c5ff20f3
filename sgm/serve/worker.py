"""A worker's process: `python -m sgm.serve.worker NAME`, which the supervisor starts.

Its first line of input is an `Order`; each further one says that there is something to do. Its output is one line: that
it is ready, or why it cannot be. When its input ends the server is gone, and so is it, at once: two workers must not
share a device.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from sgm.cli import BAD_INPUT
from sgm.errors import SgmError
from sgm.files import try_lock
from sgm.serve.maker import Maker
from sgm.serve.store import JobStore

PATIENCE = 30.0  # with the worker of a server that was killed
LOOK_EVERY = 5.0  # seconds between two looks into the queue where nobody wakes this one


def main(name: str) -> int:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    order = json.loads(sys.stdin.readline())
    woken = threading.Event()
    threading.Thread(target=_listen, args=(woken,), daemon=True).start()
    place = Path(order["folder"]) / f"worker-{order['number']}.lock"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with try_lock(place) as alone:
            if alone:
                return _work(name, order, answers, woken)
        time.sleep(0.1)
    return _refuse(answers, f"another worker holds {place} and does not end; end it, or choose another --output-dir.")


def _work(name: str, order: dict[str, Any], answers: TextIO, woken: threading.Event) -> int:
    import torch

    from sgm.inference.refine import Endpoint, RefineError
    from sgm.serve.models import Models
    from sgm.util import allow_target

    for prefix in order["allowed_targets"]:
        allow_target(prefix)
    try:
        models = Models(order["models"], order["adapters"], order["device"])
    except SgmError as error:
        return _refuse(answers, str(error))
    try:
        refines = bool(Endpoint.from_environment(order["refine_model"]))
    except RefineError:
        refines = False
    _answer(
        answers,
        models={key: asdict(facts) for key, facts in models.facts().items()},
        adapters=models.adapters,
        devices=_devices(order),
        refines=refines,
        notes=models.notes(),
    )
    store = JobStore(Path(order["folder"]))
    maker = Maker(store, name, models.generate, order["previews"], (torch.OutOfMemoryError,))
    while True:
        woken.clear()
        while maker.make_next():
            pass
        woken.wait(LOOK_EVERY)


def _devices(order: dict[str, Any]) -> list[str]:
    """GPUs that workers may share out among themselves; none where one was named, or on a CPU."""
    import torch

    named = {spec["flags"].get("device") for spec in order["models"].values()}
    return [f"cuda:{k}" for k in range(torch.cuda.device_count())] if named <= {None, "cuda"} else []


def _listen(woken: threading.Event) -> None:
    for _ in sys.stdin:
        woken.set()
    os._exit(0)


def _answer(answers: TextIO, **content: Any) -> None:
    answers.write(f"{json.dumps(content)}\n")
    answers.flush()


def _refuse(answers: TextIO, error: str) -> int:
    _answer(answers, error=error)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

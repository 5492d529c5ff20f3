"""One worker a GPU: how they are started, and what follows when they end. Small programs stand in for the real ones."""

from __future__ import annotations

import json
import sys

import pytest

from sgm.serve.jobs import QUEUED, RUNNING, ServeError
from sgm.serve.store import JobStore, new_id
from sgm.serve.supervisor import Order, Supervisor
from tests.serve_tiny import origin, request, wait_for

READY = {"models": {}, "adapters": {}, "refines": False, "notes": ["a note"]}
# Writes down what it was ordered, claims a job where there is one, and works at it until its input ends.
STANDS_IN = """
import json, pathlib, sys
sys.path.insert(0, {repo!r})
from sgm.serve.store import JobStore
order = json.loads(sys.stdin.readline())
folder = pathlib.Path(order["folder"])
(folder / f"order-{{sys.argv[1]}}.json").write_text(json.dumps(order))
print({ready!r}, flush=True)
for line in sys.stdin:
    job = JobStore(folder).claim(sys.argv[1])
    if job and job.attempts == 1:
        sys.exit(1)
"""


def supervisor(folder, program, count=None):
    store = JobStore(folder)
    return Supervisor(Order(str(folder), {}, {}), store, count, [sys.executable, "-c", program]), store


def stand_in(devices):
    from tests.sampling_tiny import REPO

    return STANDS_IN.format(repo=str(REPO), ready=json.dumps({**READY, "devices": devices}))


@pytest.mark.parametrize(
    "devices, count, expected",
    [
        ([], None, [None]),
        ([], 2, [None, None]),
        (["cuda:0", "cuda:1", "cuda:2"], None, [None, "cuda:1", "cuda:2"]),
        (["cuda:0", "cuda:1"], 1, [None]),
    ],
)
def test_each_gpu_has_a_worker(tmp_path, devices, count, expected):
    workers, store = supervisor(tmp_path, stand_in(devices), count)
    said = []
    try:
        workers.start(said.append)
        assert workers.alive() == len(expected) and said == ["a note"]
        orders = [json.loads((tmp_path / f"order-{k}.1.json").read_text()) for k in range(len(expected))]
        assert [order["device"] for order in orders] == expected
        assert [order["number"] for order in orders] == list(range(len(expected)))
    finally:
        workers.stop()
        store.close()
    assert workers.alive() == 0


def test_what_an_ended_worker_was_making_is_its_successors(tmp_path):
    workers, store = supervisor(tmp_path, stand_in([]))
    job, _ = store.create(new_id(), request(), origin(), 10)
    try:
        workers.start()
        workers.wake()
        wait_for(lambda: (tmp_path / "order-0.2.json").exists() and workers.alive())
        assert store.get(job.id).state == QUEUED
        workers.wake()
        wait_for(lambda: store.get(job.id).attempts == 2)
        assert store.get(job.id).state == RUNNING
    finally:
        workers.stop()
        store.close()


@pytest.mark.parametrize(
    "program, said",
    [('print(\'{"error": "no weights"}\')', "no weights"), ("import sys; sys.exit(3)", "ended with code 3")],
)
def test_a_worker_that_does_not_start_is_one_error(tmp_path, program, said):
    workers, store = supervisor(tmp_path, program)
    with pytest.raises(ServeError, match=said):
        workers.start()
    workers.stop()
    store.close()

"""The server's counts as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sgm.serve.desk import Desk
from sgm.serve.jobs import QUEUED, RUNNING


def metrics(desk: Desk) -> str:
    """Text in Prometheus' format, version 0.0.4. Totals are those of the output folder, whichever process made them."""
    return "\n".join(_lines(desk)) + "\n"


def _lines(desk: Desk) -> Iterator[str]:
    totals, counts = desk.store.totals(), desk.store.counts()
    yield from _metric("videos_created_total", "counter", "Jobs that were taken on.", {"": totals["created"]})
    outcomes = {f'{{outcome="{name}"}}': totals[name] for name in ("completed", "failed", "deleted")}
    yield from _metric("videos_total", "counter", "Jobs by what became of them.", outcomes)
    yield from _metric("video_seconds_total", "counter", "Time spent on completed videos.", {"": totals["seconds"]})
    states = {f'{{state="{state}"}}': counts[state] for state in (QUEUED, RUNNING)}
    yield from _metric("videos", "gauge", "Jobs that are not finished.", states)
    yield from _metric("workers", "gauge", "Workers that are alive.", {"": desk.alive()})
    answers = {f'{{status="{status}"}}': n for status, n in sorted(desk.answers.items())}
    yield from _metric("http_responses_total", "counter", "Answers of this process by status.", answers)


def _metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> Iterator[str]:
    name = f"cogvideox_{name}"
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {value:g}" if value < 1e6 else f"{name}{labels} {value:.3f}"

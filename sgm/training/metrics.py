"""What a run reports: a progress line for people, `metrics.jsonl` for programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass
class Interval:
    """Sums over the iterations since the last progress line."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    iterations: int = 0
    skipped: int = 0

    def add(self, loss: float, grad_norm: float | None, applied: bool) -> None:
        self.iterations += 1
        self.skipped += not applied
        if math.isfinite(loss):
            self.losses.append(loss)
        if grad_norm is not None and math.isfinite(grad_norm):
            self.norms.append(grad_norm)

    def means(self) -> dict[str, float | None]:
        """Mean loss and gradient norm of what was finite, and seconds a step."""
        elapsed = time.monotonic() - self.started
        return {
            "loss": _mean(self.losses),
            "grad_norm": _mean(self.norms),
            "seconds_per_step": elapsed / max(1, self.iterations),
        }


class RunLog:
    """Progress of a run on rank 0; other ranks stay silent. Use as a context manager.

    Args:
        folder: run folder for `metrics.jsonl`; None writes no file.
        total: iterations of the whole run.
        out: where lines go; None for no lines (other ranks).
    """

    def __init__(self, folder: Path | None, total: int, out: TextIO | None):
        self.total, self.out = total, out
        self.interval = Interval()
        self._file = None
        if folder is not None and out is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def line(self, text: str) -> None:
        if self.out is not None:
            print(text, file=self.out, flush=True)

    def record(self, kind: str, **values: Any) -> None:
        """One line of `metrics.jsonl`."""
        if self._file is not None:
            stamped = {"kind": kind, "time": round(time.time(), 3), **_jsonable(values)}
            self._file.write(json.dumps(stamped) + "\n")

    def train(
        self,
        iteration: int,
        lr: float,
        scale: float | None,
        samples: int,
        phases: Mapping[str, float] | None = None,
        peak: int | None = None,
    ) -> None:
        """Progress line over the iterations since the last one.

        `phases`: seconds by phase in these iterations; `peak`: most bytes on the GPU so far.
        """
        means = self.interval.means()
        skipped = self.interval.skipped
        phases = {name: seconds / max(1, self.interval.iterations) for name, seconds in (phases or {}).items()}
        self.interval = Interval()
        left = (self.total - iteration) * (means["seconds_per_step"] or 0.0)
        text = f"iteration {iteration:>{len(str(self.total))}}/{self.total} | loss {_shown(means['loss'], '.4f')}"
        text += f" | lr {lr:.3g} | grad norm {_shown(means['grad_norm'], '.3g')}"
        text += f" | {means['seconds_per_step']:.2f} s/step | ETA {duration(left)}"
        text += f" | loss scale {scale:g}" if scale is not None else ""
        text += f" | {skipped} skipped" if skipped else ""
        text += f" | peak {peak / 2**30:.2f} GiB" if peak is not None else ""
        self.line(text)
        if phases:
            self.line("  seconds a step: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items()))
        extra = ({"phases": phases} if phases else {}) | ({"peak_bytes": peak} if peak is not None else {})
        self.record(
            "train", iteration=iteration, lr=lr, loss_scale=scale, samples=samples, skipped=skipped, **means, **extra
        )


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = int(round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

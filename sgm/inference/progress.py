"""What a person watching sees: a line per stage, one bar over prompts, one over steps, all on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from sgm.inference.placement import peak_memory
from sgm.progress import Tally

Bar: TypeAlias = "tqdm[Any] | Tally"
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


@dataclass
class StageTimes:
    """Seconds and peak memory (bytes) by stage name; a stage that runs several times adds up."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, seconds: float, peak: int) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)


class Progress:
    """Reports to one process's standard error; silent where `shown` is false (other ranks).

    `check` is called at every sampling step; it stops a run by raising.
    """

    def __init__(self, shown: bool, device: torch.device, check: Callable[[], None] = lambda: None):
        self.shown = shown
        self.device = device
        self.check = check

    def line(self, text: str) -> None:
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A line on what was asked for."""
        self.line(f"note: {text}")

    def warn(self, text: str) -> None:
        """A line that must be seen, whichever process it comes from."""
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def bar(self, total: int, title: str, unit: str) -> Bar:
        """A bar on a terminal (tqdm), a line now and then elsewhere (`Tally`)."""
        if self.shown and not sys.stderr.isatty():
            return Tally(title, f"{unit}s", total, self.line, LINE_SECONDS)
        return tqdm(total=total, desc=title, unit=unit, disable=not self.shown, file=sys.stderr, dynamic_ncols=True,
                    leave=False)  # fmt: skip

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[..., None]]:
        """A sampler callback that moves a bar with the estimated time left."""
        with self.bar(total, "sampling", "step") as bar:

            def step(*_: object) -> None:
                self.check()
                bar.update(1)

            yield step

    @contextmanager
    def stage(self, name: str, times: StageTimes, what: str = "") -> Iterator[None]:
        """Measures a stage and prints its line when it is over."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds, peak = time.perf_counter() - start, peak_memory(self.device)
        times.add(name, seconds, peak)
        self.line(f"{name:>8}: {seconds:7.2f} s, peak {peak / 2**30:.2f} GiB" + (f"  ({what})" if what else ""))

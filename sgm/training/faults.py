"""What can go wrong in a long run, and what is done: skipped steps, signals, full memory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from sgm.errors import SgmError
from sgm.training.memory import MemoryNeeds, gib

OVERFLOW = "the gradient left float16's range, the loss scale is lowered"  # in float16 this happens to good runs


class TrainingStopped(SgmError):
    """The run cannot usefully go on; the message gives the reason and what to change."""


@dataclass
class SkipGuard:
    """Counts optimizer steps that were skipped because loss or gradient were not finite.

    Attributes:
        limit: so many in a row end the run.
        in_a_row: since the last applied step.
        search: those before the first applied one, in which float16 looks for its loss scale.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0
    search: int = 0
    reason: str = ""

    def applied(self) -> None:
        self.in_a_row = 0

    def worth_saving(self, iteration: int) -> bool:
        """Do the weights after `iteration` steps hold something that was learnt, and go on being good for losses?

        One step may be skipped for a bad clip, and some in float16; a row of them says that the weights are bad.
        """
        return self.total < iteration and (self.in_a_row <= 1 or self.reason == OVERFLOW)

    def mostly_skipped(self, iteration: int) -> bool:
        """Of `iteration` steps, were more skipped (but for float16's search) than applied?"""
        applied = iteration - self.total
        return self.total - self.search > applied or not applied

    def skipped(self, reason: str, iteration: int, dtype: str) -> None:
        """Count one.

        Raises:
            TrainingStopped: `limit` in a row.
        """
        if reason == OVERFLOW and self.search == self.total == iteration - 1:
            self.search += 1
        self.reason = reason
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < self.limit:
            return
        raise TrainingStopped(
            f"{self.in_a_row} steps in a row were skipped up to iteration {iteration} ({reason}): nothing is learnt "
            f"any more. Checkpoints from before are intact. To go on, {cure(dtype == 'fp16')}; args.max_skipped_steps "
            "sets this limit."
        )


def cure(fp16: bool) -> str:
    """What to change where training, in float16 or another type, gives NaN or infinity."""
    if fp16:
        bf16 = "--set deepspeed.fp16.enabled=false --set deepspeed.bf16.enabled=true"
        return f"lower the learning rate, or train in bfloat16 ({bf16})"
    return "lower the learning rate or deepspeed.gradient_clipping, and check the weights that were loaded"


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save and leave between two steps.

    One that comes `PATIENCE` seconds later or more ends the process at once. (Ctrl-C reaches a process twice when a
    launcher stands between: from the terminal and from the launcher.)
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    PATIENCE = 5.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0

    @contextmanager
    def watch(self) -> Iterator[StopSignal]:
        """Inside the block the signals are remembered; afterwards their handlers are what they were."""
        previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= self.PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received is not None else ""


def out_of_memory_advice(needs: MemoryNeeds) -> str:
    """What to change when a GPU is too small, with the estimated effect of each switch."""
    lines = [f"  {switch}: saves about {gib(saved)}" for switch, saved in needs.switches() if saved > 0]
    return "\n".join(
        [f"the GPU ran out of memory; this run was estimated to need {gib(needs.total)}.", "What helps:", *lines]
    )

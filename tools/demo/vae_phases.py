"""The course of the VAE's training: what batches, and what learning rate, at which part of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tools.demo.clip_feed import BatchShape, FeedError

# Small pieces first, for many steps; then longer ones; last what inference does, whole clips: group normalisation
# depends on how much of a clip it sees.
PHASES = "0.4:4x9x64x96,0.3:8x17x64x96,0.3:2x49x128x192"
WARM_UP, LAST_RATE = 0.02, 0.01  # part of the run; part of the full rate


@dataclass(frozen=True)
class Phase:
    """`share` of the run with batches of one shape."""

    share: float
    batch: BatchShape


def parse_phases(text: str) -> tuple[Phase, ...]:
    """ "SHARE:PIECESxFRAMESxHEIGHTxWIDTH,..."; shares are relative. Raises FeedError."""
    phases = []
    for part in text.split(","):
        try:
            share, shape = part.split(":")
            phase = Phase(float(share), BatchShape(*map(int, shape.split("x"))))
        except (ValueError, TypeError) as error:
            form = f"write SHARE:PIECESxFRAMESxHEIGHTxWIDTH, such as {PHASES}"
            raise FeedError(f"phase {part!r}: {form} ({error})") from None
        if phase.share <= 0 or phase.batch.frames % 8 != 1 or phase.batch.height % 8 or phase.batch.width % 8:
            raise FeedError(f"phase {part!r}: frames must be 1, 9, 17, ..., sides multiples of 8, the share positive")
        phases.append(phase)
    return tuple(phases)


def phase_at(part: float, phases: tuple[Phase, ...]) -> Phase:
    """The phase at `part` (0 to 1) of a run."""
    left = part * sum(phase.share for phase in phases)
    for phase in phases:
        if left < phase.share:
            return phase
        left -= phase.share
    return phases[-1]


def learning_rate(part: float, full: float) -> float:
    """Linear up, then half a cosine down."""
    if part < WARM_UP:
        return full * max(part / WARM_UP, 0.05)
    down = (part - WARM_UP) / (1 - WARM_UP)
    return full * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * down)))

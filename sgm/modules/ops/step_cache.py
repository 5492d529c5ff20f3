"""What a network did at earlier steps of a sampling run, reused at later ones: approximations that save time.

State belongs to one run: make new objects for every video. Nothing here is used unless a run asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]  # tokens (b, n, d) -> (b, n, d)
LayerRunner = Callable[[Sequence[Layer], Tensor], Tensor]


def run_layers(layers: Sequence[Layer], hidden: Tensor) -> Tensor:
    """Every layer, one after the other: the runner that a network uses unless it is given another."""
    for layer in layers:
        hidden = layer(hidden)
    return hidden


@dataclass(frozen=True)
class SkipRule:
    """Which steps of a run may be skipped.

    Attributes:
        threshold: a step is skipped where the measured relative change is below it. 0 skips none; infinity leaves all
            to `max_skips`, which makes a fixed pattern.
        keep_first, keep_last: so many steps at either end are never skipped.
        max_skips: most skipped steps in a row.
        order: 0 repeats the last value, 1 extrapolates along the last two.
    """

    threshold: float
    keep_first: int = 4
    keep_last: int = 4
    max_skips: int = 1
    order: int = 1

    def allows(self, step: int, steps: int, skipped: int) -> bool:
        """Whether step `step` of `steps` may be skipped after `skipped` skips in a row."""
        return self.keep_first <= step < steps - self.keep_last and skipped < self.max_skips and self.threshold > 0


@dataclass
class History:
    """The last two values of something that changes along a run, and where on the run's axis they were taken."""

    values: list[Tensor] = field(default_factory=list)
    places: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.values)

    def add(self, value: Tensor, place: float, keep: int = 2) -> None:
        self.values = [*self.values, value][-keep:]
        self.places = [*self.places, place][-keep:]

    def predict(self, place: float, order: int) -> Tensor:
        """The value at `place`: the last one, or on the line through the last two (Liu et al. 2025, TaylorSeer,
        arXiv:2503.06923, first order)."""
        last = self.values[-1]
        if order == 0 or len(self.values) < 2:
            return last
        weight = (place - self.places[-1]) / (self.places[-1] - self.places[-2])
        return torch.lerp(self.values[-2], last, 1 + weight)


def relative_change(now: Tensor, before: Tensor) -> float:
    """sum |now - before| / sum |before|; infinite where `before` is all zero."""
    whole = float(before.float().abs().sum())
    return float((now.float() - before.float()).abs().sum()) / whole if whole else math.inf


class FirstBlockCache:
    """A `LayerRunner` that skips all layers but the first where the first one changes the tokens as it did before.

    What the other layers add to the tokens is kept from the last whole passes, and predicted at a skipped step. The
    measure is the change of what the first layer adds, relative to the last whole pass (first-block cache as in
    ParaAttention; after TeaCache, Liu et al. 2024, arXiv:2411.19108, whose fitted polynomial it does not need).

    Only the last `samples` entries of a batch are remembered, and a larger batch is never skipped.
    """

    def __init__(self, rule: SkipRule, steps: int, samples: int):
        self.rule = rule
        self.steps = steps
        self.samples = samples
        self.step = 0  # of the run; the caller sets it before a forward
        self.skipped = 0  # in a row, with the last forward
        self._first_residual: Tensor | None = None
        self._other_residuals = History()

    def may_skip(self) -> bool:
        """Whether the present step may be skipped, before the first layer has been asked."""
        return bool(self._other_residuals) and self.rule.allows(self.step, self.steps, self.skipped)

    def __call__(self, layers: Sequence[Layer], hidden: Tensor) -> Tensor:
        first = layers[0](hidden)
        if len(hidden) == self.samples and self.may_skip() and self._is_similar(first, hidden):
            self.skipped += 1
            return first + self._other_residuals.predict(self.step, self.rule.order)
        self.skipped = 0
        out = run_layers(layers[1:], first)
        self._store(hidden[-self.samples :], first[-self.samples :], out[-self.samples :])
        return out

    def _is_similar(self, first: Tensor, hidden: Tensor) -> bool:
        if self.rule.threshold == math.inf:
            return True
        return (
            self._first_residual is not None
            and relative_change(first - hidden, self._first_residual) < self.rule.threshold
        )

    def _store(self, hidden: Tensor, first: Tensor, out: Tensor) -> None:
        if self.rule.threshold != math.inf:
            self._first_residual = first - hidden
        self._other_residuals.add(out - first, self.step, keep=1 + self.rule.order)

"""A run's loss as a picture, drawn from `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 50, 50  # margins
LOG_FROM = 20.0  # largest over smallest value from which the axis is logarithmic
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points (iteration, loss) and how they are drawn: a line `width` pixels wide, or dots where it is 0."""

    name: str
    points: Points
    color: str
    width: int


def read_records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in order of iteration; of an iteration that came twice (a resumed run) the later one.

    A last line that a crash cut off is passed over.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == kind:
            found[record["iteration"]] = record
    return [found[iteration] for iteration in sorted(found)]


def draw_losses(metrics: Path, image: Path) -> bool:
    """Write the PNG of what `metrics.jsonl` holds; False where it has nothing to show yet.

    Raises:
        SaveError: the picture cannot be written.
    """
    train, valid = read_records(metrics, "train"), read_records(metrics, "valid")
    curves = [
        Curve("loss", _points(train, "loss"), "#9db8d9", 1),
        Curve("moving average", _points(train, "loss_average"), "#1f4e8c", 3),
        Curve("validation", _points(valid, "loss"), "#c0392b", 0),
    ]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return False
    draw_curves(image, metrics.parent.name, curves)
    return True


def draw_curves(path: Path, title: str, curves: Sequence[Curve], across_is: str = "iteration") -> None:
    """Write the PNG of `chart`."""
    from sgm.files import replacing

    with replacing(path) as temporary:
        chart(title, curves, across_is).save(temporary)


def chart(title: str, curves: Sequence[Curve], across_is: str, logarithmic: bool | None = False) -> Image:
    """A chart with both axes, a legend and all curves; `logarithmic` is the lower axis, None: if its values differ
    enough, as on the left axis."""
    from PIL import Image, ImageDraw

    every = [point for curve in curves for point in curve.points]
    across = _Axis.of([x for x, _ in every], LEFT, WIDTH - RIGHT, logarithmic)
    up = _Axis.of([y for _, y in every], HEIGHT - BOTTOM, TOP, logarithmic=None)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    _frame(draw, across, up, title, across_is)
    for k, curve in enumerate(curves):
        places = [(across.place(x), up.place(y)) for x, y in curve.points]
        if curve.width and len(places) > 1:
            draw.line(places, fill=curve.color, width=curve.width, joint="curve")
        if not curve.width or len(places) == 1:
            for x, y in places:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=curve.color)
        draw.text((WIDTH - RIGHT - 150 * (len(curves) - k), 18), curve.name, fill=curve.color, font_size=16)
    return picture


@dataclass(frozen=True)
class _Axis:
    """From values to pixels, with round numbers to mark."""

    low: float
    high: float
    start: int
    end: int
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float], start: int, end: int, logarithmic: bool | None) -> _Axis:
        """`logarithmic` None: if the values differ enough and none is 0 or less."""
        low, high = min(values), max(values)
        if logarithmic is None:
            logarithmic = low > 0 and high / low > LOG_FROM
        if low == high:
            low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
        return cls(low, high, start, end, logarithmic)

    def place(self, value: float) -> float:
        low, high = self._scaled(self.low), self._scaled(self.high)
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def marks(self) -> list[float]:
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**e for e in exponents for digit in (1, 2, 5)]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (step * f) <= 8)
            first = math.ceil(self.low / step)
            found = [step * k for k in range(first, first + 12)]
        return [mark for mark in found if self.low <= mark <= self.high]


def _frame(draw: ImageDraw, across: _Axis, up: _Axis, title: str, across_is: str) -> None:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    for value in across.marks():
        x = across.place(value)
        draw.line((x, top, x, bottom), fill="#e4e4e4")
        draw.text((x, bottom + 8), f"{value:g}", fill="black", anchor="mt", font_size=14)
    for value in up.marks():
        y = up.place(value)
        draw.line((left, y, right, y), fill="#e4e4e4")
        draw.text((left - 8, y), f"{value:.3g}", fill="black", anchor="rm", font_size=14)
    draw.rectangle((left, top, right, bottom), outline="#606060")
    draw.text((left, 18), title, fill="black", font_size=16)
    draw.text((right, HEIGHT - 20), across_is, fill="black", anchor="rm", font_size=14)


def _points(records: Sequence[dict[str, Any]], name: str) -> Points:
    return [(record["iteration"], record[name]) for record in records if record.get(name) is not None]

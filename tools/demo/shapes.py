"""Clips of moving shapes: drawn at random from a seed, rendered by signed distance functions in numpy.

    spec = sample_spec(np.random.default_rng(0))
    frames = render_clip(spec)                      # uint8 (f, h, w, 3)
    text = caption(spec, np.random.default_rng(0))

Coordinates: x to the right, y downwards, in pixels. f frames, h w pixels, p side of the square patch around a shape.
Distances inside a shape are negative, in units of its radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from tools.demo.attributes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    PATTERN_PERIODS,
    PATTERN_PHASES,
    PATTERNS,
    SHAPES,
    SIZES,
    SPEEDS,
    STYLES,
    ClipSpec,
    ObjectSpec,
    is_possible,
    pale,
    stands_out,
)
from tools.demo.captions import caption

__all__ = ["ClipSpec", "ObjectSpec", "caption", "render_clip", "sample_spec"]

EXTENT = 1.12  # no shape reaches farther from its centre, in radii
# Fast ones stay below five pixels a frame in clips of 49 frames at 128x192: a VAE that keeps one frame in four blurs
# what is faster. That is why quick hops are low and orbits have a largest radius.
TRAVEL = {"slow": 0.5, "medium": 0.72, "fast": 0.95}  # share of the free way that a clip covers
HOPS = {"slow": 1.0, "medium": 1.5, "fast": 2.25}
HOP_HEIGHT = {"slow": 0.3, "medium": 0.25, "fast": 0.2}  # at most, in shorter sides
ORBITS = {"slow": 0.75, "medium": 1.0, "fast": 1.25}
ORBIT_RADIUS = 0.2  # at most, in shorter sides
TURNS = {"slow": 0.25, "medium": 0.5, "fast": 0.75}
GROWTH = {"slow": 1.4, "medium": 1.7, "fast": 2.1}  # last radius over first
WOBBLES = {"slow": 1.5, "medium": 2.0, "fast": 3.0}
# In radii. A small heart's stripes are 9 pixels wide, the VAE's cells 8; its top has the full colour.
STRIPE_PERIOD, STRIPE_PHASE = 0.84, 0.81
DOT_PITCH, DOT_RADIUS = 0.25, 0.085  # in shorter sides
Sdf = Callable[[np.ndarray, np.ndarray], np.ndarray]
T = TypeVar("T")


# ---- shapes: distance to the outline, from coordinates in radii ----
# Drawn to be as unlike each other as their names allow, at any angle: the hexagon is wide, the diamond narrow, the
# star's arms are broad, the ring's hole is large.


def _half_planes(x: np.ndarray, y: np.ndarray, count: int, first: float, apothem: float) -> np.ndarray:
    """Signed distances (count, ...) to the sides of a regular polygon; `first` is the first normal's angle."""
    angles = first + 2 * np.pi * np.arange(count) / count
    return np.stack([np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y for a in angles]) - np.float32(apothem)


def _slope(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Signed distance to the line from `start` to `end`, whose inner side is the origin's, left of the way."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    normal = np.array([dy, -dx], np.float32) / np.float32(np.hypot(dx, dy))
    return normal[0] * (x - np.float32(start[0])) + normal[1] * (y - np.float32(start[1]))


def _circle(x, y):
    return np.sqrt(x * x + y * y) - 0.92


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - 0.755) - 0.225


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.78


def _diamond(x, y):
    return _slope(np.abs(x), np.abs(y), (0.6, 0.0), (0.0, 1.1))


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1.0, y - 0.34), np.maximum(x - 0.34, y - 1.0))


def _triangle(x, y):
    return _half_planes(x, y, 3, np.pi / 2, 0.55).max(axis=0)


def _hexagon(x, y):
    return np.maximum(np.abs(y) - 0.7, _slope(np.abs(x), np.abs(y), (1.08, 0.0), (0.54, 0.7)))


def _star(x, y):
    # Half an arm, which all others are turned or mirrored to; the first points up.
    sector, inner = 2 * np.pi / 5, 0.48
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    notch = (inner * np.cos(sector / 2), inner * np.sin(sector / 2))
    radius = np.hypot(x, y)
    return _slope(radius * np.cos(angle), radius * np.sin(angle), (1.1, 0.0), notch)


def _heart(x, y):
    # A square on its corner, with a half disc on each of its two upper sides; its centre of area lies in the middle.
    u, v = (x - y + 0.239) * np.float32(0.5**0.5), (0.239 - x - y) * np.float32(0.5**0.5)
    half = 0.54
    discs = np.minimum(np.hypot(u - half, v), np.hypot(u, v - half)) - half
    return np.minimum(np.maximum(np.abs(u), np.abs(v)) - half, discs)


SDFS: dict[str, Sdf] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross,
    "diamond": _diamond, "hexagon": _hexagon, "heart": _heart,
}  # fmt: skip


# ---- motion ----


def _track(spec: ObjectSpec, clip: ClipSpec, left: float, right: float) -> tuple[np.ndarray, ...]:
    """x, y, radius (pixels), angle (radians) and stretch (height over width) of a shape, each (f,).

    The shape stays within `left` to `right` and the frame's height.
    """
    f = clip.frames
    u = np.linspace(0, 1, f) if f > 1 else np.full(1, 0.5)
    radius = np.full(f, SIZES[spec.size] * min(clip.height, clip.width))
    angle, stretch = np.zeros(f), np.ones(f)
    if spec.motion in ("grow", "shrink"):
        exponent = u - 0.5 if spec.motion == "grow" else 0.5 - u
        radius = radius * GROWTH[spec.speed] ** exponent
    if spec.motion == "rotate":
        angle = 2 * np.pi * TURNS[spec.speed] * u
    if spec.motion == "wobble":
        swing = 2 * np.pi * WOBBLES[spec.speed] * u
        angle, stretch = 0.25 * np.sin(swing), 1 + 0.25 * np.sin(swing + 1.5)
    margin = EXTENT * radius.max() * np.sqrt(stretch.max()) + 2
    free_x, free_y = max(right - left - 2 * margin, 0), max(clip.height - 2 * margin, 0)
    x, y = _path(spec, u, free_x, free_y, min(clip.height, clip.width))
    return left + margin + x, margin + y, radius, angle, stretch


def _path(spec: ObjectSpec, u: np.ndarray, free_x: float, free_y: float, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions (f,), (f,) within [0, free_x] x [0, free_y] at the times u in [0, 1]; `side` is the frame's shorter."""
    place_x, place_y = spec.place
    if spec.motion in DIRECTIONS:
        dx, dy = DIRECTIONS[spec.motion]
        if dx and dy:  # diagonals at 45 degrees
            travel_x = travel_y = TRAVEL[spec.speed] * min(free_x, free_y)
        else:
            travel_x, travel_y = TRAVEL[spec.speed] * free_x * abs(dx), TRAVEL[spec.speed] * free_y * abs(dy)
        along_x, along_y = (u if d > 0 else 1 - u for d in (dx, dy))
        return (
            place_x * (free_x - travel_x) + travel_x * along_x,
            place_y * (free_y - travel_y) + travel_y * along_y,
        )
    if spec.motion == "orbit":
        turn = 2 * np.pi * (spec.phase + ORBITS[spec.speed] * u)  # growing angles turn clockwise, y being downwards
        reach = min(0.47 * min(free_x, free_y), ORBIT_RADIUS * side)
        return free_x / 2 + reach * np.cos(turn), free_y / 2 + reach * np.sin(turn)
    if spec.motion == "bounce":
        hop = HOPS[spec.speed] * u % 1
        height = min(0.95 * free_y, HOP_HEIGHT[spec.speed] * side)
        return np.full_like(u, place_x * free_x), free_y - height * 4 * hop * (1 - hop)
    return np.full_like(u, place_x * free_x), np.full_like(u, place_y * free_y)


# ---- rendering ----


def render_clip(spec: ClipSpec) -> np.ndarray:
    """Frames of a clip, uint8 (f, h, w, 3)."""
    ground = (_background(spec) + 0.5).astype(np.uint8)
    frames = np.repeat(ground[None], spec.frames, axis=0)
    share = spec.width / len(spec.objects)
    for i, item in enumerate(spec.objects):
        _draw(frames, item, *_track(item, spec, i * share, (i + 1) * share))
    return frames


def _draw(frames, item: ObjectSpec, x, y, radius, angle, stretch) -> None:
    """Blend a shape into frames (f, h, w, 3) in place; tracks are (f,). Only a patch around the shape is computed."""
    height, width = frames.shape[1:3]
    reach = int(np.ceil(EXTENT * radius.max() * np.sqrt(stretch.max()))) + 1
    side = min(2 * reach + 1, height, width)
    left = np.clip(np.floor(x).astype(int) - reach, 0, width - side)
    top = np.clip(np.floor(y).astype(int) - reach, 0, height - side)
    grid = np.arange(side, dtype=np.float32) + 0.5  # pixel centres
    dx = (grid[None, :] + (left - x)[:, None]).astype(np.float32)[:, None, :]  # (f, 1, p)
    dy = (grid[None, :] + (top - y)[:, None]).astype(np.float32)[:, :, None]  # (f, p, 1)
    cos, sin = (t.astype(np.float32)[:, None, None] for t in (np.cos(angle), np.sin(angle)))
    wide, tall = ((radius * np.sqrt(s)).astype(np.float32)[:, None, None] for s in (1 / stretch, stretch))
    px, py = (cos * dx + sin * dy) / wide, (cos * dy - sin * dx) / tall  # (f, p, p), in radii
    scale = np.minimum(wide, tall)
    cover = np.clip(0.5 - SDFS[item.shape](px, py) * scale, 0, 1)[..., None]  # one pixel of soft edge
    paint = _paint(item, px, py, scale)
    for frame, top_, left_, alpha, colour in zip(frames, top, left, cover, paint, strict=True):
        patch = frame[top_ : top_ + side, left_ : left_ + side]
        patch[:] = patch + alpha * (colour - patch) + 0.5


def _paint(item: ObjectSpec, px: np.ndarray, py: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Colours, float32 (f, 1, 1, 3), or (f, p, p, 3) where the fill varies."""
    colour = np.array(COLOURS[item.colour], np.float32)
    if item.fill == "plain":
        return np.broadcast_to(colour, (len(px), 1, 1, 3))
    stripe = _square_wave(py, STRIPE_PERIOD, STRIPE_PHASE, scale)[..., None]
    return colour + stripe * (pale(item.colour) - colour)


def _square_wave(position: np.ndarray, period: float, phase: float, pixels: np.ndarray | float) -> np.ndarray:
    """0 and 1 by turns over each half period from 0 on, with edges one pixel wide; `pixels` is the unit in pixels."""
    within = np.abs((position / period + phase + 0.25) % 1 - 0.5)  # 0.25 at the edges
    return np.clip(0.5 + (within - 0.25) * period * pixels, 0, 1).astype(np.float32)


def _background(spec: ClipSpec) -> np.ndarray:
    """The still background, float32 (h, w, 3)."""
    first = np.array(BACKGROUNDS[spec.background], np.float32)
    share = _pattern(spec)[..., None]
    second = np.array(BACKGROUNDS[spec.second], np.float32) if spec.second else first
    return np.broadcast_to(first + share * (second - first), (spec.height, spec.width, 3))


def _pattern(spec: ClipSpec) -> np.ndarray:
    """Share of the second colour, (h, w) or broadcastable to it."""
    y = np.arange(spec.height, dtype=np.float32)[:, None] + 0.5
    x = np.arange(spec.width, dtype=np.float32)[None, :] + 0.5
    side = min(spec.height, spec.width)
    period, phase = side * spec.pattern_scale, spec.pattern_phase
    if spec.pattern == "plain":
        return np.zeros((1, 1), np.float32)
    if spec.pattern == "gradient":
        return y / spec.height
    if spec.pattern == "horizontal stripes":
        return _square_wave(y, period, phase, 1.0)
    if spec.pattern == "vertical stripes":
        return _square_wave(x, period, phase, 1.0)
    if spec.pattern == "checker":
        rows, columns = _square_wave(y, period, 0.0, 1.0), _square_wave(x, period, phase, 1.0)
        return rows + columns - 2 * rows * columns
    if spec.pattern == "dots":
        pitch = DOT_PITCH * side
        offset_y, offset_x = (t % pitch - pitch / 2 for t in (y, x))
        return np.clip(0.5 + DOT_RADIUS * side - np.hypot(offset_y, offset_x), 0, 1)
    raise ValueError(f"unknown pattern {spec.pattern!r}; choose one of {', '.join(PATTERNS)}")


# ---- drawing lots ----


def sample_spec(
    rng: np.random.Generator,
    frames: int = 49,
    height: int = 128,
    width: int = 192,
    fps: float = 8,
    two: float = 0.25,
    withheld: frozenset[tuple[str, str, str]] = frozenset(),
    only_withheld: bool = False,
    style: str | None = None,
    motions: Sequence[str] = MOTIONS,
) -> ClipSpec:
    """A random clip.

    Args:
        frames: with 1 nothing moves.
        two: share of clips with two shapes, which then differ in shape and colour and are not large.
        withheld: (shape, colour, motion) that no shape may show.
        only_withheld: every shape shows one of `withheld` instead.
        style: a name of `STYLES`; without it no clip shows what a style brings.
        motions: those of `MOTIONS` to draw from; `only_withheld` takes its own.

    Raises:
        ValueError: unknown style or motion; `only_withheld` without a list or where its motions cannot be shown.
    """
    if not motions or not set(motions) <= set(MOTIONS):
        raise ValueError(f"motions are {list(motions)}; choose one or more of {', '.join(MOTIONS)}")
    if only_withheld and (frames == 1 or not withheld):
        raise ValueError("only_withheld needs a withheld list, and more than one frame: its combinations name motions")
    if style is not None and style not in STYLES:
        raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLES)}")
    count = 1 + (rng.random() < two)
    pick = sorted(withheld) if only_withheld else None
    sizes = [name for name in tuple(SIZES)[: 3 if count == 1 else 2] if style is None or name in STYLES[style].sizes]
    objects: list[ObjectSpec] = []
    while len(objects) < count:
        item = _sample_object(rng, frames, sizes, motions, pick)
        if pick is None and frames > 1 and item.combination in withheld:
            continue
        if any(item.shape == other.shape or item.colour == other.colour for other in objects):
            continue
        objects.append(item)
    if style is not None:
        objects = [_restyle(item, style, frames) for item in objects]
    pattern, background, second = _sample_background(rng, objects)
    period, phase = _one_of(rng, PATTERN_PERIODS), _one_of(rng, PATTERN_PHASES)
    return ClipSpec(tuple(objects), pattern, background, second, period, phase, frames, height, width, fps)


def _sample_object(
    rng, frames: int, sizes: list[str], motions: Sequence[str], pick: list[tuple[str, str, str]] | None
) -> ObjectSpec:
    while True:
        if pick is not None:
            shape, colour, motion = pick[rng.integers(len(pick))]
        else:
            shape, colour = _one_of(rng, SHAPES), _one_of(rng, tuple(COLOURS))
            motion = _one_of(rng, motions) if frames > 1 else "still"
        if is_possible(shape, motion):
            break
    size = _one_of(rng, tuple(sizes))
    speed = "medium" if motion == "still" else _one_of(rng, SPEEDS)
    return ObjectSpec(shape, colour, size, motion, speed, (_unit(rng), _unit(rng)), _unit(rng))


def _restyle(item: ObjectSpec, name: str, frames: int) -> ObjectSpec:
    style = STYLES[name]
    motion = style.motion if style.motion and frames > 1 else item.motion
    return replace(item, shape=style.shape or item.shape, fill=style.fill, motion=motion)


def _sample_background(rng, objects: list[ObjectSpec]) -> tuple[str, str, str]:
    pattern = _one_of(rng, PATTERNS)
    while True:
        background = _one_of(rng, tuple(BACKGROUNDS))
        second = "" if pattern == "plain" else _one_of(rng, tuple(BACKGROUNDS))
        if background != second and all(
            stands_out(item.colour, pattern, background, second, item.fill) for item in objects
        ):
            return pattern, background, second


def _one_of(rng: np.random.Generator, values: tuple[T, ...]) -> T:
    return values[rng.integers(len(values))]


def _unit(rng: np.random.Generator) -> float:
    return round(float(rng.random()), 4)  # few digits, so that the record in JSON is the clip to the byte

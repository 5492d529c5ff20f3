"""What a clip of moving shapes shows, by image analysis alone: colours, shapes, sizes, motions, background.

Made for clips that a model has generated from a caption, so nothing here knows the caption. Colours are told by their
nearest name in CIELAB, shapes by templates at many angles, motions by the path, area and turning of the shape's mask.
f frames, h w pixels; masks are bool (f, h, w).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F

from tools.demo.attributes import BACKGROUNDS, COLOURS, DIRECTIONS, SIZES, lab, pale
from tools.demo.shapes import EXTENT, SDFS

NAMES = (*COLOURS, *BACKGROUNDS)  # of labels, shapes' colours first
BITS = 6  # colours are told apart on a grid of 64 steps a channel
FARTHEST = 36.0  # CIELAB distance beyond which a pixel has no shape's colour
LEAST_AREA = 0.0015  # of the frame, for something to be a shape
LEAST_SHARE = 0.05  # of the larger shape's area, for a second shape
GRID = 32  # samples across a template
REACH = 2.0  # of a template, in root mean square radii
ANGLES = 60
SHAPE_FRAMES = 9
MOVES = 0.04  # of the frame's shorter side: least way that counts as moving
GROWS = 0.45  # least change of log area that counts as growing
WIDEST_GAP = 32  # pixels between two stripes of the full colour
PALE, TINT = 0.35, 0.15  # of the way from a shape's colour to that of its pale stripes
WHITE = 1.12  # white lies at 1.25
ASIDE = 45.0  # most distance from that way, in RGB
STRIPED = 0.25  # least share of pale pixels inside a striped shape, beyond that outside
ITS_OWN = 0.8  # of a second colour's pixels, tints beside the first colour: then there is one shape
TURNS = 0.04  # least changed part of the mask that counts as turning


@dataclass(frozen=True)
class SeenShape:
    """A shape as measured; `motion` is None for a single frame. `radius` is a part of the frame's shorter side."""

    colour: str
    shape: str
    size: str
    motion: str | None
    radius: float
    likeness: float
    fill: str = "plain"


@dataclass(frozen=True)
class SeenGround:
    """A background as measured; `second` is "" for plain."""

    pattern: str
    background: str
    second: str


def measure(frames: np.ndarray) -> tuple[tuple[SeenShape, ...], SeenGround]:
    """Shapes (none to two, by falling area) and background of a clip, uint8 (f, h, w, 3)."""
    found = _without_tints(frames, _masks(frames, _shape_colours(frames)))
    fills, masks = [], []
    for colour, mask in found.items():
        stripes = _stripes(frames, colour, mask)
        fills.append("plain" if stripes is None else "striped")
        masks.append(mask if stripes is None else _opened(mask | stripes))
    seen = tuple(_measure_shape(*one) for one in zip(found, masks, fills, strict=True))
    return seen, _measure_ground(frames, masks)


# ---- colours and masks ----


@cache
def _distances() -> np.ndarray:
    """CIELAB distances from each cell of the colour grid to each name, float32 (64, 64, 64, names)."""
    steps = (np.arange(2**BITS, dtype=np.float32) + 0.5) * 2 ** (8 - BITS)
    cells = lab(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1))
    named = lab(np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32))
    return np.linalg.norm(cells[..., None, :] - named, axis=-1).astype(np.float32)


@cache
def _table(labels: tuple[int, ...]) -> np.ndarray:
    """Nearest of `labels` for each cell of the colour grid; shapes' colours only within FARTHEST."""
    distances = _distances()[..., labels].copy()
    is_shape = np.array(labels) < len(COLOURS)
    distances[..., is_shape] = np.where(distances[..., is_shape] > FARTHEST, np.inf, distances[..., is_shape])
    return np.array(labels, np.uint8)[distances.argmin(axis=-1)]


def _label(frames: np.ndarray, labels: tuple[int, ...]) -> np.ndarray:
    """Label of each pixel, uint8 of the leading shape."""
    cell = frames >> (8 - BITS)
    return _table(labels)[cell[..., 0], cell[..., 1], cell[..., 2]]


def _shape_colours(frames: np.ndarray) -> list[str]:
    """The colours of the one or two shapes, by falling area; thin lines (edges between other colours) do not count."""
    labels = _label(frames, tuple(range(len(NAMES))))
    areas = np.array([_eroded(labels == i).mean() for i in range(len(COLOURS))])
    order = [int(i) for i in np.argsort(-areas)[:2]]
    least = max(LEAST_AREA, LEAST_SHARE * areas[order[0]])
    return [NAMES[i] for i in order if areas[i] >= least]


def _masks(frames: np.ndarray, colours: list[str]) -> dict[str, np.ndarray]:
    """The mask of each colour, in their order."""
    labels = tuple(NAMES.index(colour) for colour in colours) + tuple(range(len(COLOURS), len(NAMES)))
    of_pixel = _label(frames, labels)
    return {colour: _opened(of_pixel == NAMES.index(colour)) for colour in colours}


def _without_tints(frames: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Blurred between red and its pale stripes lies pink, which is no second shape then."""
    for own, other in permutations(masks, 2):
        box = _surroundings(masks[own])
        paleness, aside = _paleness(frames[box], own)
        tints = (paleness > TINT) & (aside < ASIDE) & _dilated(masks[own][box], WIDEST_GAP // 2 + 1)
        if (tints & masks[other][box]).sum() > ITS_OWN * masks[other].sum():
            return _masks(frames, [own])
    return masks


def _stripes(frames: np.ndarray, colour: str, mask: np.ndarray) -> np.ndarray | None:
    """The pale stripes between those of the full colour, of a striped shape; None for a plain one.

    A pixel is pale by how far it is from the colour towards that of the stripes, which generated ones need not reach.
    They make a shape striped if they are so much more of its inside than of what is around.
    """
    box = _surroundings(mask)
    reach = _dilated(mask[box], WIDEST_GAP // 2)
    near = _eroded(reach, WIDEST_GAP // 2)
    paleness, aside = _paleness(frames[box], colour)
    tints = (paleness > PALE) & (paleness < WHITE) & (aside < ASIDE)
    if _covered(tints, _eroded(near, 2)) - _covered(tints, ~_dilated(near, 4)) < STRIPED:
        return None
    stripes = np.zeros_like(mask)
    stripes[box] = tints & reach
    return stripes


def _covered(mask: np.ndarray, region: np.ndarray) -> float:
    """Part of a region that the mask covers, in the middle one of the frames that have any of it."""
    areas = region.sum(axis=(1, 2))
    shares = (mask & region).sum(axis=(1, 2))[areas > 0] / areas[areas > 0]
    return float(np.median(shares)) if len(shares) else 0.0


def _paleness(frames: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel is on the way from a colour (0) to that of its stripes (1), and how far beside it."""
    colour_rgb = np.array(COLOURS[colour], np.float32)
    way, offset = pale(colour) - colour_rgb, frames - colour_rgb
    paleness = offset @ way / (way @ way)
    return paleness, np.linalg.norm(offset - paleness[..., None] * way, axis=-1)


def _surroundings(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Where the mask of any frame is, and some way around."""
    places = [np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1))]
    return (slice(None), *(slice(max(0, at[0] - WIDEST_GAP), at[-1] + WIDEST_GAP + 1) for at in places))


def _dilated(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Every pixel that has one of the mask's within `steps` rows and columns."""
    for axis in (1, 2):
        grown = mask.copy()
        for step in range(1, steps + 1):
            cut = [slice(None)] * 3
            ahead, behind = list(cut), list(cut)
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            grown[tuple(ahead)] |= mask[tuple(behind)]
            grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def _eroded(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    return ~_dilated(~mask, steps)


def _opened(mask: np.ndarray) -> np.ndarray:
    """The mask without specks and lines thinner than three pixels, its corners kept."""
    return mask & _dilated(_eroded(mask), 2)


# ---- shapes ----


def _measure_shape(colour: str, mask: np.ndarray, fill: str) -> SeenShape:
    areas = mask.sum(axis=(1, 2)).astype(float)
    shape, likeness = _classify_shape(mask, areas)
    side = min(mask.shape[1:])
    present = areas[areas > 0]
    radius = float(np.exp(np.log(present / _unit_area(shape)).mean() / 2)) / side
    size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    motion = _classify_motion(mask, areas) if len(mask) > 1 else None
    return SeenShape(colour, shape, size, motion, radius, likeness, fill)


def _classify_shape(mask: np.ndarray, areas: np.ndarray) -> tuple[str, float]:
    """The most similar shape, and how similar (1 is equal), over the frames where it is largest."""
    names, templates = _templates()
    count = min(SHAPE_FRAMES, len(mask))
    largest = np.argsort(-areas)[: max(count, len(mask) // 2)]
    chosen = largest[np.linspace(0, len(largest) - 1, count).astype(int)]
    total = np.zeros(len(names))
    used = [mask[i] for i in chosen if areas[i] > 0]
    for one in used:
        likeness = templates @ _standardized(_sampled(one))
        total += likeness.reshape(len(names), ANGLES).max(axis=1)
    best = int(total.argmax())
    return names[best], float(total[best] / len(used))


def _sampled(mask: np.ndarray) -> np.ndarray:
    """The mask of one frame about its centre in units of its root mean square radius, float32 (GRID, GRID)."""
    ys, xs = np.nonzero(mask)
    centre = np.array([xs.mean(), ys.mean()])
    rms = np.sqrt(((xs - centre[0]) ** 2 + (ys - centre[1]) ** 2).mean() + 1 / 6)  # a pixel has a size of its own
    offsets = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    size = np.array(mask.shape[::-1])
    x, y = ((centre[i] + 0.5 + offsets * REACH * rms) / size[i] * 2 - 1 for i in range(2))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), axis=-1)[None]).float()
    image = torch.from_numpy(mask)[None, None].float()
    return F.grid_sample(image, grid, mode="bilinear", align_corners=False)[0, 0].numpy()


def _standardized(image: np.ndarray) -> np.ndarray:
    flat = image.ravel() - image.mean()
    return flat / (np.linalg.norm(flat) + 1e-9)


@cache
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and all shapes at all angles, standardized, float32 (names * ANGLES, GRID * GRID)."""
    rows = []
    steps = np.linspace(-EXTENT, EXTENT, 96, dtype=np.float32)
    x, y = np.meshgrid(steps, steps)
    for name in SDFS:
        for angle in 2 * np.pi * np.arange(ANGLES) / ANGLES:
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            drawn = SDFS[name](cos * x + sin * y, cos * y - sin * x) <= 0
            rows.append(_standardized(_sampled(drawn)))
    return tuple(SDFS), np.stack(rows).astype(np.float32)


@cache
def _unit_area(name: str) -> float:
    """Area of a shape of radius 1."""
    steps = np.linspace(-EXTENT, EXTENT, 400, dtype=np.float32)
    return float((SDFS[name](*np.meshgrid(steps, steps)) <= 0).mean() * (2 * EXTENT) ** 2)


# ---- motion ----


def _classify_motion(mask: np.ndarray, areas: np.ndarray) -> str:
    present = np.flatnonzero(areas > 0)
    if len(present) < 2:
        return "still"
    mask, areas = mask[present], areas[present]
    path = _centres(mask) / min(mask.shape[1:])  # (f, 2), in shorter sides
    path = _smoothed(path)
    ends = max(1, len(path) // 12)
    growth = np.log(areas[-ends:].mean() / areas[:ends].mean())
    spread = np.ptp(path, axis=0).max()
    if abs(growth) > GROWS and spread < 3 * MOVES:
        return "grow" if growth > 0 else "shrink"
    if spread < MOVES:
        return "rotate" if _turning(mask, areas) > TURNS else "still"
    way = path[-1] - path[0]
    length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    if np.linalg.norm(way) > 0.8 * length:
        return _direction(way)
    return "bounce" if np.ptp(path[:, 0]) < 0.35 * np.ptp(path[:, 1]) else "orbit"


def _centres(mask: np.ndarray) -> np.ndarray:
    """Centre of each frame's mask, x and y in pixels, (f, 2)."""
    area = mask.sum(axis=(1, 2))
    x = (mask.sum(axis=1) @ np.arange(mask.shape[2])) / area
    y = (mask.sum(axis=2) @ np.arange(mask.shape[1])) / area
    return np.stack([x, y], axis=1)


def _smoothed(path: np.ndarray) -> np.ndarray:
    """Mean of three neighbours: a mask's centre trembles by a fraction of a pixel."""
    padded = np.pad(path, ((1, 1), (0, 0)), mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _direction(way: np.ndarray) -> str:
    cosines = {name: np.dot(way, step) / np.linalg.norm(step) for name, step in DIRECTIONS.items()}
    return max(cosines, key=cosines.get)


def _turning(mask: np.ndarray, areas: np.ndarray) -> float:
    """Part of the shape that differs, at most, from the first frame; the shape is in one place."""
    window = max(1, len(mask) // 16)
    means = np.stack([mask[i : i + window].mean(axis=0) for i in range(0, len(mask) - window + 1, window)])
    return float(np.abs(means - means[0]).sum(axis=(1, 2)).max() / (2 * np.median(areas)))


# ---- background ----


def _measure_ground(frames: np.ndarray, masks: list[np.ndarray]) -> SeenGround:
    covered = np.zeros(frames.shape[:3], bool)
    for mask in masks:
        covered |= _dilated(mask, 3)
    image, known = _still_image(frames, covered)
    rows = _row_means(image, known)
    if _is_gradient(rows):
        top, bottom = _line_ends(rows)
        return SeenGround("gradient", _nearest_ground(top), _nearest_ground(bottom))
    labels = _label(image, tuple(range(len(COLOURS), len(NAMES))))
    counts = np.bincount(labels[known], minlength=len(NAMES))
    first, second = (int(i) for i in np.argsort(-counts)[:2])
    if counts[second] < 0.1 * counts.sum():
        return SeenGround("plain", NAMES[first], "")
    return SeenGround(_classify_pattern(_share(image, first, second), known), NAMES[first], NAMES[second])


def _still_image(frames: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of what is not covered, uint8 (h, w, 3), and where that is known, bool (h, w)."""
    free = ~covered
    count = free.sum(axis=0)
    total = np.einsum("fhwc,fhw->hwc", frames, free, dtype=np.float32)
    return (total / np.maximum(count, 1)[..., None] + 0.5).astype(np.uint8), count > 0


def _row_means(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean and deviation of each row that is known well enough: columns y in [0, 1], r, g, b, deviation; (rows, 5)."""
    height, width = known.shape
    rows = [
        [(y + 0.5) / height, *image[y][known[y]].mean(axis=0), image[y][known[y]].std(axis=0).mean()]
        for y in range(height)
        if known[y].sum() > width / 4
    ]
    return np.array(rows, np.float32).reshape(-1, 5)


def _is_gradient(rows: np.ndarray) -> bool:
    """Whether rows are of one colour each, and these lie on a line from top to bottom."""
    if len(rows) < 8 or np.median(rows[:, 4]) > 12:
        return False
    fitted = _line(rows)
    residual = np.sqrt(((rows[:, 1:4] - fitted) ** 2).sum(axis=1).mean())
    return bool(np.linalg.norm(fitted[-1] - fitted[0]) > 30 and residual < 12)


def _line(rows: np.ndarray) -> np.ndarray:
    basis = np.stack([np.ones(len(rows)), rows[:, 0]], axis=1)
    return basis @ np.linalg.lstsq(basis, rows[:, 1:4], rcond=None)[0]


def _line_ends(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis = np.stack([np.ones(len(rows)), rows[:, 0]], axis=1)
    offset, slope = np.linalg.lstsq(basis, rows[:, 1:4], rcond=None)[0]
    return offset, offset + slope


def _nearest_ground(rgb: np.ndarray) -> str:
    named = lab(np.array(list(BACKGROUNDS.values()), np.float32))
    return tuple(BACKGROUNDS)[int(np.linalg.norm(named - lab(np.clip(rgb, 0, 255)), axis=1).argmin())]


def _share(image: np.ndarray, first: int, second: int) -> np.ndarray:
    """How much each pixel is of the second colour rather than the first, 0 to 1, (h, w)."""
    ground = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)[[first, second]]
    way = ground[1] - ground[0]
    return np.clip(((image - ground[0]) @ way) / (way @ way), 0, 1)


def _classify_pattern(share: np.ndarray, known: np.ndarray) -> str:
    """Stripes, checker or dots: how much of the variation lies between rows, and between columns."""
    weights = known.astype(np.float32)
    mean = (share * weights).sum() / weights.sum()
    total = ((share - mean) ** 2 * weights).sum()
    between = []
    for axis in (1, 0):  # rows, columns
        count = weights.sum(axis=axis)
        of_line = (share * weights).sum(axis=axis) / np.maximum(count, 1)
        between.append(float((count * (of_line - mean) ** 2).sum() / total))
    if between[0] > 0.6 or between[1] > 0.6:
        return "horizontal stripes" if between[0] > between[1] else "vertical stripes"
    return "dots" if sum(between) > 0.2 else "checker"

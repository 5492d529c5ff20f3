"""What a demo clip can show: names, colours, and the records that describe one clip in full.

Shapes have vivid colours, backgrounds muted ones, and a shape never gets a background near its own colour, so that both
people and programs can tell them apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon")
COLOURS = {  # sRGB
    "red": (220, 36, 36), "orange": (248, 132, 16), "yellow": (252, 222, 40), "green": (28, 168, 66),
    "cyan": (36, 202, 218), "blue": (40, 88, 236), "purple": (142, 54, 204), "pink": (252, 122, 188),
}  # fmt: skip
BACKGROUNDS = {
    "black": (16, 16, 18), "white": (242, 242, 240), "gray": (126, 126, 126), "dark blue": (24, 32, 86),
    "dark green": (20, 62, 40), "brown": (90, 58, 36), "beige": (224, 206, 172), "light blue": (186, 212, 234),
}  # fmt: skip
PATTERNS = ("plain", "horizontal stripes", "vertical stripes", "checker", "dots", "gradient")
DIRECTIONS = {  # per motion: steps to the right and downwards
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
    "up left": (-1, -1), "up right": (1, -1), "down left": (-1, 1), "down right": (1, 1),
}  # fmt: skip
MOTIONS = (*DIRECTIONS, "bounce", "orbit", "rotate", "grow", "shrink", "still")
# Radius as a part of the frame's shorter side. Two medium shapes fit side by side in 2:3 even when they grow, and a
# small one still is five of the VAE's 8-pixel cells wide.
SIZES = {"small": 0.16, "medium": 0.215, "large": 0.29}
PATTERN_PERIODS = (0.25, 0.5)  # of stripes and checkers, in shorter sides: whole cells of the VAE, as are their halves
PATTERN_PHASES = (0.0, 0.5)  # which colour comes first
SPEEDS = ("slow", "medium", "fast")
ROUND = ("circle", "ring")  # turning these shows nothing

MIN_CONTRAST = 38.0  # CIELAB distance between a shape's colour and its background's
MIN_GRADIENT_CONTRAST = 26.0  # the same along a gradient's way, which may pass nearer
WITHHELD_FIELDS = ("shape", "colour", "motion")


STRIPED_SIZES = ("medium",)  # one size is learnt in minutes; a small shape's stripes are as wide as a cell of the VAE


@dataclass(frozen=True)
class Style:
    """A look that clips have on request only: what it changes of a shape, and the sizes that it comes in."""

    shape: str | None = None
    fill: str = "plain"
    motion: str | None = None
    sizes: tuple[str, ...] = tuple(SIZES)


STYLES = {
    "striped-heart": Style("heart", "striped", sizes=STRIPED_SIZES),
    "wobble": Style(motion="wobble"),
    "wobbling-striped-heart": Style("heart", "striped", "wobble", STRIPED_SIZES),
}


@dataclass(frozen=True)
class ObjectSpec:
    """One shape. `place` (x, y in [0, 1]) is where in the room that its motion leaves it; `phase` is in turns."""

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    place: tuple[float, float] = (0.5, 0.5)
    phase: float = 0.0
    fill: str = "plain"

    @property
    def combination(self) -> tuple[str, str, str]:
        """What a withheld list names."""
        return self.shape, self.colour, self.motion


@dataclass(frozen=True)
class ClipSpec:
    """A whole clip. Two objects stand left and right. `second` is the pattern's other colour, "" for plain.

    `pattern_scale` is the period of stripes and checkers as a part of the shorter side, `pattern_phase` in periods.
    """

    objects: tuple[ObjectSpec, ...]
    pattern: str = "plain"
    background: str = "black"
    second: str = ""
    pattern_scale: float = 0.5
    pattern_phase: float = 0.0
    frames: int = 49
    height: int = 128
    width: int = 192
    fps: float = 8

    @classmethod
    def from_dict(cls, fields: dict) -> ClipSpec:
        """The inverse of `dataclasses.asdict`, also after JSON."""
        objects = tuple(ObjectSpec(**{**o, "place": tuple(o["place"])}) for o in fields["objects"])
        return cls(**{**fields, "objects": objects})


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 (..., 3) to CIELAB under D65 (CIE 15:2004; IEC 61966-2-1)."""
    linear = np.asarray(rgb, np.float32) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def pale(colour: str) -> np.ndarray:
    """The other colour of a striped shape, sRGB 0..255, float32 (3,)."""
    own = np.array(COLOURS[colour], np.float32)
    return own + (255 - own) * np.float32(0.8)


@cache
def distance(colour: str, background: str, second: str = "", share: float = 0.0, stripes: bool = False) -> float:
    """CIELAB distance of a shape's colour, or of its pale stripes, to a background's, or to a mix of two of them."""
    ground = np.array(BACKGROUNDS[background], np.float32)
    if second:
        ground = ground + share * (np.array(BACKGROUNDS[second], np.float32) - ground)
    return float(np.linalg.norm(lab(pale(colour) if stripes else np.array(COLOURS[colour])) - lab(ground)))


def stands_out(colour: str, pattern: str, background: str, second: str, fill: str = "plain") -> bool:
    """Whether a shape of this colour, with its stripes, can be told from all of the background."""
    return all(
        _stands_out(partial(distance, colour, stripes=stripes), pattern, background, second)
        for stripes in ((False, True) if fill == "striped" else (False,))
    )


def _stands_out(away: Callable[..., float], pattern: str, background: str, second: str) -> bool:
    if away(background) < MIN_CONTRAST or (second and away(second) < MIN_CONTRAST):
        return False
    if pattern != "gradient":
        return True
    return min(away(background, second, share) for share in (0.2, 0.35, 0.5, 0.65, 0.8)) >= MIN_GRADIENT_CONTRAST


def is_possible(shape: str, motion: str) -> bool:
    """False where the motion would not be seen."""
    return not (motion == "rotate" and shape in ROUND)


def all_combinations() -> list[tuple[str, str, str]]:
    """Every (shape, colour, motion) that a clip without style can show."""
    return [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS if is_possible(s, m)]


def choose_withheld() -> list[tuple[str, str, str]]:
    """An eighth of all combinations, spread so evenly that every value, and every pair of values, stays in training."""
    shapes, colours = SHAPES, tuple(COLOURS)
    return [
        (s, c, m)
        for s, c, m in all_combinations()
        if (shapes.index(s) + 3 * colours.index(c) + 5 * MOTIONS.index(m)) % 8 == 4
    ]


def digest(combinations: Iterable[tuple[str, str, str]]) -> str:
    """SHA-256 of a list of combinations, whatever its order."""
    return hashlib.sha256(json.dumps(sorted(map(list, combinations))).encode()).hexdigest()


def write_withheld(path: Path) -> None:
    """Write the list that training must not see."""
    combinations = choose_withheld()
    lines = ",\n".join(f"    {json.dumps(c)}" for c in combinations)
    head = f'  "fields": {json.dumps(WITHHELD_FIELDS)},\n  "sha256": "{digest(combinations)}",\n'
    path.write_text(f'{{\n{head}  "combinations": [\n{lines}\n  ]\n}}\n')


def read_withheld(path: str | Path) -> frozenset[tuple[str, str, str]]:
    """Combinations of a withheld list. Raises ValueError when it was changed or names what does not exist."""
    content = json.loads(Path(path).read_text())
    combinations = frozenset(tuple(c) for c in content["combinations"])
    if tuple(content["fields"]) != WITHHELD_FIELDS or digest(combinations) != content["sha256"]:
        raise ValueError(f"{path} does not fit its own hash; make_dataset.py --write-withheld {path} writes it anew")
    unknown = sorted(combinations - set(all_combinations()))
    if unknown:
        raise ValueError(f"{path} names combinations that no clip shows: {unknown[:3]}")
    return combinations

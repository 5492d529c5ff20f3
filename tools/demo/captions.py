"""Sentences about demo clips, and what such a sentence says: a small grammar with synonyms, read both ways.

caption(spec, rng)   "A small red star slowly drifts to the left over a dark blue background."
parse(text)          the attributes that the sentence names
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tools.demo.attributes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, ClipSpec, ObjectSpec

SHAPE_WORDS = {
    **{shape: (shape,) for shape in SHAPES},
    "circle": ("circle", "disc"),
    "star": ("star", "five-pointed star"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "heart": ("heart",),
}
COLOUR_WORDS = {**{c: (c,) for c in COLOURS}, "purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
GROUND_WORDS = {**{c: (c,) for c in BACKGROUNDS}, "gray": ("gray", "grey"), "dark blue": ("dark blue", "navy blue")}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("", "medium-sized"),
    "large": ("large", "big", "huge"),
}
FILL_WORDS = {"plain": ("",), "striped": ("striped",)}
SPEED_WORDS = {
    "slow": ("slowly", "gently", "at a slow pace"),
    "medium": ("",),
    "fast": ("quickly", "rapidly", "at high speed"),
}
# Verbs as (finite, participle); a direction follows.
GOING = (
    ("moves", "moving"), ("drifts", "drifting"), ("glides", "gliding"), ("slides", "sliding"),
    ("travels", "travelling"), ("floats", "floating"),
)  # fmt: skip
WAYS = {
    "left": ("to the left", "left", "leftwards", "from right to left", "towards the left edge"),
    "right": ("to the right", "right", "rightwards", "from left to right", "towards the right edge"),
    "up": ("up", "upwards", "towards the top", "from bottom to top", "straight up"),
    "down": ("down", "downwards", "towards the bottom", "from top to bottom", "straight down"),
    "up left": ("to the upper left", "up and to the left", "diagonally up and left", "towards the top left corner"),
    "up right": ("to the upper right", "up and to the right", "diagonally up and right",
                 "towards the top right corner"),
    "down left": ("to the lower left", "down and to the left", "diagonally down and left",
                  "towards the bottom left corner"),
    "down right": ("to the lower right", "down and to the right", "diagonally down and right",
                   "towards the bottom right corner"),
}  # fmt: skip
# Motions that need no direction: (finite, participle).
DOING = {
    "bounce": (("bounces up and down", "bouncing up and down"), ("bounces like a ball", "bouncing like a ball"),
               ("hops on the spot", "hopping on the spot")),
    "orbit": (("moves in a circle", "moving in a circle"), ("orbits the middle", "orbiting the middle"),
              ("travels along a circular path", "travelling along a circular path"),
              ("goes round and round", "going round and round")),
    "rotate": (("rotates in place", "rotating in place"), ("spins", "spinning"),
               ("turns around its own centre", "turning around its own centre"), ("rotates", "rotating")),
    "grow": (("grows larger", "growing larger"), ("grows", "growing"), ("expands", "expanding"),
             ("gets bigger", "getting bigger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "becoming smaller")),
    "still": (("stays still", "staying still"), ("does not move", "not moving"),
              ("rests motionless", "resting motionless"), ("remains in place", "remaining in place")),
    "wobble": (("wobbles", "wobbling"), ("wobbles like jelly", "wobbling like jelly")),
}  # fmt: skip
# A pattern as a noun phrase; {a} and {b} are its colours.
GROUNDS = {
    "plain": ("a {a} background", "a plain {a} background"),
    "horizontal stripes": ("horizontal {a} and {b} stripes", "a background of {a} and {b} horizontal stripes"),
    "vertical stripes": ("vertical {a} and {b} stripes", "a background of {a} and {b} vertical stripes"),
    "checker": ("a {a} and {b} checkerboard", "a checkered background of {a} and {b} squares"),
    "dots": ("a {a} background with {b} dots", "{a} dotted with {b}"),
    "gradient": ("a gradient from {a} at the top to {b} at the bottom",
                 "a background that fades from {a} above to {b} below"),
}  # fmt: skip
PREPOSITIONS = ("over", "on", "against", "in front of")
GROUND_SENTENCES = ("The scene has {}", "Behind it all is {}", "It all happens on {}")
LINKS = (" while ", " and ", ", ")


@dataclass(frozen=True)
class Said:
    """What a caption says of one shape; None where it says nothing."""

    shape: str
    colour: str
    size: str
    motion: str | None
    speed: str
    fill: str


def caption(spec: ClipSpec, rng: np.random.Generator) -> str:
    """One of the many sentences that describe a clip."""
    finite = len(spec.objects) > 1 or spec.frames == 1 or rng.random() < 0.75
    parts = [_object(item, rng) + _motion(item, spec.frames, finite, rng) for item in spec.objects]
    scene = parts[0] if len(parts) == 1 else _one(rng, LINKS[:2] if spec.frames > 1 else LINKS[1:2]).join(parts)
    ground = _ground(spec, rng)
    where = f"{_one(rng, PREPOSITIONS)} {ground}"
    form = rng.integers(4)
    if form == 0:
        text = f"{where}, {scene}"
    elif form == 1:
        text = f"{scene}. {_one(rng, GROUND_SENTENCES).format(ground)}"
    else:
        text = f"{scene} {where}"
    return text[0].upper() + text[1:] + "." if form == 1 or rng.random() < 0.5 else text


def motion_caption(spec: ClipSpec, rng: np.random.Generator) -> str:
    """What a clip's shapes do, in one of many sentences: all that a model needs that is given the first frame.

    Of two shapes each is named by what tells it from the other.
    """
    if len(spec.objects) == 1 and rng.random() < 0.15:
        text = _motion(spec.objects[0], spec.frames, False, rng).strip()
    else:
        parts = [_subject(item, len(spec.objects) == 1, rng) + _motion(item, spec.frames, True, rng)
                 for item in spec.objects]  # fmt: skip
        text = _one(rng, LINKS[:2]).join(parts)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.6 else text


def _subject(item: ObjectSpec, alone: bool, rng: np.random.Generator) -> str:
    colour, shape = _one(rng, COLOUR_WORDS[item.colour]), _one(rng, SHAPE_WORDS[item.shape])
    named = (f"the {shape}", f"the {colour} {shape}", f"the {colour} one")
    return _one(rng, ("it", "it", "the shape", "the object", *named[:2]) if alone else named)


def _object(item: ObjectSpec, rng: np.random.Generator) -> str:
    words = (SIZE_WORDS[item.size], FILL_WORDS[item.fill], COLOUR_WORDS[item.colour], SHAPE_WORDS[item.shape])
    phrase = " ".join(word for word in (_one(rng, choice) for choice in words) if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _motion(item: ObjectSpec, frames: int, finite: bool, rng: np.random.Generator) -> str:
    """With a leading blank; empty for a picture."""
    if frames == 1:
        return ""
    if item.motion in DIRECTIONS:
        verb, rest = _one(rng, GOING)[0 if finite else 1], " " + _one(rng, WAYS[item.motion])
    else:
        verb, rest = _one(rng, DOING[item.motion])[0 if finite else 1], ""
    speed = _one(rng, SPEED_WORDS[item.speed])
    if not speed or item.motion == "still":
        return f" {verb}{rest}"
    if speed.endswith("ly") and rng.random() < 0.5:
        return f" {speed} {verb}{rest}"
    return f" {verb}{rest} {speed}"


def _ground(spec: ClipSpec, rng: np.random.Generator) -> str:
    first = _one(rng, GROUND_WORDS[spec.background])
    second = _one(rng, GROUND_WORDS[spec.second]) if spec.second else ""
    return _one(rng, GROUNDS[spec.pattern]).format(a=first, b=second)


def _one(rng: np.random.Generator, values):
    return values[rng.integers(len(values))]


# ---- reading ----


def parse(text: str) -> tuple[tuple[Said, ...], tuple[str, str, str]]:
    """Shapes, in order, and (pattern, background, second) that a caption names.

    Raises:
        ValueError: the text is not of this grammar.
    """
    plain = " ".join(text.lower().replace(".", " ").split())
    ground, start, end = _find_ground(plain)
    scene = plain[:start] + " | " + plain[end:]
    mentions = list(_MENTION.finditer(scene))
    if not mentions:
        raise ValueError(f"no shape is named in {text!r}")
    ends = [m.start() for m in mentions[1:]] + [len(scene)]
    said = tuple(_read_object(m, scene[m.end() : end_]) for m, end_ in zip(mentions, ends, strict=True))
    return said, ground


def _alternatives(table: dict[str, tuple[str, ...]]) -> tuple[dict[str, str], str]:
    """Word -> value, and a pattern for the words, longest first."""
    of_word = {word: value for value, words in table.items() for word in words if word}
    return of_word, "|".join(re.escape(word) for word in sorted(of_word, key=len, reverse=True))


_SIZE_OF, _SIZE = _alternatives(SIZE_WORDS)
_COLOUR_OF, _COLOUR = _alternatives(COLOUR_WORDS)
_SHAPE_OF, _SHAPE = _alternatives(SHAPE_WORDS)
_GROUND_OF, _GROUND = _alternatives(GROUND_WORDS)
_SPEED_OF, _SPEED = _alternatives(SPEED_WORDS)
_MOTION_OF, _MOTION = _alternatives(
    {**WAYS, **{motion: tuple(form for pair in pairs for form in pair) for motion, pairs in DOING.items()}}
)
_MENTION = re.compile(
    rf"\ban? (?:(?P<size>{_SIZE}) )?(?:(?P<fill>striped) )?(?P<colour>{_COLOUR}) (?P<shape>{_SHAPE})\b"
)
_GROUND_FORMS = [
    (pattern, re.compile(rf"\b{form.format(a=f'(?P<a>{_GROUND})', b=f'(?P<b>{_GROUND})')}\b"))
    # Plain ones last: "a white background" also begins "a white background with black dots".
    for pattern, forms in sorted(GROUNDS.items(), key=lambda entry: entry[0] == "plain")
    for form in forms
]


def _find_ground(text: str) -> tuple[tuple[str, str, str], int, int]:
    for pattern, form in _GROUND_FORMS:
        found = form.search(text)
        if found:
            words = found.groupdict()
            second = _GROUND_OF[words["b"]] if "b" in words else ""
            return (pattern, _GROUND_OF[words["a"]], second), found.start(), found.end()
    raise ValueError(f"no background is named in {text!r}")


def _read_object(mention: re.Match, rest: str) -> Said:
    motions = re.findall(rf"\b({_MOTION})\b", rest)
    speeds = re.findall(rf"\b({_SPEED})\b", rest)
    return Said(
        shape=_SHAPE_OF[mention["shape"]],
        colour=_COLOUR_OF[mention["colour"]],
        size=_SIZE_OF[mention["size"]] if mention["size"] else "medium",
        motion=_MOTION_OF[max(motions, key=len)] if motions else None,
        speed=_SPEED_OF[speeds[0]] if speeds else "medium",
        fill=mention["fill"] or "plain",
    )

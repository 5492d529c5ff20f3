"""One clip's meaning in any of very many wordings, for training and testing the text encoder.

    text = reword(random_spec(rng), rng)        # rng = random.Random(0)

A text may leave out what is as by default: red, medium in size and speed, still, on plain black. Of two shapes
`spec.objects` are the left and the right one; a text names the right one first only where it says which is which.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from tools.demo import words
from tools.demo.attributes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    PATTERNS,
    SIZES,
    SPEEDS,
    ClipSpec,
    ObjectSpec,
)
from tools.demo.attributes import SHAPES as ALL_SHAPES
from tools.demo.captions import FILL_WORDS, caption

SHAPES = (*ALL_SHAPES, "heart")  # with what the styles bring, since the encoder stays frozen in fine-tuning
ALL_MOTIONS = (*MOTIONS, "wobble")
FILLS = tuple(FILL_WORDS)
DEFAULT_COLOUR, DEFAULT_GROUND = "red", ("plain", "black")
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvwz"
T = TypeVar("T")


@dataclass(frozen=True)
class Chances:
    """How often a text has what."""

    caption: float = 0.3  # the captions' own grammar, instead of all that follows
    held: float = 0.0  # for each choice, the forms that training never sees
    opening: float = 0.25
    ending: float = 0.15
    sides: float = 0.35  # of two shapes, "on the left"; of one a tenth of it, where it means nothing
    unknown_verb: float = 0.08  # a made-up verb before a direction
    unknown_word: float = 0.03  # a made-up adjective
    adjective: float = 0.12
    typo: float = 0.12
    no_article: float = 0.15
    default: float = 0.3  # no words for what is as by default


TRAINING = Chances()
HELD_OUT = Chances(caption=0.0, held=0.6, typo=0.05, default=0.0)


def random_spec(rng: random.Random, two: float = 0.45) -> ClipSpec:
    """A clip whose attributes are drawn independently of each other, so that no combination is special.

    The defaults come more often than evenly, and so does one motion for both shapes, since texts have forms for these.
    """
    objects = [_random_object(rng) for _ in range(1 + (rng.random() < two))]
    if len(objects) == 2 and rng.random() < 0.12:
        objects[1] = replace(objects[1], motion=objects[0].motion, speed=objects[0].speed)
    if rng.random() < 0.06:
        return ClipSpec(tuple(objects), "plain", "black")
    pattern = pick(rng, PATTERNS)
    background, second = rng.sample(tuple(BACKGROUNDS), 2)
    return ClipSpec(tuple(objects), pattern, background, "" if pattern == "plain" else second)


def _random_object(rng: random.Random) -> ObjectSpec:
    motion = pick(rng, ALL_MOTIONS)
    speed = "medium" if motion == "still" else pick(rng, SPEEDS)
    fill = "striped" if rng.random() < 0.1 else "plain"
    return ObjectSpec(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), pick(rng, tuple(SIZES)), motion, speed, fill=fill)


def reword(spec: ClipSpec, rng: random.Random, chances: Chances = TRAINING) -> str:
    """One of the many texts that say what a clip shows."""
    if rng.random() < chances.caption:
        return caption(spec, np.random.default_rng(rng.getrandbits(32)))
    while True:
        writer = _Writer(rng, chances)
        text = writer.text(spec)
        if writer.used_held or not chances.held:
            return text


def pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[int(rng.random() * len(values))]


class _Writer:
    """One text: the choices all come from one generator."""

    def __init__(self, rng: random.Random, chances: Chances):
        self.rng, self.chances = rng, chances
        self.used_held = False

    def maybe(self, chance: float) -> bool:
        return self.rng.random() < chance

    def one(self, values: Sequence[T], held: Sequence[T] = ()) -> T:
        """One of the values, or at the chance for it one of those that training never sees."""
        if held and self.maybe(self.chances.held):
            chosen = pick(self.rng, held)
            self.used_held = self.used_held or chosen not in values
            return chosen
        return pick(self.rng, values)

    def frame(self, name: str) -> str:
        return self.one(getattr(words.TRAINED, name), getattr(words.HELD, name))

    def text(self, spec: ClipSpec) -> str:
        bare = (spec.pattern, spec.background) == DEFAULT_GROUND and self.maybe(self.chances.default)
        text = self.scene(spec) if bare else self.place(self.scene(spec), spec)
        if self.maybe(self.chances.opening):
            text = f"{self.frame('openings')} {text}"
        if self.maybe(self.chances.ending):
            text = f"{text}{self.one((', ', '. ', ' '))}{self.frame('endings')}"
        return self.finish(text)

    # ---- the whole ----

    def scene(self, spec: ClipSpec) -> str:
        """Shapes with their motions."""
        if len(spec.objects) == 1:
            somewhere = self.maybe(self.chances.sides / 10)
            return self.shape(spec.objects[0], self.side(self.one(("left", "right"))) if somewhere else "")
        left, right = spec.objects
        if (left.motion, left.speed) == (right.motion, right.speed) and self.maybe(0.6):
            return self.frame("both").format(m=self.moves(left)[2], a=self.noun(left), b=self.noun(right))
        if self.maybe(self.chances.sides):
            parts = [self.shape(left, self.side("left")), self.shape(right, self.side("right"))]
            if self.maybe(0.5):
                parts.reverse()
        else:
            parts = [self.shape(left), self.shape(right)]
        return self.frame("links").join(parts)

    def side(self, name: str) -> str:
        return self.frame("sides").format(l=name)

    def place(self, scene: str, spec: ClipSpec) -> str:
        """A scene with its background."""
        ground = self.ground(spec)
        form = self.frame("scenes")
        where = f"{self.frame('prepositions')} {ground}" if "{where}" in form else ""
        sentence = self.frame("ground_sentences").format(n=ground) if "{sentence}" in form else ""
        return form.format(scene=scene, ground=ground, where=where, sentence=sentence)

    def ground(self, spec: ClipSpec) -> str:
        a, b = (self.one(words.GROUND_COLOURS[c]) if c else "" for c in (spec.background, spec.second))
        return self.one(words.GROUNDS[spec.pattern], words.HELD_GROUNDS[spec.pattern]).format(a=a, b=b)

    def finish(self, text: str) -> str:
        """Slips of the pen, articles, capitals and the full stop."""
        if self.maybe(self.chances.no_article):
            text = re.sub(r"\b(an?|the) (?!(left|right|top|bottom|upper|lower)\b)", "", text)
        if self.maybe(self.chances.typo):
            text = self.mistype(text)
        if self.maybe(0.1):
            text = text.replace(",", "")
        if self.maybe(0.06):
            text = text.replace("-", " ")
        return self.one((str.capitalize, str.lower, str.upper, str.title))(text) + self.one((".", "", "", "!"))

    def mistype(self, text: str) -> str:
        """One letter of a longer word lost, doubled, swapped or changed."""
        long = list(re.finditer(r"[a-z]{5,}", text))
        if not long:
            return text
        word = pick(self.rng, long)
        i = word.start() + 1 + int(self.rng.random() * (len(word.group()) - 2))
        first, second = text[i], text[i + 1]
        slips = (second, first * 2 + second, second + first, pick(self.rng, VOWELS) + second)
        return text[:i] + self.one(slips) + text[i + 2 :]

    # ---- one shape ----

    def shape(self, item: ObjectSpec, place: str = "") -> str:
        """A shape with its motion; `place` is where it stands."""
        if item.motion == "still" and self.maybe(self.chances.default):
            return f"{self.noun(item)} {place}".rstrip()
        if self.maybe(0.1):
            return f"{self.noun(item, self.before(item))} {place}".rstrip()
        noun = self.noun(item)
        if place:
            noun = self.one((f"{place} {noun}", f"{place}, {noun}", f"{noun} {place}", f"{noun} {place}"))
        finite, participle, _ = self.moves(item)
        return self.frame("shapes").format(o=noun, f=finite, p=participle, s=self.one(("shape", "object", item.shape)))

    def noun(self, item: ObjectSpec, adjective: str = "") -> str:
        """Size, fill, colour and shape in one of the usual orders."""
        size, colour = self.one(words.SIZES[item.size]), self.colour(item.colour)
        shape = self.one(words.SHAPES[item.shape])
        fill = self.one(("striped", "stripy", "striped")) if item.fill == "striped" else ""
        extra = self.made_up() if self.maybe(self.chances.unknown_word) else ""
        if self.maybe(self.chances.adjective):
            extra = self.one(words.ADJECTIVES)
        if colour and self.maybe(0.12):
            after = self.one((f"in {colour}", f"that is {colour}", f"of {colour} colour", f"coloured {colour}"))
            phrase = " ".join(w for w in (extra, size, adjective, fill, shape, after) if w)
        else:
            before = [extra, size, fill, adjective, colour]
            if self.maybe(0.12):
                self.rng.shuffle(before)
            phrase = " ".join(w for w in (*before, shape) if w)
        article = self.one(("a", "a", "a", "a", "one", "the"))
        return f"{'an' if article == 'a' and phrase[0] in VOWELS else article} {phrase}"

    def colour(self, colour: str) -> str:
        """A word for it; for red, the default, sometimes none."""
        if colour == DEFAULT_COLOUR and self.maybe(self.chances.default / 4):
            return ""
        word = self.one(words.COLOURS[colour])
        return f"{self.one(words.MODIFIERS)} {word}" if self.maybe(0.06) else word

    def before(self, item: ObjectSpec) -> str:
        """The motion as an adjective: "slowly rotating"."""
        if item.motion in DIRECTIONS:
            verb = self.one(("moving", "drifting", "going", "flying"))
            way = item.motion.replace(" ", "-")
            phrase = f"{self.one((way, f'{way}wards', f'{way}ward'))} {verb}"
        else:
            phrase = self.one(words.BEFORE[item.motion])
        return f"{self.one(words.PREFIX_SPEED[item.speed])} {phrase}".strip()

    def moves(self, item: ObjectSpec) -> tuple[str, str, str]:
        """Finite, participle and plural form of what a shape does, with its speed."""
        forms, speed = self.action(item)
        if not speed:
            return forms
        if speed.endswith("ly") and self.maybe(0.45):
            return tuple(self.adverb(form, speed) for form in forms)
        return tuple(f"{form} {speed}" for form in forms)

    @staticmethod
    def adverb(form: str, speed: str) -> str:
        head, blank, rest = form.partition(" ")
        return f"{head} {speed}{blank}{rest}" if head in ("is", "are") else f"{speed} {form}"

    def action(self, item: ObjectSpec) -> tuple[tuple[str, str, str], str]:
        """Forms of the motion, and words for the speed, "" where the verb says it."""
        motion = item.motion
        if motion == "still" and self.maybe(0.4):
            return self.one(words.STILL_SENTENCES, words.HELD_STILL), ""
        if motion not in DIRECTIONS:
            forms = words.inflect(self.one(words.DO[motion], words.HELD_DO[motion]))
            return forms, "" if motion == "still" else self.speed(item.speed)
        vertical, _, side = motion.partition(" ")
        if vertical in words.RISE and self.maybe(0.2):
            rest = f" {self.one(words.ways(side, False))}" if side else ""
            return words.inflect(self.one(words.RISE[vertical]) + rest), self.speed(item.speed)
        verb, speed = self.verb(item.speed)
        way = self.one(words.ways(motion, False), words.ways(motion, True))
        forms = words.inflect(f"{verb} {way}")
        if verb == "travel" and self.maybe(0.5):
            forms = (forms[0], forms[1].replace("travelling", "traveling"), forms[2])
        return forms, speed

    def speed(self, pace: str) -> str:
        return self.one(words.SPEEDS[pace], words.HELD_SPEEDS[pace])

    def verb(self, pace: str) -> tuple[str, str]:
        """A verb of going, and the words for the speed that it still needs."""
        quick = {"fast": words.GO_FAST, "slow": words.GO_SLOW}.get(pace)
        if quick and self.maybe(0.15):
            return self.one(quick), self.speed(pace) if self.maybe(0.3) else ""
        if self.maybe(self.chances.unknown_verb):
            return self.made_up(), self.speed(pace)
        return self.one(words.GO, words.HELD_GO), self.speed(pace)

    def made_up(self) -> str:
        """A word that does not exist."""
        letters: Callable[[], str] = lambda: pick(self.rng, CONSONANTS) + pick(self.rng, VOWELS)  # noqa: E731
        return "".join(letters() for _ in range(self.one((1, 2, 2, 3)))) + pick(self.rng, CONSONANTS)

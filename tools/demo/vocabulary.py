"""Write the words that the demo model knows, for `args.vocabulary`: `vocabulary.py configs/parts/demo_words.yaml`.

Shapes, colours, backgrounds and motions are those of its clips; their words, and all others, those that its text
encoder was trained with.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import write_text
from sgm.inference.vocabulary import Kind, Vocabulary
from tools.demo import words
from tools.demo.attributes import BACKGROUNDS, COLOURS, MOTIONS, PATTERNS, SHAPES
from tools.demo.wordings import Chances, random_spec, reword

TEXTS = 40_000  # of which the words are collected
CHANCES = Chances(held=0.3, unknown_verb=0.0, unknown_word=0.0, typo=0.0)
GROUNDS = ("background", "backdrop", "ground", "scene", "canvas", "stripes", "striped", "checker", "checkerboard",
           "checkered", "chequered", "checked", "check", "dots", "dotted", "polka dots", "gradient")  # fmt: skip
LINES = ("horizontal", "vertical")
HEADER = (
    "# Words of prompts that the demo model knows, written by tools/demo/vocabulary.py; args.vocabulary names it.\n"
)
ADAPTERS = ["demo/i2v"]  # trained with the same words
SAID = {"bounce": "bouncing", "orbit": "circling", "rotate": "turning", "grow": "growing", "shrink": "shrinking",
        "still": "staying still"}  # fmt: skip


def collected(known: Vocabulary, seed: int = 0) -> set[str]:
    """Further words of very many wordings of what the model's clips show."""
    rng, found = random.Random(seed), set[str]()
    for _ in range(TEXTS):
        spec = random_spec(rng)
        objects = [item for item in spec.objects if item.shape in SHAPES and item.motion in MOTIONS]
        if len(objects) == len(spec.objects):
            spec = replace(spec, objects=tuple(replace(item, fill="plain") for item in objects))
            found |= {word.lower() for word in known.unknown(reword(spec, rng, CHANCES)) if "-" not in word}
    return found


def kinds() -> dict[str, dict[str, object]]:
    """The file's content."""

    def of(table: dict[str, tuple[str, ...]], names: object) -> list[str]:
        return sorted({word for name in names for word in table[name] if word})  # type: ignore[attr-defined]

    found: dict[str, dict[str, object]] = {
        "shapes": {"told": list(SHAPES), "words": of(words.SHAPES, SHAPES)},
        "colours": {"before": ["shapes"], "told": list(COLOURS), "words": of(words.COLOURS, COLOURS)},
        "backgrounds": {
            "before": ["grounds"], "told": list(BACKGROUNDS), "words": of(words.GROUND_COLOURS, BACKGROUNDS),
        },
        "grounds": {"words": list(GROUNDS)},
        "adjectives": {
            "before": ["shapes", "grounds"],
            "words": sorted({*of(words.SIZES, words.SIZES), *words.ADJECTIVES, *words.MODIFIERS, *LINES}),
        },
        "patterns": {"told": [name for name in PATTERNS if name != "plain"], "words": ["squares"]},
        "motions": {"told": [SAID.get(name, name) for name in MOTIONS], "words": []},
    }  # fmt: skip
    known = Vocabulary(tuple(Kind.parse(name, value, Path("it")) for name, value in found.items()))
    found["others"] = {"words": sorted(collected(known))}
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FILE", help="YAML file to write")
    options = parser.parse_args(arguments)
    import yaml

    content = {**kinds(), "adapters": ADAPTERS}
    text = yaml.safe_dump(content, sort_keys=False, width=118, default_flow_style=None, allow_unicode=True)
    write_text(options.out, HEADER + text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Write prompts of the demo's kind, one a line, for a distillation or a test; no clips.

    python tools/demo/make_prompts.py prompts.txt --count 16000 --withheld tools/demo/withheld.json
    python tools/demo/make_prompts.py unseen.txt --count 64 --seed 9 --two 0 --other-words 1 --rotating 0 \
        --withheld tools/demo/withheld.json --only-withheld --meant unseen.jsonl

Prompt i depends on the seed, i and the options only. --meant writes what each says in the captions' grammar, for
`tools/demo/score.py --meant`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import SaveError, write_text
from tools.demo.attributes import read_withheld
from tools.demo.make_dataset import Options, Words, make_clip, other_words


def make_prompts(count: int, options: Options, rotating: float, words: Words) -> Iterator[tuple[str, str]]:
    """(prompt, what it says in the captions' grammar) of so many clips; in a share of them every shape turns."""
    turning = replace(options, motions=("rotate",))
    for index in range(count):
        is_turning = int((index + 1) * rotating) > int(index * rotating)
        spec, caption = make_clip(index, turning if is_turning else options)
        yield other_words(index, spec, options.seed, words) or caption, caption


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--count", type=int, default=1000, help="prompts (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--two", type=float, default=0.25, help="share of prompts with two shapes (0.25)")
    parser.add_argument("--rotating", type=float, default=0.25, help="share in which every shape turns (0.25)")
    parser.add_argument("--other-words", type=float, default=0.6, metavar="SHARE", help="share worded freely (0.6)")
    parser.add_argument("--held-out-words", action="store_true", help="of these, forms that no training text has")
    parser.add_argument("--withheld", type=Path, help="list of (shape, colour, motion) to leave out")
    parser.add_argument("--only-withheld", action="store_true", help="prompts of the withheld list only")
    parser.add_argument("--meant", type=Path, metavar="FILE", help="JSON Lines {prompt, caption} to write as well")
    args = parser.parse_args(arguments)
    if args.only_withheld and (args.withheld is None or args.rotating):
        parser.error("--only-withheld needs --withheld FILE and --rotating 0: the list names motions")
    if args.count < 1 or not all(0 <= share <= 1 for share in (args.two, args.rotating, args.other_words)):
        parser.error("--count must be positive, shares between 0 and 1")
    try:
        withheld = read_withheld(args.withheld) if args.withheld else frozenset()
        options = Options(seed=args.seed, two=args.two, withheld=withheld, only_withheld=args.only_withheld)
        words = Words(args.other_words, args.held_out_words)
        made = list(make_prompts(args.count, options, args.rotating, words))
        write_text(args.out, "".join(f"{prompt}\n" for prompt, _ in made))
        if args.meant:
            lines = (json.dumps({"prompt": prompt, "caption": caption}) for prompt, caption in made)
            write_text(args.meant, "".join(f"{line}\n" for line in lines))
    except (SaveError, OSError, ValueError) as error:
        print(f"make_prompts.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

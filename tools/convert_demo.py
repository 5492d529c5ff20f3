"""Refine prompts with a language model into the long captions that CogVideoX was trained on.

OPENAI_API_KEY=... python tools/convert_demo.py --prompt "a fox in the snow"
OPENAI_BASE_URL=http://localhost:8000/v1 python tools/convert_demo.py --model NAME \\
    --input-file wishes.txt --output-file captions.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from sgm.inference.refine import Endpoint

LONG_WORDS = 165  # about 226 tokens of T5, what the text encoder reads


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt; its caption is printed")
    source.add_argument("--input-file", type=Path, help="prompts, one a line")
    add("--output-file", type=Path, help="captions, one a line; written when all are there, else the run is continued")
    add("--model", help="name of the language model (default: gpt-4o)")
    add("--timeout", type=float, default=60.0, help="seconds for one answer")
    add("--retry", "--attempts", dest="attempts", type=int, default=4, help="tries per prompt")
    add("--jobs", type=int, default=4, help="requests at a time, for a file")
    add("--overwrite", action="store_true", help="replace an existing output file")
    options = parser.parse_args(arguments)
    if (options.input_file is None) != (options.output_file is None):
        parser.error("--input-file and --output-file go together")
    if options.attempts < 1 or options.jobs < 1 or options.timeout <= 0:
        parser.error("--retry and --jobs must be at least 1, --timeout above 0")
    return options


def is_long(caption: str) -> bool:
    """Whether a caption is probably longer than the text encoder reads."""
    return len(caption.split()) > LONG_WORDS


def refine_wish(wish: str, endpoint: Endpoint) -> str:
    """The caption of a prompt. Of `TEXT@@IMAGE` only the text is sent, and `@@IMAGE` stands behind the caption."""
    from sgm.inference.prompts import picture_apart
    from sgm.inference.refine import refine

    text, picture = picture_apart(wish)
    return refine(text, endpoint) + picture


def run(options: argparse.Namespace) -> int:
    from sgm.inference.refine import Endpoint, RefineError
    from tools.refine_file import refine_file

    endpoint = Endpoint.from_environment(options.model, timeout=options.timeout, attempts=options.attempts)
    if options.prompt is not None:
        if not options.prompt.strip():
            raise RefineError("--prompt is empty; write what the video shall show.")
        caption = refine_wish(options.prompt.strip(), endpoint)
        if is_long(caption):
            print("note: this caption may be longer than the 226 tokens that are read", file=sys.stderr)
        print(caption)
        return 0
    outcome = refine_file(
        options.input_file, options.output_file, endpoint, refine_wish, jobs=options.jobs, overwrite=options.overwrite,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    done = outcome.asked - len(outcome.failures)
    taken = f", {outcome.reused} taken over from an earlier run" if outcome.reused else ""
    if not outcome.failures:
        print(f"{done} prompts refined{taken}; written: {options.output_file}")
        return 0
    lines = ", ".join(map(str, sorted(outcome.failures)))
    print(f"error: {len(outcome.failures)} prompts failed (lines {lines}), {done} were refined{taken}. Nothing was "
          "written; the same command tries the failed ones again.", file=sys.stderr)  # fmt: skip
    return 2


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(
        lambda: run(options),
        "stopped; captions that are done are kept, the same command goes on from there",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

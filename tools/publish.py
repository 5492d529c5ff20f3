"""A trained adapter with its model card: written into a folder, and uploaded to the Hugging Face hub.

python tools/publish.py ckpts/lora-disney --repo OWNER/NAME --private
python tools/publish.py ckpts/lora-disney --out lora-disney-published    # nothing is uploaded
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="training run (also without date), iteration, or adapter file")
    add("--repo", metavar="NAME", help="OWNER/NAME or NAME on the hub (log in first: hf auth login)")
    add("--private", action="store_true", help="for you alone")
    add("--out", type=Path, metavar="FOLDER", help="folder to write; default: published/ in the run's folder")
    add("--samples", type=Path, nargs="+", default=[], metavar="PATH", help="clips, or output folders of sampling")
    add("--trigger", metavar="WORDS", help="words that call it up; default: those that nearly all captions have")
    add("--base", default="", metavar="NAME", help="the base on the hub; default: the published model that it fits")
    add("--lora_alpha", type=float, help="alpha of the training, if the file does not say (SAT: 1)")
    add("--overwrite", action="store_true", help="replace an existing folder")
    options = parser.parse_args(arguments)
    if options.private and not options.repo:
        parser.error("--private is of a repository: name it, --repo NAME")
    return options


def run(options: argparse.Namespace) -> None:
    from sgm.publish.publish import Publication, publish

    asked = Publication(
        options.run, options.repo, options.private, options.out, options.samples, options.trigger, options.base,
        options.lora_alpha, options.overwrite,
    )  # fmt: skip
    print("\n".join(publish(asked)))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options), "stopped; nothing was published")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

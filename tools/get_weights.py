"""A released model by its name on the hub: fetched, checked, converted to SAT's layout, with an infer.yaml beside.

python tools/get_weights.py zai-org/CogVideoX-2b
bash inference.sh --model NAME --prompt TEXT     # does the same at first use
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="OWNER/NAME[@REVISION]", help="zai-org/CogVideoX-2b, for example")
    add("--output_path", type=Path, help="folder to write; default: weights/OWNER/NAME")
    add("--keep_download", action="store_true", help="leave the diffusers files beside it, as NAME.download")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from sgm.hub.release import HubError, Wish, get_release

    if options.output_path and len(options.models) > 1:
        raise HubError("--output_path is of one model; fetch the others by commands of their own.")
    for name in options.models:
        print(get_release(Wish(name, options.output_path, options.keep_download)))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options), "stopped; what has come is kept, and the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What is this weight file? Family, sizes, types, LoRA rank, iteration, odd keys, hash: `inspect_weights.py PATH ...`.

Takes .pt, .bin and safetensors files, SAT checkpoints and diffusers folders; files that could run code are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
    parser.add_argument("--no_hash", action="store_true", help="do not read the whole file for its SHA-256")
    options = parser.parse_args(arguments)

    from sgm.cli import BAD_INPUT, report
    from sgm.convert.inspect import inspect
    from sgm.errors import SgmError

    status = 0
    for path in options.paths:
        try:
            for found in inspect(path, with_hash=not options.no_hash):
                print("\n".join(found.lines()))
        except SgmError as error:
            report(error)
            status = BAD_INPUT
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

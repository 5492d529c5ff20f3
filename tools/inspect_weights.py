"""What is this weight file? Family, sizes, types, LoRA rank, iteration, odd keys, hash: `inspect_weights.py PATH ...`.

Takes .pt, .bin and safetensors files, SAT checkpoints and diffusers folders; files that could run code are refused.
--verify compares every file with the checksums that are in it or beside it, and says which have none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
    parser.add_argument("--no_hash", action="store_true", help="do not read the whole file for its SHA-256")
    parser.add_argument("--verify", action="store_true", help="is every file what was written?")
    options = parser.parse_args(arguments)

    from sgm.cli import BAD_INPUT, report
    from sgm.errors import SgmError
    from tools.describe_weights import inspect

    status = 0
    for path in options.paths:
        try:
            if options.verify:
                status = max(status, verify(path.expanduser()))
                continue
            for found in inspect(path, with_hash=not options.no_hash):
                print("\n".join(found.lines()))
        except SgmError as error:
            report(error)
            status = BAD_INPUT
    return status


def verify(path: Path) -> int:
    """Print whether a file, or each below a folder, is whole; the status is that of bad input where one is not.

    Raises:
        WeightsNotFoundError: no such file or folder.
    """
    from sgm.cli import BAD_INPUT
    from sgm.weights import WeightsNotFoundError

    if not path.exists():
        raise WeightsNotFoundError(f"no file or folder at {path}.")
    counts = Counter({"whole": 0, "damaged": 0, "not verifiable": 0})
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        for verdict, why in verdicts(file):
            counts[verdict] += 1
            print(f"{verdict}: {file}: {why}")
    print(f"{path}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    return BAD_INPUT if counts["damaged"] else 0


def verdicts(file: Path) -> Iterator[tuple[str, str]]:
    """(verdict, why) of a file; of a list of checksums, also of each file that it names and that is missing."""
    from sgm.errors import SgmError
    from sgm.weights.checksums import SUMS, read_sums

    try:
        by = compare(file)
        yield ("whole", ", ".join(by)) if by else ("not verifiable", "no checksum in it, and none beside it")
        for name in read_sums(file) if file.name == SUMS else ():
            if not (file.parent / name).exists():
                yield "damaged", f"{name} is missing"
    except SgmError as error:
        yield "damaged", str(error)


def compare(path: Path) -> list[str]:
    """The checksums that a file was compared with. Raises SgmError where one is another's."""
    from sgm.weights.checksums import check, listed_sum, stretches_of, verifying

    by = []
    with verifying() as submit:
        check(path, submit)
        if found := stretches_of(path):
            by.append(f"CRC-32 of {len(found)} parts")
    if (listed := listed_sum(path)) is not None:
        by.append(f"checksum in {listed[1]}")
    return by


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

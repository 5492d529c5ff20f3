"""Draw the demo's data folders, demo/clips/STYLE and demo/clips/plain, where they are not there yet.

    python tools/demo/clips.py demo/clips/striped-heart demo/clips/plain
    python tools/demo/clips.py --needed-by configs/demo_lora.yaml        # those that train_video.py would read

finetune.sh calls it with its own arguments behind --needed-by.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_video
from sgm.cli import Interrupts, exit_code
from sgm.errors import SgmError
from sgm.flags import run_config
from sgm.places import found_path
from sgm.training.options import TrainArgs

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "clips"
PLAIN = "plain"
COUNT = 64  # clips of a style, one shape each
PLAIN_COUNT = 80  # beside them, so that what the model knows stays


class ClipsError(SgmError):
    """The clips cannot be drawn: no such data set, or its folder cannot be written."""


def main(arguments: list[str] | None = None, listen: bool = False) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders directly below demo/clips")
    parser.add_argument("--needed-by", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="arguments of train_video.py")
    options = parser.parse_args(arguments)
    if listen:
        Interrupts().listen()
    return exit_code(lambda: draw(options.folders, options.needed_by), "stopped before the demo's clips were drawn")


def draw(folders: list[Path], needed_by: list[str] | None) -> None:
    """Draw what is missing of `folders`, and of what a training with the arguments `needed_by` reads.

    Raises:
        ClipsError: see `draw_demo_clips`; or one of `folders` is not the demo's.
    """
    for folder in folders:
        if not lies_in_clips(folder):
            raise ClipsError(f"{folder} is not below {os.path.relpath(FOLDER)}, where the demo's clips are drawn.")
    for folder in [*folders, *(demo_folders(needed_by) if needed_by is not None else [])]:
        if not folder.expanduser().exists():
            draw_demo_clips(folder)


def demo_folders(arguments: list[str]) -> list[Path]:
    """The demo's data folders that `train_video.py` with these arguments reads; what is wrong it says itself."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            options = train_video.parse(arguments)
            config = run_config(options, TrainArgs, train_video.SHIPPED, train_video.DEMO)
    except (SystemExit, SgmError):
        return []
    named = [] if options.dry_run else config.args.data_folders
    return [folder for folder in map(Path, map(found_path, named)) if lies_in_clips(folder)]


def lies_in_clips(folder: Path) -> bool:
    return folder.expanduser().resolve().parent == FOLDER


def draw_demo_clips(folder: Path) -> None:
    """Draw the clips of a folder directly below demo/clips; it appears whole or not at all.

    Raises:
        ClipsError: the folder's name is no style, or it cannot be written.
    """
    from tools.demo.attributes import STYLES
    from tools.demo.make_dataset import Options, write_dataset

    folder = folder.expanduser().resolve()
    name = folder.name
    if name not in (PLAIN, *STYLES):
        raise ClipsError(f"demo/clips/{name} is no demo data set; there are {', '.join((PLAIN, *STYLES))}.")
    count = PLAIN_COUNT if name == PLAIN else COUNT
    print(f"drawing {count} clips into {os.path.relpath(folder)} (once)", file=sys.stderr, flush=True)
    options = Options() if name == PLAIN else Options(style=name, two=0.0)
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=FOLDER) as temporary:
            made = Path(temporary) / name
            for _ in write_dataset(made, count, options):
                pass
            os.replace(made, folder)
    except OSError as error:
        if not folder.is_dir():  # else another command drew the same clips at the same time and was first
            raise ClipsError(f"cannot draw the demo's clips into {folder}: {error.strerror or error}.") from error


if __name__ == "__main__":
    sys.exit(main(listen=True))

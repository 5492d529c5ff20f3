"""The demo's data folders, drawn when a run first asks for them: demo/clips/STYLE, and demo/clips/plain."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from sgm.data.report import DatasetError
from tools.demo.attributes import STYLES
from tools.demo.make_dataset import Options, write_dataset

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "clips"
PLAIN = "plain"
COUNT = 64  # clips of a style, one shape each
PLAIN_COUNT = 80  # beside them, so that what the model knows stays


def make_demo_clips(folder: Path) -> bool:
    """Draw the clips of a folder directly below demo/clips of this repository; False for any other folder.

    The folder appears whole or not at all.

    Raises:
        DatasetError: the folder's name is no style, or it cannot be written.
    """
    if folder.expanduser().resolve().parent != FOLDER:
        return False
    name = folder.name
    if name not in (PLAIN, *STYLES):
        raise DatasetError(f"demo/clips/{name} is no demo data set; there are {', '.join((PLAIN, *STYLES))}.")
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
        if folder.is_dir():  # another command drew the same clips at the same time and was first
            return True
        raise DatasetError(f"cannot draw the demo's clips into {folder}: {error.strerror or error}.") from error
    return True

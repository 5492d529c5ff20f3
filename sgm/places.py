"""Where files and folders that a configuration names are: from the current folder, else in the project."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# The folder that holds configs/ and demo/: the checkout, or the copy of both that lies in an installed package.
INSTALLED = (_PACKAGE / "shipped").is_dir()
PROJECT = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent
CONFIGS = PROJECT / "configs"
DEMO = "demo/"  # its clips and caches are made at first use, so they need not exist


def found_path(value: str) -> str:
    """`value`, or the same below the project's folder where only that exists.

    In a checkout also what does not exist yet and lies in its demo; into an installed package nothing is written.
    """
    below = PROJECT / value
    made_there = not INSTALLED and value.startswith(DEMO)
    if Path(value).expanduser().exists() or not (below.exists() or made_there):
        return value
    return str(below)


def real_path(value: str) -> str:
    """`value` without symbolic links, from the root, where it exists; else as it is (a name in a hub, for example)."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def lies_in_demo(path: str) -> bool:
    """Whether a path is below the demo folder, where things are made at first use: the checkout's, or one here."""
    home = Path.cwd() if INSTALLED else PROJECT
    return (home / DEMO) in Path(path).expanduser().absolute().parents


def shown(path: Path) -> str:
    """`path` from the current folder, if it lies in it; else the whole path."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative

"""Where files and folders that a configuration names are: from the current folder, else in the project."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# The folder that holds configs/ and demo/: the checkout, or the copy of both that lies in an installed package.
INSTALLED = (_PACKAGE / "shipped").is_dir()
PROJECT = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent
CONFIGS = PROJECT / "configs"
BUNDLED = "demo/"  # its clips and caches are made at first use, so they need not exist


def found_path(value: str) -> str:
    """`value`, or the same below the project's folder where only that exists or lies in the bundled demo."""
    below = PROJECT / value
    if Path(value).expanduser().exists() or not (below.exists() or value.startswith(BUNDLED)):
        return value
    return str(below)


def lies_in_demo(path: str) -> bool:
    """Whether a path is below the project's demo folder, where things are made at first use."""
    return (PROJECT / BUNDLED) in Path(path).expanduser().absolute().parents


def shown(path: Path) -> str:
    """`path` from the current folder, if it lies in it; else the whole path."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative

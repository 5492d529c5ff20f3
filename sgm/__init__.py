"""CogVideoX in SAT style: a YAML-driven text-to-video diffusion engine. Start reading at `sgm/models/diffusion.py`."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from sgm import lean_sat

if TYPE_CHECKING:
    from sgm.inference.model import TextToVideo
    from sgm.inference.video import Preview, StepReport, Video

__version__ = "0.1.0"
__all__ = ["Preview", "StepReport", "TextToVideo", "Video"]

lean_sat.install()
# Threads that wait for one another soon sleep. By default those of PyTorch's OpenMP spin for milliseconds, which keeps
# the one that they wait for from its core as soon as other programs run, too. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if sys.platform == "darwin":
    # DeepSpeed 0.19.8 takes the GPU of a Mac (its accelerator/real_accelerator.py), which nothing here uses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

_ROOMS = {"TextToVideo": "model", "Preview": "video", "StepReport": "video", "Video": "video"}


def __getattr__(name: str) -> object:
    """The Python interface, imported when it is asked for: all else here starts without it."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sgm.inference.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

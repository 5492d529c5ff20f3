"""Where Triton kernels run."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when a kernel is defined


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether a kernel can work on x: it lies on a GPU, or Triton's interpreter stands in for one."""
    return x.is_cuda or INTERPRETED

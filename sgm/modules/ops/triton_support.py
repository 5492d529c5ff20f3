"""Where Triton kernels run, and how they are launched."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it when a kernel is defined


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether a kernel can take x: it lies on a GPU, has no values (meta), or Triton's interpreter stands in."""
    return x.is_cuda or x.is_meta or INTERPRETED


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: object, **constants: object) -> None:
    """Run `kernel` on x's device. For x without values (meta) it is only compiled, for the current GPU.

    Args:
        kernel: a function under `triton.jit`.
        x, arguments: its arguments in their order.
        constants: compile-time ones, and `num_warps`.
    """
    if x.is_meta:
        kernel.warmup(x, *arguments, grid=grid, **constants)
        return
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, **constants)

"""Triton kernel for 8-bit linear layers: rows to e4m3 codes and scales in one pass, see `sgm.modules.ops.fp8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm.modules.ops.triton_support import launch


@triton.jit
def _quantize_rows_kernel(x, codes, scales, k, LARGEST: tl.constexpr, COLS: tl.constexpr):
    """A program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < k
    value = tl.load(x + row * k + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), axis=0), LARGEST)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + row, scale)
    code = tl.minimum(tl.maximum(tl.div_rn(value, scale), -LARGEST), LARGEST)
    tl.store(codes + row * k + cols, code.to(codes.dtype.element_ty), mask=inside)


def launch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (m, k), contiguous -> codes e4m3 (m, k) and scales float32 (m,)."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    cols = triton.next_power_of_2(k)
    launch(
        _quantize_rows_kernel, (m,), x, codes, scales, k, LARGEST=448.0, COLS=cols, num_warps=4 if cols <= 4096 else 8
    )
    return codes, scales

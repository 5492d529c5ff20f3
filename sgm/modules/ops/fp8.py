"""Linear layers in 8-bit floating point, for sampling: e4m3, that is 4 bits of exponent, 3 of mantissa, and 448 as the
largest value (Micikevicius et al. 2022, arXiv:2209.05433).

Each output channel of the weight and each token of the input has its own scale, so that its largest value becomes 448.
Weights are rounded once, inputs at every call. On a GPU the product runs on 8-bit tensor cores; elsewhere the same
rounded numbers are multiplied in float32, which defines the result.

m tokens, k input channels, n output channels.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.ops.triton_support import has_triton, runs_kernels
from sgm.typed import ConfigError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # what the GPU's product demands of k and n


def check_fp8(device: torch.device) -> None:
    """Refuse a GPU without 8-bit tensor cores. Raises ConfigError: naming the GPU."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        raise ConfigError(
            f"accelerate.fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell); "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}. Leave accelerate.fp8 out."
        )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(m, k) -> codes e4m3 (m, k) and scales float32 (m,), x = codes * scale up to rounding; rows of zeros stay so."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """codes (m, k) e4m3 times weight (n, k) e4m3 transposed, scaled back by (m,) and (n,): float32 (m, n)."""
    return F.linear(codes.float(), weight.float()) * scale[:, None] * weight_scale


def gpu_product(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`product` and the bias on 8-bit tensor cores, (m, n) in float16 or bfloat16. Sums have fewer bits than float32's:
    the fast accumulation of the hardware."""
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale[:, None],
        scale_b=weight_scale[None],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )


class Fp8Linear(nn.Module):
    """A linear layer x (..., k) -> (..., n) in the type of x, whose weight is kept in e4m3, one byte a value.

    Args:
        weight: (n, k) in any floating-point type.
        bias: (n,) or None; kept as it is.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        codes, scale = quantize_rows(weight.detach())
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_quickly(x.flatten(0, -2))
        if x.is_cuda:
            kind = _output_type(x.device, x.dtype)
            out = gpu_product(codes, scale, self.weight, self.weight_scale, self.bias, kind)
        else:
            out = product(codes, scale, self.weight, self.weight_scale)
            out = out if self.bias is None else out + self.bias.float()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


def quantize_quickly(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, in one pass where kernels run."""
    if not (runs_kernels(x) and has_triton()):
        return quantize_rows(x)
    from sgm.modules.ops.triton_block import launch_quantize_rows

    return launch_quantize_rows(x.contiguous())


@cache
def _output_type(device: torch.device, wanted: torch.dtype) -> torch.dtype:
    """The type that the GPU's product with a scale a row gives out: the wanted one where it can, else bfloat16."""
    if wanted == torch.bfloat16:
        return wanted
    codes = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(E4M3)
    scale = torch.ones(MULTIPLE, device=device)
    try:
        gpu_product(codes, scale, codes, scale, scale, wanted)
    except (RuntimeError, ValueError):  # libraries differ in which types they have
        return torch.bfloat16
    return wanted

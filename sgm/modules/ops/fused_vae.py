"""Fused forms of the VAE's operations, for GPUs and channels-last activations: one pass each, in float32.

Each function here takes and gives what its twin in `vae` does, and calls the twin where its kernel does not apply.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm.modules.ops import vae
from sgm.modules.ops.triton_support import runs_kernels
from sgm.modules.ops.triton_vae import channel_moments, launch_add_residual, launch_apply_field
from sgm.modules.ops.vae import AffineField

_KINDS = (torch.float16, torch.bfloat16, torch.float32)


def group_moments(x: Tensor, groups: int, budget: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One read of x and no copy of it, so `budget` has no part in it."""
    if not (_fits(x) and x.is_contiguous(memory_format=torch.channels_last_3d)):
        return vae.group_moments(x, groups, budget, bias)
    means, squares, counts = (part.double() for part in channel_moments(x))
    means = means if bias is None else means + bias
    total = counts.sum() * (x.shape[1] // groups)
    weights = counts[:, None, None]  # runs, groups, channels of a group
    means, squares = (part.unflatten(2, (groups, -1)) for part in (means, squares))
    mean = (means * weights).sum((1, 3)) / total
    apart = means - mean[:, None, :, None]
    variance = (squares + apart.square() * weights).sum((1, 3)) / total
    return mean.float(), variance.float()


def apply_field(x: Tensor, field: AffineField, *, swish: bool, out: Tensor | None = None) -> Tensor:
    scale, shift = field.scale, field.shift
    fits = _fits(x) and x.stride(1) == 1 and scale.dtype == shift.dtype == torch.float32
    wants_grad = torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad)
    result = torch.empty_like(x) if out is None and fits else out
    if not fits or wants_grad or result.stride(1) != 1:
        return vae.apply_field(x, field, swish=swish, out=out)
    shape = (x.shape[0], x.shape[1], *scale.shape[2:])
    parts = (part.expand(shape).contiguous(memory_format=torch.channels_last_3d) for part in (scale, shift))
    launch_apply_field(x, *parts, result, swish)
    return result


def convolve(conv: nn.Module, x: Tensor, bare: bool = False) -> Tensor:
    """The result is channels-last, as the kernels need it; cuDNN gives it so for channels-last weights."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return vae.convolve(conv, x, bare).contiguous(memory_format=layout)


def add_residual(h: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """One pass with the bias."""
    if bias is None or h.dtype != x.dtype or not (_fits(h) and _is_dense(h) and _is_dense(x)):
        return vae.add_residual(h, x, bias)
    launch_add_residual(h, x, bias)
    return h


def place(x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """One pass with the bias."""
    if bias is None or not _fits(x) or x.stride(1) != 1 or out.stride(1) != 1:
        return vae.place(x, out, bias)
    shift = bias.float()[None, :, None, None, None].expand(x.shape[0], -1, 1, 1, 1).contiguous()
    launch_apply_field(x, torch.ones_like(shift), shift, out, swish=False)


def _is_dense(x: Tensor) -> bool:
    """Channels-last without gaps within a sample, as a run of frames is."""
    _, c, _, h, w = x.shape
    return x.stride()[1:] == (1, h * w * c, w * c, c)


def _fits(x: Tensor) -> bool:
    return runs_kernels(x) and x.dtype in _KINDS and not (torch.is_grad_enabled() and x.requires_grad)

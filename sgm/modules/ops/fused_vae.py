"""Fused forms of the VAE's operations, for GPUs and channels-last activations: one pass each, in float32.

Each function here takes and gives what its twin in `vae` does, and calls the twin where its kernel does not apply.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from sgm.modules.ops import vae
from sgm.modules.ops.triton_support import runs_kernels
from sgm.modules.ops.triton_vae import channel_moments, launch_add_residual, launch_apply_field
from sgm.modules.ops.triton_vae_grad import field_gradients
from sgm.modules.ops.vae import AffineField

_KINDS = (torch.float16, torch.bfloat16, torch.float32)


def group_moments(x: Tensor, groups: int, budget: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One read of x and no copy of it, so `budget` has no part in it."""
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return vae.group_moments(x, groups, budget, bias)
    if _learns(x) and bias is None:
        return _Moments.apply(x, groups)
    return _moments(x, groups, bias) if _fits(x) else vae.group_moments(x, groups, budget, bias)


def _moments(x: Tensor, groups: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    if out is None and x.stride(1) == 1 and scale.dtype == shift.dtype == torch.float32 and _learns(x):
        return _Field.apply(x, scale, shift, swish)
    fits = _fits(x) and x.stride(1) == 1 and scale.dtype == shift.dtype == torch.float32
    wants_grad = torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad)
    result = torch.empty_like(x) if out is None and fits else out
    if not fits or wants_grad or result.stride(1) != 1:
        return vae.apply_field(x, field, swish=swish, out=out)
    launch_apply_field(x, *_dense_field(x, scale, shift), result, swish)
    return result


def _dense_field(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Both for every sample and channel of x, channels-last."""
    shape = (x.shape[0], x.shape[1], *scale.shape[2:])
    scale, shift = (part.expand(shape).contiguous(memory_format=torch.channels_last_3d) for part in (scale, shift))
    return scale, shift


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


# --- training in half precision: the twins of `vae.lean_moments` and `vae.lean_field` ------------------------------


def _learns(x: Tensor) -> bool:
    """Whether gradients are wanted and the kernels can give them."""
    return torch.is_grad_enabled() and runs_kernels(x) and x.dtype in (torch.float16, torch.bfloat16)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        mean, variance = _moments(x, groups)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        per_channel = x.shape[1] // mean.shape[1]
        count = x[0].numel() // mean.shape[1]
        slope = 2 / count * to_variance
        offset = to_mean / count - slope * mean
        slope, offset = (part.repeat_interleave(per_channel, 1)[:, :, None, None, None] for part in (slope, offset))
        result = torch.empty_like(x)
        launch_apply_field(x, *_dense_field(x, slope, offset), result, swish=False)
        return result, None


class _Field(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, shift: Tensor, swish: bool) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.swish = swish
        result = torch.empty_like(x, memory_format=torch.channels_last_3d)
        launch_apply_field(x, *_dense_field(x, scale, shift), result, swish)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, shift = ctx.saved_tensors
        grad = grad if grad.stride(1) == 1 else grad.contiguous(memory_format=torch.channels_last_3d)
        to_x, to_scale, to_shift = field_gradients(x, grad, *_dense_field(x, scale, shift), ctx.swish)
        return to_x, to_scale.sum_to_size(scale.shape), to_shift.sum_to_size(shift.shape), None

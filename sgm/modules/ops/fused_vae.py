"""Fused forms of the VAE's operations, for GPUs and channels-last activations: one pass each, in float32.

Each function here takes and gives what its twin in `vae` does, and calls the twin where its kernel does not apply.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgm.modules.ops import vae
from sgm.modules.ops.triton_support import runs_kernels
from sgm.modules.ops.triton_vae import (
    field_gradients,
    launch_add_residual,
    launch_apply_field,
    launch_group_moments,
    launch_join_phases,
    launch_norm_field,
)
from sgm.modules.ops.vae import SAME_FRAMES, AffineField, Conv, FrameMap, Modulation

_KINDS = (torch.float16, torch.bfloat16, torch.float32)


def group_moments(x: Tensor, groups: int, budget: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One read of x and no copy of it, so `budget` has no part in it."""
    if not x.is_contiguous(memory_format=torch.channels_last_3d):
        return vae.group_moments(x, groups, budget, bias)
    if _needs_gradient(x) and bias is None:
        return _Moments.apply(x, groups)
    return launch_group_moments(x, groups, bias) if _can_fuse(x) else vae.group_moments(x, groups, budget, bias)


def latent_field(
    moments: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    modulation: Modulation | None = None,
    added: Tensor | None = None,
) -> AffineField:
    """One pass, the modulation's convolutions included, which it keeps in float32."""
    if torch.is_grad_enabled() or not runs_kernels(moments[0]) or moments[0].dtype != torch.float32:
        return vae.latent_field(moments, weight, bias, eps, modulation, added)
    moments = (moments[0].contiguous(), moments[1].contiguous())
    scale, shift = launch_norm_field(moments, (weight, bias, eps), added, modulation)
    return AffineField(scale, shift, SAME_FRAMES if modulation is None else modulation.frame_map)


def apply_field(x: Tensor, field: AffineField, *, swish: bool, out: Tensor | None = None) -> Tensor:
    scale, shift = field.scale, field.shift
    if out is None and x.stride(1) == 1 and scale.dtype == shift.dtype == torch.float32 and _needs_gradient(x):
        return _Field.apply(x, scale, shift, swish, field.frame_map)
    fits = _can_fuse(x) and x.stride(1) == 1 and scale.dtype == shift.dtype == torch.float32
    wants_grad = torch.is_grad_enabled() and (scale.requires_grad or shift.requires_grad)
    if not fits or wants_grad or (out is not None and out.stride(1) != 1):
        return vae.apply_field(x, field, swish=swish, out=out)
    result = torch.empty_like(x) if out is None else out
    launch_apply_field(x, *_dense_field(x, scale, shift), result, swish, field.frame_map)
    return result


def _dense_field(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Both for every sample and channel of x, channels-last."""
    shape = (x.shape[0], x.shape[1], *scale.shape[2:])
    scale, shift = (part.expand(shape).contiguous(memory_format=torch.channels_last_3d) for part in (scale, shift))
    return scale, shift


def convolve(conv: Conv, x: Tensor, bare: bool = False, spare: Tensor | None = None) -> Tensor:
    """The result is channels-last, as the kernels need it; cuDNN gives it so for channels-last weights."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    weight, bias, channels = conv.weight, None if bare else conv.bias, conv.out_channels
    if torch.is_grad_enabled() or not runs_kernels(x):
        return vae.convolve(conv, x, bare).contiguous(memory_format=layout)
    if x.dtype in (torch.float16, torch.bfloat16) and (channels % 8 or x.shape[1] % 8) and conv.groups == 1:
        x, weight, bias = _padded_channels(conv, x, bias, layout)
    if bias is None and spare is not None and _writes_in_place(x, weight, spare, layout):
        return _convolve_into(conv, x, weight, spare)
    return conv._conv_forward(x, weight, bias)[:, :channels].contiguous(memory_format=layout)


def _padded_channels(
    conv: Conv, x: Tensor, bias: Tensor | None, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias of the same convolution with channels up to multiples of 8, which fast kernels ask for.

    What is added is zero, but where x gets channels one of them is of ones: its filter is the bias, at the middle of
    the kernel, which never lies on the zeros around a frame.
    """
    outs, ins = conv.weight.shape[:2]
    weight = _zeros((_round_up_to_8(outs), _round_up_to_8(ins), *conv.weight.shape[2:]), x, layout)
    weight[:outs, :ins] = conv.weight
    if ins == weight.shape[1]:
        return x, weight, None if bias is None else F.pad(bias, (0, weight.shape[0] - outs))
    wide = _zeros((x.shape[0], weight.shape[1], *x.shape[2:]), x, layout)
    wide[:, :ins] = x
    if bias is not None:
        wide[:, ins] = 1
        middle: tuple[slice | int, ...] = (slice(None), *(side // 2 for side in weight.shape[2:]))
        weight[:outs, ins][middle] = bias
    return wide, weight, None


def _zeros(shape: tuple[int, ...], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout).zero_()


def _round_up_to_8(channels: int) -> int:
    return -(-channels // 8) * 8


def _writes_in_place(x: Tensor, weight: Tensor, out: Tensor, layout: torch.memory_format) -> bool:
    """Whether cuDNN can convolve these straight into `out`: of one type, and in its layout without gaps."""
    if not torch.backends.cudnn.is_acceptable(x) or out.shape[1] != weight.shape[0]:
        return False
    return all(part.dtype == x.dtype and part.is_contiguous(memory_format=layout) for part in (x, weight, out))


def _convolve_into(conv: Conv, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    cudnn = torch.backends.cudnn
    exactly = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    settings = (conv.padding, conv.stride, conv.dilation, conv.groups, cudnn.benchmark, exactly, cudnn.allow_tf32)
    torch.ops.aten.cudnn_convolution.out(x, weight, *settings, out=out)
    return out


def add_residual(h: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """One pass with the bias."""
    if bias is None or h.dtype != x.dtype or not (_can_fuse(h) and _is_dense(h) and _is_dense(x)):
        return vae.add_residual(h, x, bias)
    launch_add_residual(h, x, bias)
    return h


def place(x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """One pass with the bias."""
    if bias is None or not _can_fuse(x) or x.stride(1) != 1 or out.stride(1) != 1:
        vae.place(x, out, bias)
        return
    shift = bias.float()[None, :, None, None, None].expand(x.shape[0], -1, 1, 1, 1).contiguous()
    launch_apply_field(x, torch.ones_like(shift), shift, out, swish=False)


def join_phases(parts: Tensor, out: Tensor, frame_map: FrameMap, bias: Tensor) -> None:
    """One pass."""
    if not _can_fuse(parts) or parts.stride(1) != 1 or out.stride(1) != 1:
        vae.join_phases(parts, out, frame_map, bias)
        return
    launch_join_phases(parts, out, frame_map, bias)


def _is_dense(x: Tensor) -> bool:
    """Channels-last without gaps within a sample, as a run of frames is."""
    _, c, _, h, w = x.shape
    return x.stride()[1:] == (1, h * w * c, w * c, c)


def _can_fuse(x: Tensor) -> bool:
    return runs_kernels(x) and x.dtype in _KINDS and not (torch.is_grad_enabled() and x.requires_grad)


# --- training in half precision: the twins of what `vae` has for it ---------------------------------------------


def _needs_gradient(x: Tensor) -> bool:
    """Whether gradients are wanted and the kernels can give them."""
    return torch.is_grad_enabled() and runs_kernels(x) and x.dtype in (torch.float16, torch.bfloat16)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        mean, variance = launch_group_moments(x, groups, None)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:
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
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, swish: bool, frame_map: FrameMap) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.swish, ctx.frame_map = swish, frame_map
        result = torch.empty_like(x, memory_format=torch.channels_last_3d)
        launch_apply_field(x, *_dense_field(x, scale, shift), result, swish, frame_map)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, scale, shift = ctx.saved_tensors
        grad = grad if grad.stride(1) == 1 else grad.contiguous(memory_format=torch.channels_last_3d)
        dense = _dense_field(x, scale, shift)
        to_x, to_scale, to_shift = field_gradients(x, grad, *dense, ctx.swish, ctx.frame_map)
        return to_x, to_scale.sum_to_size(scale.shape), to_shift.sum_to_size(shift.shape), None, None

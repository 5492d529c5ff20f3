"""Causal 3D convolution: frame k sees frames up to k, over one whole clip or over a clip in chunks.

Axes: b batch, c channels, t frames, h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sgm.modules.ops.vae import PLAIN, AffineField, VaeOps, frame_bytes, frame_spans

# A convolution whose input is larger is cut along time. 2 GiB is where the original cuts; the result is the same.
SLICE_BYTES = 2 << 30


class CausalCache:
    """The frames that causal convolutions saw last, carried from one chunk of a clip to the next.

    One cache belongs to one clip: make it, pass it to every chunk, drop it. Nothing is kept in the modules, so that a
    clip which was broken off cannot leave frames behind for the next one.

    Args:
        device: where the frames wait between chunks; None leaves them on the device where they arose.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self._frames: dict[nn.Module, Tensor] = {}

    def take(self, conv: nn.Module, like: Tensor) -> Tensor | None:
        """The frames kept for `conv`, on the device of `like`, and forget them; None if there are none."""
        frames = self._frames.pop(conv, None)
        return None if frames is None else frames.to(like.device)

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Keep `frames` (b, c, 2, h, w) for the next call of `conv`."""
        self._frames[conv] = frames if self.device is None else frames.to(self.device)

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        return sum(frames.nbytes for frames in self._frames.values())


@dataclass(frozen=True)
class ClipPass:
    """What one pass over a clip, or a chunk of it, hands from layer to layer.

    Attributes:
        cache: frames before this chunk; None: the clip is whole.
        last: no further chunk follows, so nothing is kept.
        slice_bytes: bound on the input and on the result of a convolution (its temporary copies are as large); longer
            ones are cut along time, with the same result.
        ops: implementation of the element-wise operations and reductions.
    """

    cache: CausalCache | None = field(default=None)
    last: bool = True
    slice_bytes: int = SLICE_BYTES
    ops: VaeOps = PLAIN


WHOLE_CLIP = ClipPass()


class CausalConv3d(nn.Module):
    """Conv3d with k - 1 frames put in front of the clip, none behind, and zeros around each frame.

    The frames in front are those that the cache holds from the chunk before, or else frame 0 repeated (Yu et al. 2023,
    "Language Model Beats Diffusion", causal 3D CNN). (b, c_in, t, h, w) -> (b, c_out, t, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        side = kernel_size // 2
        self.front = kernel_size - 1
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=(0, side, side))

    def forward(
        self,
        x: Tensor,
        run: ClipPass = WHOLE_CLIP,
        norm: AffineField | None = None,
        *,
        overwrite: bool = False,
        bare: bool = False,
    ) -> Tensor:
        """Convolve x, or swish(norm(x)) where `norm` is given; `bare` leaves the bias to the caller.

        `overwrite` lets the result of a cut convolution replace x (where shapes agree and no gradient is wanted).
        """
        front = run.cache.take(self, x) if run.cache is not None and self.front else None
        spans = [(0, x.shape[2])]
        if not torch.is_grad_enabled():
            spans = frame_spans(x.shape[2], self._frame_bytes(x), run.slice_bytes)
        if len(spans) == 1:
            staged = stage_frames(x, norm, front, self.front, self.conv.weight, run.ops)
            result = run.ops.convolve(self.conv, staged, bare)
            front = self._tail(staged)
        else:
            result, front = self._forward_cut(x, norm, front, spans, overwrite, bare, run.ops)
        if run.cache is not None and self.front and not run.last:
            run.cache.keep(self, front)
        return result

    def _forward_cut(
        self,
        x: Tensor,
        norm: AffineField | None,
        front: Tensor | None,
        spans: list[tuple[int, int]],
        overwrite: bool,
        bare: bool,
        ops: VaeOps,
    ) -> tuple[Tensor, Tensor]:
        """Runs of frames one after the other, each with the end of the one before in front. No gradients."""
        shape = (x.shape[0], self.conv.out_channels, *x.shape[2:])
        if overwrite and shape == x.shape:
            result = x
        else:
            result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(self.conv.weight))
        for start, stop in spans:
            part_norm = None if norm is None else norm.frames(start, stop)
            staged = stage_frames(x[:, :, start:stop], part_norm, front, self.front, self.conv.weight, ops)
            result[:, :, start:stop] = ops.convolve(self.conv, staged, bare)
            front = self._tail(staged)
        return result, front

    def _frame_bytes(self, x: Tensor) -> int:
        """Bytes of one frame of x or of the result, whichever is larger.

        The first convolution makes 128 channels of 3: at 49 x 480 x 720 its result in one go has more than 2^31
        values, which not every version of cuDNN can address.
        """
        widths = (self.conv.in_channels, self.conv.out_channels)
        return frame_bytes(x) * max(widths) // widths[0]

    def _tail(self, staged: Tensor) -> Tensor:
        """The last k - 1 staged frames; a copy, so that the staged frames can go (with gradients: a view)."""
        tail = staged[:, :, staged.shape[2] - self.front :]
        return tail if torch.is_grad_enabled() else tail.clone()


def stage_frames(
    x: Tensor, norm: AffineField | None, front: Tensor | None, count: int, weight: Tensor, ops: VaeOps = PLAIN
) -> Tensor:
    """[`count` frames of `front`, or of frame 0 repeated; then x or swish(norm(x))] along time, in one tensor.

    Without gradients the normalised frames are written straight to their place; `weight` gives the memory format.
    """
    if count == 0 and norm is None:
        return x
    if torch.is_grad_enabled():
        body = x if norm is None else ops.apply_field(x, norm, swish=True)
        # slices and not an expanded view, which would make `cat` forget the memory format
        before = [body[:, :, :1]] * count if front is None else [front]
        return torch.cat([*before, body], dim=2)
    b, c, t, h, w = x.shape
    staged = torch.empty((b, c, count + t, h, w), dtype=x.dtype, device=x.device, memory_format=layout_of(weight))
    body = staged[:, :, count:]
    if norm is None:
        body.copy_(x)
    else:
        ops.apply_field(x, norm, swish=True, out=body)
    staged[:, :, :count] = body[:, :, :1] if front is None else front
    return staged


def layout_of(tensor: Tensor) -> torch.memory_format:
    """channels_last_3d if a 5-D tensor (weight or activation) is stored so, else contiguous."""
    is_last = tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
    return torch.channels_last_3d if is_last else torch.contiguous_format

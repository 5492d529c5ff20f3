"""Causal 3D convolution: frame k sees frames up to k, over one whole clip or over a clip in chunks.

Between two chunks the frames seen last are kept on the device or in host memory: at 480x720 the decoder's convolutions
keep 2.6 GiB in half precision, more than all else that a careful pass needs. `HostCache` moves them through a stream of
their own: out while the next convolution computes, and back one ahead.

Axes: b batch, c channels, t frames, h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgm.modules.ops.vae import PLAIN, Activation, AffineField, VaeOps, frame_bytes, frame_spans

_FIRST_SLAB, _LARGEST_SLAB = 16 << 20, 512 << 20  # powers of two, which is what pinned memory is rounded up to
_ALIGN = 512


class CausalCache:
    """The frames that causal convolutions saw last, carried from one chunk of a clip to the next.

    One cache belongs to one clip: make it, pass it to every chunk, drop it. Nothing is kept in the modules, so that a
    clip which was broken off cannot leave frames behind for the next one.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def take(self, conv: nn.Module, x: Activation | None = None) -> Tensor | None:
        """The frames kept for `conv`, and forget them; None if there are none. `x` is what it is about to convolve."""
        return self._frames.pop(conv, None)

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Keep `frames` (b, c, 2, h, w) for the next call of `conv`; they must not be written to afterwards."""
        self._frames[conv] = frames

    def close(self) -> None:
        """Drop what is kept, also in the middle of a clip."""
        self._frames.clear()

    def __len__(self) -> int:
        return len(self._frames)


@dataclass(frozen=True)
class Transfer:
    """A copy under way: its result, its source (which has to live until then), and what tells when it is done."""

    result: Tensor
    source: Tensor
    done: torch.cuda.Event | None = None


class HostLink:
    """Copies between a GPU and pinned memory by a stream of their own, while the current stream computes.

    All device memory comes from, and goes back to, the computing stream, which has waited for the copy by then. So
    the order on that stream alone makes reuse safe, and the peak does not depend on how far the host runs ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device)
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def host_like(self, frames: Tensor) -> Tensor:
        """Host memory for `frames`, of the same shape, type and layout."""
        strides = torch.empty_like(frames, device="meta").stride()
        start = self._used
        if start + frames.nbytes > self._slab.numel():
            size = min(max(2 * self._slab.numel(), _FIRST_SLAB), _LARGEST_SLAB)
            self._slab = torch.empty(max(size, frames.nbytes), dtype=torch.uint8, pin_memory=True)
            start = 0
        self._used = start + -(-frames.nbytes // _ALIGN) * _ALIGN
        return self._slab[start : start + frames.nbytes].view(frames.dtype).as_strided(frames.shape, strides)

    def download(self, frames: Tensor, host: Tensor) -> Transfer:
        """Start to copy device frames, once they are computed, into `host`."""
        return self._copy(frames, host)

    def upload(self, host: Tensor) -> Transfer:
        """Start to copy `host`, once what is being written to it is there, to new memory on the device."""
        return self._copy(host, torch.empty_like(host, device=self.device))

    def wait(self, transfer: Transfer) -> None:
        """Whatever is computed from here on comes after the transfer."""
        if transfer.done is not None:
            torch.cuda.current_stream(self.device).wait_event(transfer.done)

    def _copy(self, source: Tensor, target: Tensor) -> Transfer:
        # behind all that computes now: it made the source, or used the target's memory before
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
        return Transfer(target, source, self.copies.record_event())


class HostCache(CausalCache):
    """A cache whose frames wait in host memory.

    On the device are, besides what was taken, the frames of two convolutions at most: those on their way out, until
    the next one begins, and those of the one that comes next, in the order in which frames were kept.
    """

    def __init__(self, link: HostLink):
        super().__init__()
        self.link = link
        self._hosts: dict[nn.Module, Tensor] = {}  # memory of every convolution so far, for all chunks
        self._next: dict[nn.Module, nn.Module] = {}  # what was kept after what
        self._last: nn.Module | None = None
        self._outgoing: Transfer | None = None
        self._incoming: tuple[nn.Module, Transfer] | None = None

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        self._release_outgoing()
        if conv not in self._hosts:
            self._hosts[conv] = self.link.host_like(frames)
            if self._last is not None:
                self._next[self._last] = conv
        self._last = conv
        self._frames[conv] = self._hosts[conv]
        self._outgoing = self.link.download(frames, self._hosts[conv])

    def take(self, conv: nn.Module, x: Activation | None = None) -> Tensor | None:
        self._release_outgoing()
        host = self._frames.pop(conv, None)
        if host is None:
            return None
        ahead, self._incoming = self._incoming, None
        transfer = ahead[1] if ahead is not None and ahead[0] is conv else self.link.upload(host)
        self.link.wait(transfer)
        following = self._next.get(conv)
        if following is not None and following in self._frames:
            self._incoming = (following, self.link.upload(self._frames[following]))
        return transfer.result

    def close(self) -> None:
        self._release_outgoing()
        if self._incoming is not None:
            self.link.wait(self._incoming[1])
        self._incoming = None
        super().close()

    def _release_outgoing(self) -> None:
        """Let the device copy of the frames kept last go, behind its transfer."""
        if self._outgoing is not None:
            self.link.wait(self._outgoing)
        self._outgoing = None


def cache_on(host: bool, device: torch.device) -> CausalCache:
    """A cache for work on `device`, with its frames in host memory where that is another memory."""
    return HostCache(HostLink(device)) if host and device.type == "cuda" else CausalCache()


# A convolution whose input is larger is cut along time. 2 GiB is where the original cuts; the result is the same.
SLICE_BYTES = 2 << 30
# Decoding has chunks of nine frames, which at 480x720 go uncut in half precision but where they are widest.
DECODE_SLICE_BYTES = 768 << 20
# On a CPU runs of frames that fit the last cache are faster, and the allocator reuses their memory: larger blocks are
# mapped anew each time, page by page.
CPU_SLICE_BYTES = 16 << 20


@dataclass(frozen=True)
class ClipPass:
    """What one pass over a clip, or a chunk of it, hands from layer to layer.

    Attributes:
        cache: frames before this chunk; None: the clip is whole.
        last: no further chunk follows, so nothing is kept.
        slice_bytes: bound on the input and on the result of a convolution (its temporary copies are as large); longer
            ones are cut along time, with the same result.
        ops: implementation of the element-wise operations and reductions.
        recompute: make the largest activation again where it is read rather than keep it (no gradients; exact).
    """

    cache: CausalCache | None = None
    last: bool = True
    slice_bytes: int = SLICE_BYTES
    ops: VaeOps = PLAIN
    recompute: bool = False


WHOLE_CLIP = ClipPass()


def frames_of(x: Activation, start: int, stop: int) -> Tensor:
    """Frames start .. stop - 1 of an activation that is there, or of one that is made when it is read."""
    return x[:, :, start:stop] if isinstance(x, Tensor) else x.frames(start, stop)


def all_frames(x: Activation) -> Tensor:
    """An activation that is there, made if it was not."""
    return x if isinstance(x, Tensor) else x.frames(0, x.shape[2])


def _mkldnn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type on this CPU."""
    if not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ClipConv3d(nn.Conv3d):
    """Conv3d that runs in oneDNN on a CPU, whatever the size of the clip.

    PyTorch itself leaves a single clip to a matrix product per frame of unfolded patches where b * c * t * h is at most
    20480 (width does not count), which takes up to ten times as long.
    """

    padding: tuple[int, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or not _mkldnn_supports(x.dtype):
            return super()._conv_forward(x, weight, bias)
        return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)


class CausalConv3d(nn.Module):
    """Conv3d with k - 1 frames put in front of the clip, none behind, and zeros around each frame.

    The frames in front are those that the cache holds from the chunk before, or else frame 0 repeated (Yu et al. 2023,
    "Language Model Beats Diffusion", causal 3D CNN). (b, c_in, t, h, w) -> (b, c_out, t, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        side = kernel_size // 2
        self.front = kernel_size - 1
        kind = ClipConv3d if kernel_size > 1 else nn.Conv3d
        self.conv = kind(in_channels, out_channels, kernel_size, padding=(0, side, side))

    def forward(
        self,
        x: Activation,
        run: ClipPass = WHOLE_CLIP,
        norm: AffineField | None = None,
        *,
        overwrite: bool = False,
        bare: bool = False,
    ) -> Tensor:
        """Convolve x, or swish(norm(x)) where `norm` is given; `bare` leaves the bias to the caller.

        `overwrite` lets the result replace x (where shapes agree and no gradient is wanted).
        """
        place: Tensor | None = None
        keeps_shape = self.conv.in_channels == self.conv.out_channels
        if overwrite and isinstance(x, Tensor) and keeps_shape and not torch.is_grad_enabled():
            place = x
        spans = [(0, x.shape[2])]
        if not torch.is_grad_enabled():
            spans = frame_spans(x.shape[2], self._frame_bytes(x), run.slice_bytes)
        if len(spans) == 1:
            whole, front = frames_of(x, *spans[0]), self._cached_front(x, run)
            staged = stage_frames(whole, norm, front, self.front, self.conv.weight, run.ops)
            del whole, front
            result = run.ops.convolve(self.conv, staged, bare, place)
            tail = staged[:, :, staged.shape[2] - self.front :]
        else:
            result, tail = self._forward_cut(x, norm, spans, place, bare, run)
        if run.cache is not None and self.front and not run.last:
            # a copy, so that the staged frames can go (with gradients: a view)
            run.cache.keep(self, tail if torch.is_grad_enabled() else tail.clone())
        return result

    def _forward_cut(
        self,
        x: Activation,
        norm: AffineField | None,
        spans: list[tuple[int, int]],
        place: Tensor | None,
        bare: bool,
        run: ClipPass,
    ) -> tuple[Tensor, Tensor]:
        """Runs of frames one after the other in one buffer, each behind the end of the one before. No gradients.

        Gives the result, written to `place` where there is one, and the last frames that were convolved.
        """
        layout, (b, c, t, h, w) = layout_of(self.conv.weight), x.shape
        longest = max(stop - start for start, stop in spans)
        staged = empty((b, c, self.front + longest, h, w), x, layout)
        result = empty((b, self.conv.out_channels, t, h, w), x, layout) if place is None else place
        for start, stop in spans:
            window = staged[:, :, : self.front + stop - start]
            if start == 0:
                continues = self._fill_front(window, x, run)
            part_norm = None if norm is None else norm.after(start)
            write_frames(window[:, :, self.front :], frames_of(x, start, stop), part_norm, run.ops)
            if start == 0 and not continues:
                window[:, :, : self.front] = window[:, :, self.front : self.front + 1]
            target = result[:, :, start:stop]
            part = run.ops.convolve(self.conv, window, bare, target)
            if part is not target:
                target.copy_(part)
            for k in range(self.front if stop < t else 0):  # one by one: source and target may overlap
                staged[:, :, k] = window[:, :, stop - start + k]
        return result, window[:, :, stop - start :]

    def _fill_front(self, window: Tensor, x: Activation, run: ClipPass) -> bool:
        """Bring the frames before this chunk to their place; False if there are none."""
        front = self._cached_front(x, run)
        if front is not None:
            window[:, :, : self.front] = front
        return front is not None

    def _cached_front(self, x: Activation, run: ClipPass) -> Tensor | None:
        """The frames before this chunk, out of the cache."""
        return run.cache.take(self, x) if run.cache is not None and self.front else None

    def _frame_bytes(self, x: Activation) -> int:
        """Bytes of one frame of x or of the result, whichever is larger.

        The first convolution makes 128 channels of 3: at 49 x 480 x 720 its result in one go has more than 2^31
        values, which not every version of cuDNN can address.
        """
        widths = (self.conv.in_channels, self.conv.out_channels)
        return frame_bytes(x) * max(widths) // widths[0]


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
    staged = empty((b, c, count + t, h, w), x, layout_of(weight))
    body = staged[:, :, count:]
    write_frames(body, x, norm, ops)
    staged[:, :, :count] = body[:, :, :1] if front is None else front
    return staged


def write_frames(out: Tensor, x: Tensor, norm: AffineField | None, ops: VaeOps) -> None:
    """Write x, or swish(norm(x)), into `out`, a view of its shape. No gradients."""
    if norm is None:
        out.copy_(x)
    else:
        ops.apply_field(x, norm, swish=True, out=out)


def empty(shape: tuple[int, ...], like: Activation, layout: torch.memory_format) -> Tensor:
    """Memory of the type of `like`, on its device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def layout_of(tensor: Tensor) -> torch.memory_format:
    """channels_last_3d if a 5-D tensor (weight or activation) is stored so, else contiguous."""
    is_last = tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
    return torch.channels_last_3d if is_last else torch.contiguous_format

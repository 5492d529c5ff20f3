"""Frames that causal convolutions saw last, between two chunks of a clip: on the device, or in host memory.

At 480x720 the decoder's convolutions keep 2.6 GiB in half precision, more than all else that a careful pass needs.
`HostCache` moves them through a stream of their own: out while the next convolution computes, and back one ahead.

Axes: b batch, c channels, h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgm.modules.ops.vae import Activation

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
    """Copies between a device and host memory. Here both are the CPU and a copy is done at once."""

    def host_like(self, frames: Tensor) -> Tensor:
        """Host memory for `frames`, of the same shape, type and layout."""
        return torch.empty_like(frames)

    def download(self, frames: Tensor, host: Tensor) -> Transfer:
        """Start to copy device frames, once they are computed, into `host`."""
        return Transfer(host.copy_(frames), frames)

    def upload(self, host: Tensor) -> Transfer:
        """Start to copy `host`, once what is being written to it is there, to new memory on the device."""
        return Transfer(host.clone(), host)

    def wait(self, transfer: Transfer) -> None:
        """Whatever is computed from here on comes after the transfer."""


class CudaLink(HostLink):
    """Copies by a stream of their own from and to pinned memory, while the current stream computes.

    All device memory comes from, and goes back to, the computing stream, which has waited for the copy by then. So
    the order on that stream alone makes reuse safe, and the peak does not depend on how far the host runs ahead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device)
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def host_like(self, frames: Tensor) -> Tensor:
        strides = torch.empty_like(frames, device="meta").stride()
        start = self._used
        if start + frames.nbytes > self._slab.numel():
            size = min(max(2 * self._slab.numel(), _FIRST_SLAB), _LARGEST_SLAB)
            self._slab = torch.empty(max(size, frames.nbytes), dtype=torch.uint8, pin_memory=True)
            start = 0
        self._used = start + -(-frames.nbytes // _ALIGN) * _ALIGN
        return self._slab[start : start + frames.nbytes].view(frames.dtype).as_strided(frames.shape, strides)

    def download(self, frames: Tensor, host: Tensor) -> Transfer:
        return self._copy(frames, host)

    def upload(self, host: Tensor) -> Transfer:
        return self._copy(host, torch.empty_like(host, device=self.device))

    def wait(self, transfer: Transfer) -> None:
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
    return HostCache(CudaLink(device)) if host and device.type == "cuda" else CausalCache()

"""Between host memory and a GPU: from a mapped file at the speed of the bus, back while the GPU goes on, and blocks of
weights that come to a device by turns, each while the one before it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

PIECE, PIECES = 32 << 20, 4  # bytes of a pinned buffer, and their number


class StagedCopy:
    """Copies through a ring of pinned buffers: while one piece is on the bus the next is read, by all CPU threads.

    The driver's own way from memory that is not pinned reads with one thread and does not overlap.

    Args:
        device: the target; where it is no GPU the buffers are not pinned and every copy is done at once.
    """

    def __init__(self, device: torch.device, piece: int = PIECE):
        self.device, self.piece = device, piece
        self._on_gpu = device.type == "cuda"
        self._ring: list[Tensor] = []
        self._sent: list[torch.cuda.Event | None] = [None] * PIECES
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy host tensor `source` into `target`, of the same shape and type, in order with the current stream."""
        if source.nbytes < self.piece // 8 or not (source.is_contiguous() and target.is_contiguous()):
            target.copy_(source)
            return
        to, of = (t.detach().reshape(-1).view(torch.uint8) for t in (target, source))
        for piece, part in zip(to.split(self.piece), of.split(self.piece)):
            self._send(piece, part)

    def _send(self, target: Tensor, source: Tensor) -> None:
        if not self._ring:
            self._ring = [torch.empty(self.piece, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(PIECES)]
        slot, self._next = self._next, (self._next + 1) % PIECES
        if (sent := self._sent[slot]) is not None:
            sent.synchronize()  # its last piece has left
        buffer = self._ring[slot][: source.numel()]
        buffer.copy_(source)
        target.copy_(buffer, non_blocking=True)
        if self._on_gpu:
            self._sent[slot] = torch.cuda.current_stream(self.device).record_event()


class Download:
    """A tensor on its way to the CPU. Who reads it waits for it, not for what was queued after it."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


_ALIGN = 512  # bytes; where tensors start in a block's buffer, as the CUDA allocator aligns them


@dataclass(frozen=True)
class HostBlock:
    """A block's tensors, their values on the host, and where each starts in a device buffer of `size` bytes.

    `flat` is the pinned image of that buffer, which `host` then views; None: the tensors lie where they were loaded.
    """

    tensors: list[Tensor]
    host: list[Tensor]
    offsets: list[int]
    size: int
    flat: Tensor | None

    @classmethod
    def of(cls, tensors: list[Tensor], pin: bool) -> HostBlock:
        host = [t.data for t in tensors]
        offsets, size = [], 0
        for value in host:
            offsets.append(size)
            size += -(-value.nbytes // _ALIGN) * _ALIGN
        if not pin:
            return cls(tensors, host, offsets, size, None)
        flat = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        views = [_view(flat, offset, value) for offset, value in zip(offsets, host)]
        for view, value in zip(views, host):
            view.copy_(value)
        return cls(tensors, views, offsets, size, flat)

    def upload(self, buffer: Tensor, stage: StagedCopy) -> None:
        """Copy into a device buffer, in order with the current stream; through `stage` where memory is not pinned."""
        if self.flat is not None:
            buffer[: self.size].copy_(self.flat, non_blocking=True)
            return
        for offset, value in zip(self.offsets, self.host):
            stage.copy(_view(buffer, offset, value), value)

    def point_at(self, buffer: Tensor | None) -> None:
        """Let the block's tensors be those of a device buffer, or the host's."""
        for tensor, offset, value in zip(self.tensors, self.offsets, self.host):
            tensor.data = value if buffer is None else _view(buffer, offset, value)


class TwoBuffers:
    """Host blocks, of which one at a time is used on the device and another is on its way there.

    The device holds two buffers, each as large as the largest block. While block k computes from one, the block after
    it is copied into the other on a second stream. A copy waits until the block that last used its buffer is done,
    however far the host has run ahead, so memory never grows past the two.

    Args:
        pin: copy from pinned images of the blocks, which pays where they are needed many times; else from where they
            lie, through a few pinned buffers.
    Raises:
        ValueError: two blocks share a tensor.
    """

    def __init__(
        self, blocks: Sequence[list[Tensor]], device: torch.device, pin: bool, stage: StagedCopy | None = None
    ):
        if len({id(t) for block in blocks for t in block}) < sum(len({id(t) for t in block}) for block in blocks):
            raise ValueError("two blocks share a tensor; it must lie outside the blocks to be streamed")
        self.device = device
        self.blocks: list[HostBlock] = []
        for block in blocks:
            self.blocks.append(HostBlock.of(block, pin))
            self.blocks[-1].point_at(None)  # a pinned copy replaces what was loaded, before the next one is made
        self.streams = Streams(device)
        self.buffers: list[Tensor] = []
        self._stage = stage or StagedCopy(device)
        self._holds: list[int | None] = [None, None]  # block that each buffer has, or is getting
        self._slot: int | None = None  # buffer of the block that is in use

    def open(self) -> None:
        """Take the buffers."""
        size = max(block.size for block in self.blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.streams.start()

    def close(self) -> None:
        """Give the buffers back: all blocks are on the host."""
        self._leave_slot()
        self.streams.finish()
        self.buffers, self._holds, self._slot = [], [None, None], None

    def use(self, k: int, following: int) -> None:
        """From here on block k is on the device, and the one before it is not; `following` is copied ahead."""
        other = 1 - (self._slot or 0)
        slot = self._holds.index(k) if k in self._holds else self._copy(k, other)
        if slot != self._slot:
            self._leave_slot()
            self.streams.await_copy(slot)
            self.blocks[k].point_at(self.buffers[slot])
            self._slot = slot
        if following not in self._holds:
            self._copy(following, 1 - slot)

    def _leave_slot(self) -> None:
        held = None if self._slot is None else self._holds[self._slot]
        if self._slot is not None and held is not None:
            self.blocks[held].point_at(None)
            self.streams.release(self._slot)

    def _copy(self, k: int, slot: int) -> int:
        """Start the copy of block k; returns its buffer."""
        self._holds[slot] = k
        self.streams.copy(slot, partial(self.blocks[k].upload, self.buffers[slot], self._stage))
        return slot


class Streams:
    """Order between the stream that computes, the current one, and the one that copies, for two buffers.

    Without a GPU all is in order, and PyTorch's streams of a CPU do nothing.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.api: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self.copies = self.api.Stream(device)
        self.copied, self.released = ([self.api.Event() for _ in range(2)] for _ in range(2))

    def start(self) -> None:
        """The buffers were just allocated, from memory that the computing stream may still be working on."""
        for slot in range(2):
            self.release(slot)

    def finish(self) -> None:
        """Wait for both streams, so that the buffers can go back to the allocator."""
        self.api.synchronize(self.device)

    def copy(self, slot: int, upload: Callable[[], None]) -> None:
        """Queue a copy into a buffer, behind the last use of that buffer."""
        self.copies.wait_event(self.released[slot])
        with self.api.stream(self.copies):
            upload()
        self.copied[slot].record(self.copies)

    def await_copy(self, slot: int) -> None:
        """What is computed from here on sees the last copy into a buffer."""
        self.api.current_stream(self.device).wait_event(self.copied[slot])

    def release(self, slot: int) -> None:
        """All that was computed so far comes before the next copy into this buffer."""
        self.released[slot].record(self.api.current_stream(self.device))


@contextmanager
def set_aside(tensors: Iterable[Tensor], device: torch.device, *, empty: bool = False) -> Iterator[None]:
    """Inside, tensors are stand-ins on `device` that take no memory there; moving their module leaves them alone.

    Args:
        empty: of no values at all, which can be sent between processes; else of the right shape, not to be read.
    """
    kept = [(tensor, tensor.data) for tensor in tensors]
    for tensor, value in kept:
        stand_in = torch.empty(0 if empty else 1, dtype=value.dtype, device=device)
        tensor.data = stand_in if empty else stand_in.expand(value.shape)
    try:
        yield
    finally:
        for tensor, value in kept:
            tensor.data = value


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of a byte buffer from `offset` on, as a contiguous tensor of `like`'s type and shape."""
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def frozen_parameters(block: Sequence[nn.Module]) -> list[Tensor]:
    """Those that do not learn, each once."""
    return list({id(p): p for part in block for p in part.parameters() if not p.requires_grad}.values())


class FrozenStream:
    """From now on the frozen weights of a network's blocks lie on the host, and come to `device` block by block.

    What learns, and what lies outside the blocks, is to be on `device`. Copies of the network that share its frozen
    parameters (`copy.deepcopy` with these in its memo) use the stream, too.

    Args:
        blocks: for each its modules, the one that is called first, in their order; as trained, they recompute their
            activations. Weights are taken from where they lie.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], device: torch.device, pin: bool):
        self.device, self.pinned = device, pin
        self.ring = TwoBuffers([frozen_parameters(block) for block in blocks], device, pin)
        self.ring.open()
        self._before = 0
        for k, block in enumerate(blocks):
            block[0].register_forward_pre_hook(lambda *_, k=k: self._use(k))

    def _use(self, k: int) -> None:
        following = next_block(k, self._before, len(self.ring.blocks), torch.is_grad_enabled())
        with _disable_current_modes():  # selective checkpointing would take the copies for part of the layer
            self.ring.use(k, following)
        self._before = k

    @property
    def host_bytes(self) -> int:
        """Of the weights on the host."""
        return sum(block.size for block in self.ring.blocks)

    @property
    def device_bytes(self) -> int:
        """Of the two blocks on the device."""
        return sum(buffer.nbytes for buffer in self.ring.buffers)

    def set_aside(self) -> AbstractContextManager[None]:
        """For who moves the module and sends its weights to other processes (DeepSpeed): here they have theirs."""
        return set_aside((t for block in self.ring.blocks for t in block.tensors), self.device, empty=True)


def next_block(k: int, before: int, count: int, recorded: bool) -> int:
    """Which of `count` blocks will be needed after block k, which comes after `before`.

    A recorded pass turns round at the last block, and its backward pass at the first one; others begin again.
    """
    if k == count - 1:
        return max(k - 1, 0) if recorded else 0
    return k - 1 if 0 < k < before else k + 1

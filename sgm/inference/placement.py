"""Where the parts lie while a video is made: all on the device, one at a time, or streamed layer by layer.

Weights never change while sampling, so a part is moved off the device by dropping the copy there: its host tensors
(which may be memory-mapped from the file) stay the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sgm.weights.staging import StagedCopy

_ALIGN = 512  # bytes; where tensors start in a block's buffer, as the CUDA allocator aligns them


class Resident:
    """Moves one module between its host tensors and a device (a copy, also where the device is the CPU)."""

    def __init__(self, module: nn.Module, device: torch.device, stage: StagedCopy | None = None):
        self.module = module
        self.device = device
        self._stage = stage or StagedCopy(device)
        self._moved: list[tuple[Tensor, Tensor]] = []

    def enter(self) -> None:
        for tensor in _tensors(self.module):
            host = tensor.data
            tensor.data = torch.empty_like(host, device=self.device)
            self._moved.append((tensor, host))
            self._stage.copy(tensor.data, host)

    def leave(self) -> None:
        for tensor, host in self._moved:
            tensor.data = host
        self._moved.clear()


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


class BlockStreamer:
    """Keeps a module's blocks on the host and brings each to the device for the time of its forward.

    The device holds two buffers, each as large as the largest block. While block k computes from one, block k+1 is
    copied into the other on a second stream: from a pinned copy of the blocks if `pin`, which pays where they are
    needed many times, else through a few pinned buffers. A copy waits until the block
    that last used its buffer is done, however far the host has run ahead, so memory never grows past the two.
    What lies outside the blocks goes to the device as a whole.

    Args:
        blocks: for each block its modules; the first one's forward is the trigger, in the order of the list.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[Sequence[nn.Module]],
        device: torch.device,
        pin: bool,
        stage: StagedCopy | None = None,
    ):
        self.device = device
        self._stage = stage or StagedCopy(device)
        parts = [_unique(t for part in block for t in _tensors(part)) for block in blocks]
        _check_disjoint(parts)
        streamed = {id(t) for block in parts for t in block}
        self.rest = [t for t in _tensors(module) if id(t) not in streamed]
        self.blocks = [HostBlock.of(block, pin) for block in parts]
        for block in self.blocks:
            block.point_at(None)  # a pinned copy replaces what was loaded
        self.triggers = [block[0] for block in blocks]
        self.streams = CudaStreams(device) if device.type == "cuda" else Streams()
        self.buffers: list[Tensor] = []
        self._rest_host: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._next_slot = 0  # buffer that the next copy goes to
        self._slot_in_use = 0  # buffer of the block that is computing
        self._prefetched: tuple[int, int] | None = None  # (block, buffer) copied ahead

    def enter(self) -> None:
        size = max(block.size for block in self.blocks)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self.streams.start()
        self._rest_host = [t.data for t in self.rest]
        for tensor, host in zip(self.rest, self._rest_host):
            tensor.data = torch.empty_like(host, device=self.device)
            self._stage.copy(tensor.data, host)
        for k, trigger in enumerate(self.triggers):
            self._hooks.append(trigger.register_forward_pre_hook(lambda *_, k=k: self._fetch(k)))
            self._hooks.append(trigger.register_forward_hook(lambda *_, k=k: self._release(k)))

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for tensor, host in zip(self.rest, self._rest_host):
            tensor.data = host
        for block in self.blocks:
            block.point_at(None)
        self.streams.finish()
        self._rest_host, self.buffers, self._prefetched = [], [], None

    def _copy(self, k: int) -> int:
        """Start the copy of block k; returns its buffer."""
        slot, self._next_slot = self._next_slot, 1 - self._next_slot
        self.streams.copy(slot, partial(self.blocks[k].upload, self.buffers[slot], self._stage))
        return slot

    def _fetch(self, k: int) -> None:
        block, slot = self._prefetched or (-1, -1)
        if block != k:
            slot = self._copy(k)
        self._prefetched = None
        self.streams.await_copy(slot)
        self.blocks[k].point_at(self.buffers[slot])
        self._slot_in_use = slot
        following = (k + 1) % len(self.blocks)
        self._prefetched = (following, self._copy(following))

    def _release(self, k: int) -> None:
        self.blocks[k].point_at(None)
        self.streams.release(self._slot_in_use)


class Streams:
    """Order between the stream that computes and the one that copies, for two buffers. On the CPU all is in order."""

    def start(self) -> None:
        """The buffers were just allocated, from memory that the computing stream may still be working on."""

    def finish(self) -> None:
        """Wait for both streams, so that the buffers can go back to the allocator."""

    def copy(self, slot: int, upload: Callable[[], None]) -> None:
        """Queue a copy into a buffer, behind the last use of that buffer."""
        upload()

    def await_copy(self, slot: int) -> None:
        """What is computed from here on sees the last copy into a buffer."""

    def release(self, slot: int) -> None:
        """All that was computed so far comes before the next copy into this buffer."""


class CudaStreams(Streams):
    """The computing stream is the current one; copies have a stream of their own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.copies = torch.cuda.Stream(device)
        self.copied = [torch.cuda.Event() for _ in range(2)]
        self.released = [torch.cuda.Event() for _ in range(2)]

    def start(self) -> None:
        for slot in range(2):
            self.release(slot)

    def finish(self) -> None:
        self.copies.synchronize()
        torch.cuda.current_stream(self.device).synchronize()

    def copy(self, slot: int, upload: Callable[[], None]) -> None:
        self.copies.wait_event(self.released[slot])
        with torch.cuda.stream(self.copies):
            upload()
        self.copied[slot].record(self.copies)

    def await_copy(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])

    def release(self, slot: int) -> None:
        self.released[slot].record(torch.cuda.current_stream(self.device))


class Placement:
    """Brings parts to the device when they are used: `all` stay there, `stages` take turns, `lean` streams blocks.

    On the CPU nothing has to move: every placement then only says whether the first stage saves memory.
    """

    def __init__(self, kind: str, device: torch.device):
        self.kind = kind
        self.device = device
        self._stage = StagedCopy(device)
        self._movers: dict[int, Resident | BlockStreamer] = {}

    @property
    def load_device(self) -> torch.device:
        """Where weights are loaded to: straight to the device if they stay there."""
        return self.device if self.kind == "all" else torch.device("cpu")

    @contextmanager
    def use(self, part: nn.Module, blocks: Sequence[Sequence[nn.Module]] = (), pin: bool = False) -> Iterator[None]:
        """`part` on the device for the time of the block; `lean` streams its `blocks` where it names some."""
        if self.device.type == "cpu" or self.kind == "all":
            yield
            return
        mover = self._movers.get(id(part))
        if mover is None:
            stream = self.kind == "lean" and len(blocks) > 1
            if stream:
                mover = BlockStreamer(part, blocks, self.device, pin, self._stage)
            else:
                mover = Resident(part, self.device, self._stage)
            self._movers[id(part)] = mover
        try:
            mover.enter()
            yield
        finally:
            mover.leave()
            torch.cuda.empty_cache()

    def forget(self, part: nn.Module) -> None:
        """Drop what is kept of a part that will not be used again."""
        self._movers.pop(id(part), None)


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of a byte buffer from `offset` on, as a contiguous tensor of `like`'s type and shape."""
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


def _check_disjoint(blocks: Sequence[Sequence[Tensor]]) -> None:
    seen: set[int] = set()
    for block in blocks:
        if any(id(t) in seen for t in block):
            raise ValueError("two blocks share a tensor; it must lie outside the blocks to be streamed")
        seen.update(id(t) for t in block)


def _tensors(module: nn.Module) -> list[Tensor]:
    return _unique([*module.parameters(), *module.buffers()])


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def peak_memory(device: torch.device) -> int:
    """Bytes: most memory that tensors took on a GPU, or this process's largest resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

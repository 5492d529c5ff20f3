"""Where the parts lie while a video is made: all on the device, one at a time, or streamed layer by layer.

Weights never change while sampling, so a part is moved off the device by dropping the copy there: its host tensors
(which may be memory-mapped from the file) stay the originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PLACEMENTS = ("all", "stages", "lean")


class Resident:
    """Moves one module between its host tensors and a device."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module = module
        self.device = device
        self._host: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(self) -> None:
        for tensor in _tensors(self.module):
            if tensor.device != self.device:
                self._host[id(tensor)] = (tensor, tensor.data)
                tensor.data = tensor.data.to(self.device, non_blocking=True)

    def leave(self) -> None:
        for tensor, host in self._host.values():
            tensor.data = host
        self._host.clear()


class BlockStreamer:
    """Keeps a module's blocks on the host and brings each to the device for the time of its forward.

    While block k computes, block k+1 is copied on a second stream (host memory is pinned for that, if `pin`).
    What lies outside the blocks goes to the device as a whole.

    Args:
        blocks: for each block its modules; the first one's forward is the trigger, in the order of the list.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[Sequence[nn.Module]], device: torch.device, pin: bool):
        self.device = device
        self.blocks = [_unique(t for part in block for t in _tensors(part)) for block in blocks]
        streamed = {id(t) for block in self.blocks for t in block}
        self.resident = [t for t in _tensors(module) if id(t) not in streamed]
        self.host = [[t.data.pin_memory() if pin else t.data for t in block] for block in self.blocks]
        self.rest = [t.data for t in self.resident]
        self.triggers = [block[0] for block in blocks]
        self.copies = torch.cuda.Stream(device)
        self.ready: list[tuple[list[Tensor], torch.cuda.Event] | None] = [None] * len(self.blocks)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def enter(self) -> None:
        for tensor, host in zip(self.resident, self.rest):
            tensor.data = host.to(self.device, non_blocking=True)
        for k, trigger in enumerate(self.triggers):
            self.hooks.append(trigger.register_forward_pre_hook(lambda *_, k=k: self._bring(k)))
            self.hooks.append(trigger.register_forward_hook(lambda *_, k=k: self._drop(k)))

    def leave(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.ready = [None] * len(self.blocks)
        for tensor, host in zip(self.resident, self.rest):
            tensor.data = host
        for k in range(len(self.blocks)):
            self._drop(k)

    def _copy(self, k: int) -> None:
        if self.ready[k] is None:
            with torch.cuda.stream(self.copies):
                copies = [host.to(self.device, non_blocking=True) for host in self.host[k]]
                self.ready[k] = (copies, self.copies.record_event())

    def _bring(self, k: int) -> None:
        self._copy(k)
        copies, event = self.ready[k]  # type: ignore[misc]
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor, copy in zip(self.blocks[k], copies):
            copy.record_stream(current)  # its memory is reused only after this stream is done with it
            tensor.data = copy
        self.ready[k] = None
        # The next copy may start only when the block before this one is done: two blocks on the device at most.
        self.copies.wait_stream(current)
        self._copy((k + 1) % len(self.blocks))

    def _drop(self, k: int) -> None:
        for tensor, host in zip(self.blocks[k], self.host[k]):
            tensor.data = host


class Placement:
    """Brings parts to the device when they are used, by one of `PLACEMENTS`.

    On the CPU nothing has to move: every placement then only says whether the first stage saves memory.
    """

    def __init__(self, kind: str, device: torch.device):
        self.kind = kind
        self.device = device
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
            mover = BlockStreamer(part, blocks, self.device, pin) if stream else Resident(part, self.device)
            self._movers[id(part)] = mover
        mover.enter()
        try:
            yield
        finally:
            mover.leave()
            torch.cuda.empty_cache()

    def forget(self, part: nn.Module) -> None:
        """Drop what is kept of a part that will not be used again."""
        self._movers.pop(id(part), None)


def _tensors(module: nn.Module) -> list[Tensor]:
    return _unique([*module.parameters(), *module.buffers()])


def _unique(tensors) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def peak_memory(device: torch.device) -> int:
    """Bytes: most memory that tensors took on a GPU, or this process's largest resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

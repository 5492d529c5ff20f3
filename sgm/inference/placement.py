"""Where the parts lie while a video is made: all on the device, one at a time, or streamed layer by layer.

Weights never change while sampling, so a part is moved off the device by dropping the copy there: its host tensors
(which may be memory-mapped from the file) stay the originals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sgm.weights.streaming import StagedCopy, TwoBuffers


class Resident:
    """Moves tensors between the host and a device (a copy, also where the device is the CPU)."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, stage: StagedCopy | None = None):
        self.tensors = tensors
        self.device = device
        self._stage = stage or StagedCopy(device)
        self._moved: list[tuple[Tensor, Tensor]] = []

    def enter(self) -> None:
        for tensor in self.tensors:
            host = tensor.data
            tensor.data = torch.empty_like(host, device=self.device)
            self._moved.append((tensor, host))
            self._stage.copy(tensor.data, host)

    def leave(self) -> None:
        for tensor, host in self._moved:
            tensor.data = host
        self._moved.clear()


class BlockStreamer:
    """Keeps a module's blocks on the host and brings each to the device for the time of its forward, see `TwoBuffers`.

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
        stage = stage or StagedCopy(device)
        parts = [_unique(t for part in block for t in _tensors(part)) for block in blocks]
        streamed = {id(t) for block in parts for t in block}
        self.rest = Resident([t for t in _tensors(module) if id(t) not in streamed], device, stage)
        self.ring = TwoBuffers(parts, device, pin, stage)
        self.triggers = [block[0] for block in blocks]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def enter(self) -> None:
        self.ring.open()
        self.rest.enter()
        for k, trigger in enumerate(self.triggers):
            following = (k + 1) % len(self.triggers)
            self._hooks.append(trigger.register_forward_pre_hook(lambda *_, at=(k, following): self.ring.use(*at)))

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.rest.leave()
        self.ring.close()


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
            if self.kind == "lean" and len(blocks) > 1:
                mover = BlockStreamer(part, blocks, self.device, pin, self._stage)
            else:
                mover = Resident(_tensors(part), self.device, self._stage)
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

"""Memory by count: the most bytes that tensors hold together while a block of code runs, on any device.

What an operation takes for itself and gives back before it returns (workspaces) is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that arises inside the block, once, from its birth to its end.

    Attributes:
        peak: the most bytes at a time.
        at_peak: sizes of the storages that were alive then, largest first.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.peak = 0
        self.at_peak: list[int] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which may be used again

        self._total = 0  # of those known, dead ones included until they are looked for

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for storage in self._storages((args, kwargs)):
            self._know(storage, 0)  # unless it is known already it comes from outside
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            self._know(storage, storage.nbytes())
        if self._total > self.peak:
            self._forget_dead()
        if self._total > self.peak:
            self.peak = self._total
            self.at_peak = sorted((size for _, size in self._alive.values() if size), reverse=True)
        return result

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        known = self._alive.get(storage._cdata)
        if known is None or known[0].expired():
            self._total += size - (known[1] if known else 0)
            self._alive[storage._cdata] = StorageWeakRef(storage), size

    def _forget_dead(self) -> None:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self._total = sum(size for _, size in self._alive.values())

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.device]

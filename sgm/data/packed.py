"""Long lists in arrays: forked workers share them, while a list's items are copied as their reference counts change."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np

T = TypeVar("T")


class Packed(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def item(self, index: int) -> T:
        """The item at `index` from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(k) for k in range(len(self))[index]]
        return self.item(range(len(self))[index])  # checks the range, counts negative ones from the end


class PackedShapes(Packed[tuple[int, ...]]):
    """Shapes of one length."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self._values = np.array(shapes, np.int32)

    def __len__(self) -> int:
        return len(self._values)

    def item(self, index: int) -> tuple[int, ...]:
        return tuple(self._values[index].tolist())

    def equal(self, index: int) -> np.ndarray:
        """For each clip whether it has the shape of clip `index`."""
        return (self._values == self._values[index]).all(1)


class PackedStrings(Packed[str]):
    """Strings, also such that are no valid UTF-8 (file names)."""

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self._bytes[start:end].tobytes())

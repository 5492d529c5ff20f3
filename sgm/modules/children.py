"""Typed containers of modules: for a type checker only, at run time they are torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        """`nn.ModuleList` whose members are all of the type M."""

        def __getitem__(self, idx: int) -> M: ...  # type: ignore[override]  # torch's also takes slices
        def __iter__(self) -> Iterator[M]: ...

else:
    ModuleList = nn.ModuleList

"""Types of what torch hands to the functions of `torch.autograd.Function`, whose own leave out what they keep."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The first argument of `forward` and `backward`. Subclasses name what a function keeps on it."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class TensorContext(Context, Protocol):
    """That of a function which keeps tensors only, and all of them."""

    saved_tensors: tuple[Tensor, ...]

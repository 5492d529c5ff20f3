"""Modules built on PyTorch's meta device: names, shapes and types, but no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


class WithoutValues(TorchFunctionMode):
    """Within it, `nn.init.normal_` leaves tensors on the meta device alone.

    It could not change them, but PyTorch makes a program for it, which takes its compiler: a second to import.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **kwargs)

"""Modules and tensors on PyTorch's meta device: names, shapes and types, but no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Rules = Mapping[Callable[..., Any], Callable[..., Tensor]]


class MetaRules(TorchFunctionMode):
    """Within it, functions that meet a tensor on the meta device have the results that `rules` give, if any.

    PyTorch 2.13 has some of them from programs of its compiler, which it imports for that, and sympy with it: seconds.
    """

    def __init__(self, rules: Rules):
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if rule is None or not any(isinstance(x, Tensor) and x.is_meta for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        return rule(*args, **kwargs)


def without_values() -> MetaRules:
    """Modules built within it have no initial values drawn where there is nothing to hold them."""
    return MetaRules({nn.init.normal_: lambda tensor, **_: tensor})

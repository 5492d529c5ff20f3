"""Strict, memory-lean assignment of a state dict to a module, also one on the meta device: without values yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sgm.weights.files import WeightsError
from sgm.weights.save import require_finite
from sgm.weights.streaming import StagedCopy


@dataclass
class KeyReport:
    """How the keys of a file relate to those of a module. All lists are sorted; `shapes` holds readable lines."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def lines(self) -> list[str]:
        parts = (
            ("missing from the file", self.missing),
            ("not of this model", self.unexpected),
            ("wrong shape", self.shapes),
        )
        return [f"  {title} ({len(names)}): {some_of(names, between='; ')}" for title, names in parts if names]


def assign_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    may_lack: Collection[str] = (),
    ignore_prefixes: Iterable[str] = (),
    hint: str | Callable[[], str] = "",
) -> None:
    """Give `module` the tensors of `state`, every key accounted for, one tensor at a time.

    Parameters and buffers that lie on the meta device are replaced; real ones are overwritten in place, or replaced
    when `device`/`dtype` ask for others. A tensor that already has the wanted device and dtype is taken as it is, so
    a memory-mapped file costs no second copy. Plain names are also accepted by linears that a LoRA mixin has wrapped
    (`x.weight` goes to `x.original.weight`).

    Args:
        state: names to tensors; entries whose name starts with one of `ignore_prefixes` are left out.
        device: where the tensors go; None keeps the module's device (for meta modules: the tensor's own).
        dtype: floating-point type to convert to; None keeps the module's type (for meta modules: the tensor's own).
        may_lack: names that the file may leave out; they keep what the module holds.
        hint: a last line for the error message, or what makes it then.
    Raises:
        WeightsError: lists all missing and unexpected names and all wrong shapes at once; nothing was assigned then.
        WeightsError: values are NaN or infinite, in the file or in the type they are wanted in.
    """
    kept = set(module.state_dict(keep_vars=True))
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    targets = {name: tensor for name, tensor in named.items() if name in kept}  # tied ones under each of their names
    prefixes = tuple(ignore_prefixes)
    offered = {_own_name(name, targets): t for name, t in state.items() if not name.startswith(prefixes or ("\0",))}
    report = compare_keys({name: tuple(t.shape) for name, t in targets.items()}, offered, may_lack)
    if report:
        message = [f"{source} does not fit {type(module).__name__}:", *report.lines()]
        last = hint() if callable(hint) else hint
        raise WeightsError("\n".join(message + ([last] if last else [])))
    replaced: dict[int, Tensor] = {}  # tied parameters stay tied
    stage = StagedCopy(torch.device(device)) if device is not None and torch.device(device).type == "cuda" else None
    for name, value in offered.items():
        assigned = _assign_one(module, name, targets[name], value, device, dtype, replaced, stage)
        require_finite({name: assigned}, source)


def compare_keys(
    expected: Mapping[str, tuple[int, ...]], offered: Mapping[str, Any], may_lack: Collection[str] = ()
) -> KeyReport:
    """Compare names and shapes: `expected` name -> shape of the module, `offered` name -> what has the file's."""
    allowed = set(may_lack)
    return KeyReport(
        missing=sorted(n for n in expected if n not in offered and n not in allowed),
        unexpected=sorted(n for n in offered if n not in expected),
        shapes=sorted(
            f"{n} is {list(offered[n].shape)} in the file, {list(shape)} in the model"
            for n, shape in expected.items()
            if n in offered and tuple(offered[n].shape) != shape
        ),
    )


def _own_name(name: str, targets: Mapping[str, Tensor]) -> str:
    if name in targets:
        return name
    stem, _, leaf = name.rpartition(".")
    wrapped = f"{stem}.original.{leaf}"
    return wrapped if wrapped in targets else name


def _assign_one(
    module: nn.Module,
    name: str,
    target: Tensor,
    value: Tensor,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    replaced: dict[int, Tensor],
    stage: StagedCopy | None,
) -> Tensor:
    place = device if device is not None else (value.device if target.is_meta else target.device)
    wanted = dtype or (value.dtype if target.is_meta else target.dtype)
    kind = wanted if target.is_floating_point() else target.dtype
    if not target.is_meta and target.device == torch.device(place) and target.dtype == kind:
        with torch.no_grad():
            return target.copy_(value)
    if id(target) not in replaced:
        if stage is not None and value.device.type == "cpu":
            new = torch.empty_like(value, device=place, requires_grad=False)
            stage.copy(new, value)
            new = new.to(kind)
        else:
            new = value.detach().to(device=place, dtype=kind)
        replaced[id(target)] = _like(target, new)
    owner = module.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], replaced[id(target)])
    return replaced[id(target)]


def _like(target: Tensor, new: Tensor) -> Tensor:
    """`new` as the same kind of tensor: a parameter keeps requires_grad and the marks that SAT puts on it."""
    if not isinstance(target, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=target.requires_grad)
    parameter.__dict__.update(target.__dict__)
    return parameter


def some_of(names: Sequence[str], limit: int = 6, between: str = ", ") -> str:
    """The first of these, and how many more there are."""
    return between.join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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

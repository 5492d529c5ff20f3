"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the network's linear layers, in SAT's tensor names.

An adapted linear `x` has the entries `x.original.weight`, `x.original.bias`, `x.matrix_A.i` (r, in) and `x.matrix_B.i`
(out/parts, r); `query_key_value` has three pairs, for q, k and v. Its output is

    W x + b + scaling * concat_i(B_i A_i x),      scaling = alpha / r, or alpha / sqrt(r) if rank-stabilised.

As in SAT alpha is 1 unless configured, so scaling is 1/r. The factor is not part of the tensors: readers of a file
must know alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgm.distributed import (
    broadcast_in_model_parallel,
    model_parallel_rank,
    model_parallel_world_size,
    quiet_libraries,
)
from sgm.modules.transformer.lora_state import (
    MATRIX,
    TARGETS,
    LoraError,
    LoraSpec,
    collect_pairs,
    lora_delta,
    lora_scaling,
    lora_spec_of,
    merge_lora_state,
    split_lora,
)
from sgm.modules.transformer.sat_base import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)

with quiet_libraries():
    from sat.model.finetune.lora2 import LoraMixin as SatLoraMixin

__all__ = [
    "LoraError",
    "LoraLinear",
    "LoraMixin",
    "LoraSpec",
    "MergedLora",
    "apply_adapter",
    "lora_delta",
    "lora_layers",
    "lora_spec_of",
    "merge_lora",
    "merge_lora_state",
    "set_lora_scale",
    "split_lora",
    "unmerge_lora",
]


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it; `original` is the very layer that it wraps.

    Works on plain linears and on SAT's column- and row-parallel ones. Under tensor parallelism B follows a column-
    parallel weight's rows and A a row-parallel weight's columns; the other matrix is whole on every process.

    Args:
        original: the linear to wrap.
        parts: number of equal blocks of output rows with a pair of matrices each.
        rank: r of every pair.
        scaling: factor on the adapter's output.
        dropout: probability of dropping an input of the adapter in training.
    """

    def __init__(self, original: nn.Module, parts: int, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.original = original
        self.scaling = scaling
        self.adapter_scale = 1.0
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        rows = original.weight.shape[0] // parts
        kind = {"device": original.weight.device, "dtype": _working_dtype(original)}
        self.matrix_A = nn.ParameterList(_initial_a(original, rank, kind) for _ in range(parts))
        self.matrix_B = nn.ParameterList(torch.zeros(rows, rank, **kind) for _ in range(parts))
        split = self.matrix_B if isinstance(original, ColumnParallelLinear) else self.matrix_A
        if isinstance(original, ColumnParallelLinear | RowParallelLinear):
            for matrix in split:
                matrix.model_parallel = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.original(x)
        if self.adapter_scale == 0:
            return out
        x = self.lora_dropout(x)
        pairs = zip(self.matrix_A, self.matrix_B, strict=True)
        added = torch.cat([self._between_processes(x @ down.T) @ up.T for down, up in pairs], dim=-1)
        return torch.add(out, added, alpha=self.scaling * self.adapter_scale)

    def _between_processes(self, low: Tensor) -> Tensor:
        """A x, complete on every process, with a gradient that is."""
        if isinstance(self.original, RowParallelLinear):
            return reduce_from_model_parallel_region(low)
        if isinstance(self.original, ColumnParallelLinear):
            return copy_to_model_parallel_region(low)
        return low

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, *reports: Any
    ) -> None:
        """Accept a base checkpoint, too: plain weight and bias go to `original`, the adapter stays as it is."""
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}original.{name}"] = state_dict.pop(prefix + name)
        if not any(key.startswith(prefix + "matrix_") for key in state_dict):
            own = self.state_dict(prefix=prefix)
            state_dict.update({key: value for key, value in own.items() if MATRIX.match(key)})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


def _working_dtype(linear: nn.Module) -> torch.dtype:
    """Floating-point type of the linear, also where its weight is stored quantised."""
    return linear.weight.dtype if linear.weight.is_floating_point() else linear.bias.dtype


def _initial_a(linear: nn.Module, rank: int, kind: Mapping[str, Any]) -> Tensor:
    """A Kaiming-uniform (r, in) matrix, the same on all processes, or this process's columns of it."""
    width = linear.input_size if isinstance(linear, RowParallelLinear) else linear.weight.shape[1]
    full = torch.empty(rank, width, **kind)
    nn.init.kaiming_uniform_(full, a=math.sqrt(5))
    if not full.is_meta:
        broadcast_in_model_parallel(full)
    if isinstance(linear, RowParallelLinear):
        return full.chunk(model_parallel_world_size(), dim=1)[model_parallel_rank()].clone()
    return full


class LoraMixin(SatLoraMixin):
    """SAT's LoRA mixin with the same arguments and tensors, and right also under tensor parallelism.

    Args:
        layer_num: number of layers of the network.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout in front of A, in training.
        layer_range: layers to adapt; None means all.
        qlora: not available here.
        cross_attention: without effect; the network has none.
        targets: which linears, of "attention", "mlp", "adaln".
        rank_stabilised: scale by alpha / sqrt(r).
    Raises:
        LoraError: unknown target, rank below 1, layers that do not exist, or qlora.
    """

    def __init__(
        self,
        layer_num: int,
        r: int = 4,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        layer_range: Sequence[int] | None = None,
        qlora: bool = False,
        cross_attention: bool = True,
        targets: str | Sequence[str] = ("attention",),
        rank_stabilised: bool = False,
    ):
        self._check(layer_num, r, layer_range, qlora, targets)
        super().__init__(layer_num, r, lora_alpha, lora_dropout, layer_range and list(layer_range), qlora, False)
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)
        self.rank_stabilised = rank_stabilised
        self.scaling = lora_scaling(r, lora_alpha, rank_stabilised)

    @staticmethod
    def _check(
        layer_num: int, r: int, layer_range: Sequence[int] | None, qlora: bool, targets: str | Sequence[str]
    ) -> None:
        if r < 1:
            raise LoraError(f"LoRA rank r is {r}; it must be at least 1.")
        if qlora:
            raise LoraError("qlora: true is not available; leave it out.")
        unknown = [name for name in ([targets] if isinstance(targets, str) else targets) if name not in TARGETS]
        if unknown:
            raise LoraError(f"LoRA targets {', '.join(unknown)} are unknown; choose from {', '.join(TARGETS)}.")
        outside = [i for i in layer_range or () if not 0 <= i < layer_num]
        if outside:
            raise LoraError(f"LoRA layer_range names layers {outside}; the network has 0 to {layer_num - 1}.")

    def reinit(self, parent_model: nn.Module) -> None:
        """Wrap the targets' linears, unless they are wrapped already."""
        for target in self.targets:
            for name, parts in TARGETS[target]:
                for i in self.layer_range:
                    path = name.format(i=i)
                    linear = parent_model.get_submodule(path)
                    if not _is_adapted(linear):
                        wrapped = LoraLinear(linear, parts, self.r, self.scaling, self.lora_dropout)
                        parent_model.set_submodule(path, wrapped)

    def merge_lora(self) -> None:
        """SAT's method: fold the attention's and the MLP's adapters into the trunk and unwrap its linears."""
        merge_lora(self.transformer)


@dataclass
class MergedLora:
    """What `merge_lora` took out of a network, enough to undo it: the wrappers by name, the mixin, and the scale."""

    wrappers: dict[str, nn.Module]
    mixin: nn.Module | None
    scale: float


def _is_adapted(module: nn.Module) -> bool:
    """Ours, or SAT's own class, which has the same attributes."""
    return hasattr(module, "matrix_A") and hasattr(module, "matrix_B") and hasattr(module, "original")


def lora_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The adapted linears inside `module`, by name."""
    return {name: child for name, child in module.named_modules() if _is_adapted(child)}


def set_lora_scale(module: nn.Module, scale: float) -> None:
    """Set the factor on all adapters inside `module`, beside their own scaling; 0 gives the base bit for bit.

    Raises:
        LoraError: there is no adapter.
    """
    layers = lora_layers(module)
    if not layers:
        raise LoraError(f"set_lora_scale: {type(module).__name__} holds no LoRA adapter.")
    for layer in layers.values():
        if isinstance(layer, LoraLinear):
            layer.adapter_scale = float(scale)
        else:  # SAT's own class multiplies by one factor only
            layer.scaling = layer.lora_alpha / layer.r * scale


def merge_lora(
    target: nn.Module | Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    alpha: float = 1.0,
    rank_stabilised: bool = False,
) -> Any:
    """Fold adapters into the weights: W + scale * scaling * concat_i(B_i A_i), computed in float32.

    A module is changed in place and left without wrappers, exactly a network without LoRA; the result is a
    `MergedLora` for `unmerge_lora`. From a state dict a new one with the base's names is made; since a file does not
    say its scaling, `alpha` and `rank_stabilised` (used for state dicts only) do.
    """
    if isinstance(target, nn.Module):
        return _merge_module(target, scale)
    return merge_lora_state(target, scale, alpha=alpha, rank_stabilised=rank_stabilised)


def unmerge_lora(module: nn.Module, merged: MergedLora) -> None:
    """Undo `merge_lora` on a module: subtract the adapters and put the wrappers back (float32: within 1e-6)."""
    for name, wrapper in merged.wrappers.items():
        _add_(wrapper.original.weight, _module_delta(wrapper, -merged.scale))
        module.set_submodule(name, wrapper)
    if merged.mixin is not None:
        module.add_mixin("lora", merged.mixin)


def _merge_module(module: nn.Module, scale: float) -> MergedLora:
    mixins = getattr(module, "mixins", {})
    merged = MergedLora(lora_layers(module), mixins["lora"] if "lora" in mixins else None, scale)
    for name, wrapper in merged.wrappers.items():
        _add_(wrapper.original.weight, _module_delta(wrapper, scale))
        module.set_submodule(name, wrapper.original)
    if merged.mixin is not None:
        module.del_mixin("lora")
    return merged


@torch.no_grad()
def _module_delta(wrapper: nn.Module, scale: float) -> Tensor:
    factor = wrapper.scaling * getattr(wrapper, "adapter_scale", 1.0) * scale
    return lora_delta(list(wrapper.matrix_A), list(wrapper.matrix_B), factor)


@torch.no_grad()
def _add_(weight: Tensor, delta: Tensor) -> None:
    weight.copy_(weight.float() + delta.to(weight.device))


def apply_adapter(
    network: nn.Module,
    lora: Mapping[str, Tensor],
    *,
    facts: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    merge: bool = False,
) -> LoraSpec:
    """Put a stored adapter onto a `DiffusionTransformer` whose base weights are in place.

    Args:
        lora: whole (unsplit) matrices under the network's names, as `split_lora` returns them.
        facts: see `lora_spec_of`; where it is silent about alpha, the network's `lora_config` decides, then SAT's 1.
        scale: further factor on the adapter.
        merge: fold it into the weights instead of attaching it; several adapters can be merged one after the other.
    Raises:
        LoraError: there is no adapter in `lora`, or it does not fit the network.
    """
    spec = lora_spec_of(lora, {**network.lora_facts(), **(facts or {})})
    if spec is None:
        raise LoraError("there is no adapter here: no matrix_A and matrix_B.")
    if spec.layers[-1] >= network.num_layers:
        raise LoraError(f"the adapter reaches layer {spec.layers[-1]}; the network has 0 to {network.num_layers - 1}.")
    if model_parallel_world_size() > 1:
        from sgm.weights.tensor_parallel import partition_state

        lora = partition_state(lora, model_parallel_rank(), model_parallel_world_size())
    pairs = collect_pairs(lora)
    for linear, (a, b) in pairs.items():
        _check_fit(linear, network.get_submodule(linear), a, b)
    if merge:
        for linear, (a, b) in pairs.items():
            module = network.get_submodule(linear)
            weight = (module.original if _is_adapted(module) else module).weight
            _add_(weight, lora_delta(a, b, spec.scaling * scale))
        return spec
    network.attach_lora(_mixin_config(spec))
    for linear, (a, b) in pairs.items():
        wrapper = network.get_submodule(linear)
        with torch.no_grad():
            for own, given in zip((*wrapper.matrix_A, *wrapper.matrix_B), (*a, *b), strict=True):
                own.copy_(given)
    set_lora_scale(network, scale)
    return spec


def _check_fit(linear: str, module: nn.Module, a: list[Tensor], b: list[Tensor]) -> None:
    rows, columns = (module.original if _is_adapted(module) else module).weight.shape
    got = (sum(m.shape[0] for m in b), a[0].shape[1])
    if got != (rows, columns):
        raise LoraError(f"the adapter of {linear} is for a weight {got}, the network has {(rows, columns)}.")


def _mixin_config(spec: LoraSpec) -> dict[str, Any]:
    params = dict(
        r=spec.rank,
        lora_alpha=spec.alpha,
        layer_range=list(spec.layers),
        targets=list(spec.targets),
        rank_stabilised=spec.rank_stabilised,
    )
    return {"target": f"{LoraMixin.__module__}.{LoraMixin.__name__}", "params": params}

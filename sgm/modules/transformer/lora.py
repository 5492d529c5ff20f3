"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the network's linear layers, in SAT's tensor names.

An adapted linear `x` has the entries `x.original.weight`, `x.original.bias`, `x.matrix_A.i` (r, in) and `x.matrix_B.i`
(out/parts, r); `query_key_value` has three pairs, for q, k and v. Its output is

    W x + b + scaling * concat_i(B_i A_i x),      scaling = alpha / r, or alpha / sqrt(r) if rank-stabilised.

As in SAT alpha is 1 unless configured, so scaling is 1/r. The factor is not part of the tensors: readers of a file
must know alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, TypeGuard

import torch
from torch import Tensor, nn

from sgm.distributed import (
    broadcast_in_model_parallel,
    model_parallel_rank,
    model_parallel_world_size,
    quiet_libraries,
)
from sgm.modules.transformer.lora_state import MATRIX, TARGETS, LoraError, lora_delta, lora_scaling
from sgm.modules.transformer.sat_base import (
    BaseModel,
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from sgm.typed import Count, Layers, Positive, Range

with quiet_libraries():
    from sat.model.finetune.lora2 import LoraMixin as SatLoraMixin

Rank = Annotated[int, Range(1, 65536)]
Dropout = Annotated[float, Range(0, 0.999)]


class AdaptedLinear(nn.Module):
    """What the wrappers of a linear have in common: `LoraLinear` here, and SAT's own class, which is none of ours."""

    original: nn.Module
    matrix_A: nn.ParameterList
    matrix_B: nn.ParameterList
    scaling: float
    r: int  # this and alpha: of SAT's class alone
    lora_alpha: float


class LoraLinear(AdaptedLinear):
    """A linear layer with an adapter beside it; `original` is the very layer that it wraps.

    Works on plain linears and on SAT's column- and row-parallel ones. Under tensor parallelism B follows a column-
    parallel weight's rows and A a row-parallel weight's columns; the other matrix is whole on every process.

    Args:
        parts: number of equal blocks of output rows with a pair of matrices each.
        dropout: probability of dropping an input of the adapter in training.
    """

    def __init__(self, original: nn.Module, parts: int, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.original = original
        self.scaling = scaling
        self.adapter_scale = 1.0
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        weight = weight_of(original)
        # the linear's floating-point type, also where its weight is stored quantised
        dtype = weight.dtype if weight.is_floating_point() else original.get_parameter("bias").dtype
        rows = weight.shape[0] // parts
        self.matrix_A = nn.ParameterList(_initial_a(original, rank, dtype) for _ in range(parts))
        self.matrix_B = nn.ParameterList(
            torch.zeros(rows, rank, device=weight.device, dtype=dtype) for _ in range(parts)
        )
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


def weight_of(linear: nn.Module) -> nn.Parameter:
    """The weight (out, in) of a linear layer, torch's or SAT's."""
    return linear.get_parameter("weight")


def _initial_a(linear: nn.Module, rank: int, dtype: torch.dtype) -> Tensor:
    """A Kaiming-uniform (r, in) matrix, the same on all processes, or this process's columns of it."""
    weight = weight_of(linear)
    width = linear.input_size if isinstance(linear, RowParallelLinear) else weight.shape[1]
    full = torch.empty(rank, width, device=weight.device, dtype=dtype)
    nn.init.kaiming_uniform_(full, a=math.sqrt(5))
    if not full.is_meta:
        broadcast_in_model_parallel(full)
    if isinstance(linear, RowParallelLinear):
        return full.chunk(model_parallel_world_size(), dim=1)[model_parallel_rank()].clone()
    return full


class LoraMixin(SatLoraMixin):
    """SAT's LoRA mixin with the same arguments and tensors, and right also under tensor parallelism.

    Args:
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout in front of A, in training.
        layer_range: layers to adapt; None means all.
        qlora: not available here.
        cross_attention: without effect; the network has none.
        targets: which linears, of "attention", "mlp", "adaln".
        rank_stabilised: scale by alpha / sqrt(r).
    Raises:
        LoraError: unknown target, layers that do not exist, or qlora.
    """

    def __init__(
        self,
        layer_num: Layers,
        r: Rank = 4,
        lora_alpha: Positive = 1,
        lora_dropout: Dropout = 0.0,
        layer_range: Sequence[Count] | None = None,
        qlora: bool = False,
        cross_attention: bool = True,
        targets: str | Sequence[str] = ("attention",),
        rank_stabilised: bool = False,
    ):
        self._check(layer_num, layer_range, qlora, targets)
        super().__init__(layer_num, r, lora_alpha, lora_dropout, layer_range and list(layer_range), qlora, False)
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)
        self.rank_stabilised = rank_stabilised
        self.scaling = lora_scaling(r, lora_alpha, rank_stabilised)

    @staticmethod
    def _check(layer_num: int, layer_range: Sequence[int] | None, qlora: bool, targets: str | Sequence[str]) -> None:
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
                    if not is_adapted(linear):
                        wrapped = LoraLinear(linear, parts, self.r, self.scaling, self.lora_dropout)
                        parent_model.set_submodule(path, wrapped)

    def merge_lora(self) -> None:
        """SAT's method: fold the attention's and the MLP's adapters into the trunk and unwrap its linears."""
        merge_lora(self.transformer)


def is_adapted(module: nn.Module) -> TypeGuard[AdaptedLinear]:
    """Whether it is a linear with an adapter."""
    return hasattr(module, "matrix_A") and hasattr(module, "matrix_B") and hasattr(module, "original")


def lora_layers(module: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linears inside `module`, by name."""
    return {name: child for name, child in module.named_modules() if is_adapted(child)}


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
        else:  # SAT's, which multiplies by one factor only
            layer.scaling = layer.lora_alpha / layer.r * scale


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Fold the adapters inside `module` into its weights, W + scaling * concat_i(B_i A_i), computed in float32.

    It is left without wrappers, exactly a network without LoRA.
    """
    for layer in lora_layers(module).values():
        factor = layer.scaling * getattr(layer, "adapter_scale", 1.0)
        weight = weight_of(layer.original)
        delta = lora_delta(list(layer.matrix_A), list(layer.matrix_B), factor)
        weight.copy_(weight.float() + delta.to(weight.device))
    remove_lora(module)


def remove_lora(module: nn.Module) -> None:
    """Take the adapters inside `module` off: it is left without wrappers, exactly a network without LoRA."""
    for name, layer in lora_layers(module).items():
        module.set_submodule(name, layer.original)
    if isinstance(module, BaseModel) and "lora" in module.mixins:
        module.del_mixin("lora")

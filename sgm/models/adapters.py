"""Stored LoRA adapters onto a network: attached beside its weights, or merged into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgm.distributed import model_parallel_rank, model_parallel_world_size
from sgm.models.network import DiffusionTransformer
from sgm.modules.transformer.lora import (
    LoraMixin,
    is_adapted,
    lora_layers,
    remove_lora,
    set_lora_scale,
    weight_of,
)
from sgm.modules.transformer.lora_state import (
    LoraError,
    LoraSpec,
    adapted_weight,
    collect_pairs,
    lora_delta,
    lora_spec_of,
    magnitudes_of,
)
from sgm.weights import WeightsError
from sgm.weights.tensor_parallel import partition_state


def apply_adapter(
    network: DiffusionTransformer,
    lora: Mapping[str, Tensor],
    *,
    facts: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    merge: bool = False,
) -> LoraSpec:
    """Put a stored adapter onto a network whose base weights are in place.

    Args:
        lora: whole (unsplit) matrices under the network's names, as `split_lora` returns them.
        facts: see `lora_spec_of`; where it is silent about alpha, the network's `lora_config` decides, then SAT's 1.
        merge: fold it into the weights instead of attaching it; several adapters can be merged one after the other, a
            DoRA first, whose norms are of the base's rows. What can only be folded (`LoraSpec.only_folded`) is.
    Raises:
        LoraError: there is no adapter in `lora`, or it does not fit the network.
    """
    spec = lora_spec_of(lora, {**network.lora_facts(), **(facts or {})})
    if spec is None:
        raise LoraError("there is no adapter here: no matrix_A and matrix_B.")
    if spec.layers and spec.layers[-1] >= network.num_layers:
        raise LoraError(f"the adapter reaches layer {spec.layers[-1]}; the network has 0 to {network.num_layers - 1}.")
    if model_parallel_world_size() > 1:
        if spec.only_folded:
            raise LoraError(
                f"of this adapter ({spec.only_folded}) parts of a network cannot be made; fold it into the base first."
            )
        lora = partition_state(lora, model_parallel_rank(), model_parallel_world_size())
    pairs = collect_pairs(lora)
    for name, (a, b) in pairs.items():
        here = tuple(_weight(network, name).flatten(1).shape)
        got = (sum(m.shape[0] for m in b), *sorted({m.shape[1] for m in a}))
        if got != here:
            raise LoraError(f"the adapter of {name} is for a weight {got}, the network has {here}.")
    if merge or spec.only_folded:
        for name, (a, b) in pairs.items() if scale else ():
            weight, delta = _weight(network, name), partial(lora_delta, a, b, spec.scaling * scale)
            with torch.no_grad():
                weight.copy_(adapted_weight(weight, delta, magnitudes_of(lora, name)))
        return spec
    params = {
        "r": spec.rank, "lora_alpha": spec.alpha, "layer_range": list(spec.layers), "targets": list(spec.targets),
        "rank_stabilised": spec.rank_stabilised,
    }  # fmt: skip
    network.attach_lora({"target": f"{LoraMixin.__module__}.{LoraMixin.__name__}", "params": params})
    layers = lora_layers(network)
    for name, (a, b) in pairs.items():
        with torch.no_grad():
            for own, given in zip((*layers[name].matrix_A, *layers[name].matrix_B), (*a, *b), strict=True):
                own.copy_(given)
    set_lora_scale(network, scale)
    return spec


def restore_base(
    network: DiffusionTransformer, base: Mapping[str, Tensor], merged: Iterable[str], entries: Iterable[str] = ()
) -> None:
    """Undo `apply_adapter`, to the bit: adapters beside the weights go, and the linears `merged` have the base's.

    Args:
        entries: further ones that are the base's again.
    Raises:
        WeightsError: one is missing from the base, or of another shape there; nothing is undone then.
    """
    own = {name.replace(".original.", "."): parameter for name, parameter in network.named_parameters()}
    parameters = {name: own[name] for name in entries}
    for name, parameter in parameters.items():
        if name not in base or base[name].shape != parameter.shape:
            had = list(base[name].shape) if name in base else "missing"
            raise WeightsError(
                f"{name} is {had} in the base, {list(parameter.shape)} in the model: this network needs an adapter "
                "with that part; load a second model for the base alone."
            )
    remove_lora(network)
    with torch.no_grad():
        for linear in merged:
            _weight(network, linear).copy_(base[f"{linear}.weight"])
        for name, parameter in parameters.items():
            parameter.copy_(base[name])


def _weight(network: nn.Module, name: str) -> nn.Parameter:
    """The weight of the linear of that name, with or without an adapter around it.

    Raises:
        LoraError: the network has no such linear.
    """
    try:
        linear = network.get_submodule(name)
    except AttributeError as error:
        raise LoraError(f"the adapter is for {name}, which this network lacks; it is another model's.") from error
    return weight_of(linear.original if is_adapted(linear) else linear)

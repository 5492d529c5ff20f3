"""Which weights go into a checkpoint's files, and how they come whole to the process that writes them.

Under ZeRO 0 to 2 every rank holds its tensor-parallel part whole, and the part's first data-parallel rank writes it.
Under ZeRO 3 parameters are spread over the data-parallel ranks; all of them gather one after the other, so that no
process ever holds more than one whole parameter besides its own share.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.transformer.lora import AdaptedLinear, lora_layers, weight_of
from sgm.modules.transformer.lora_state import MATRIX, further_mixin, lora_delta
from sgm.training.checkpoints.state import CheckpointError
from sgm.weights import WeightsError, weights_fingerprint
from sgm.weights.release import NETWORK_PREFIX, locate
from sgm.weights.save import Deferred, require_finite

logger = logging.getLogger(__name__)

FEW_STEPS = "few_steps"  # entry of `lora_facts`, the only one that holds of merged weights, too

EARLIER_ONES = "Nothing is saved while that is so; checkpoints from before are intact."

Tensors = OrderedDict[str, Deferred]


def checkpoint_tensors(module: nn.Module, *, lora_only: bool, save_frozen: bool) -> Tensors:
    """The entries of an engine's state dict that a checkpoint holds, under the engine's names.

    Args:
        lora_only: only adapters: LoRA's matrices, mixins beyond a release's own, and parts that are trained whole.
        save_frozen: text encoder and VAE, too.
    Raises:
        CheckpointError: `lora_only` for a network without adapter, or nothing to save.
    """
    state = module.state_dict(keep_vars=True)
    if lora_only:
        own = [name for name in state if name.startswith(NETWORK_PREFIX)]
        adapters = {name for name in own if MATRIX.match(name) or further_mixin(name)}
        chosen = [name for name in own if name in adapters or state[name].requires_grad] if adapters else []
    else:
        chosen = [name for name in state if save_frozen or name.startswith(NETWORK_PREFIX)]
    if not chosen:
        what = "LoRA matrices and no further mixins" if lora_only else f"entries {NETWORK_PREFIX}*"
        raise CheckpointError(f"there is nothing to save: this {type(module).__name__} has no {what}.")
    whole: dict[int, Deferred] = {}  # a tied tensor is written once
    return OrderedDict((name, whole.setdefault(id(state[name]), _whole(state[name]))) for name in chosen)


def merged_tensors(module: nn.Module) -> Tensors:
    """The network's entries with the adapter folded in (in float32), under the names of a network without one.

    Raises:
        CheckpointError: the network has no adapter.
    """
    wrappers = lora_layers(module)
    if not wrappers:
        raise CheckpointError("a merged checkpoint was asked for, but this network has no LoRA adapter to merge.")
    merged: Tensors = OrderedDict()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not name.startswith(NETWORK_PREFIX) or MATRIX.match(name):
            continue
        linear = name.removesuffix(".original.weight")
        deferred = _merged(wrappers[linear]) if linear != name and linear in wrappers else _whole(tensor)
        merged[name.replace(".original.", ".")] = deferred
    return merged


def _whole(tensor: Tensor) -> Deferred:
    if not hasattr(tensor, "ds_shape"):
        return Deferred.of(tensor)
    return Deferred(tuple(tensor.ds_shape), tensor.dtype, lambda: _gathered([tensor])[0])


def _merged(wrapper: AdaptedLinear) -> Deferred:
    """W + scaling * concat_i(B_i A_i) of one adapted linear (this process's part of it), in W's type."""
    weight, a, b = weight_of(wrapper.original), list(wrapper.matrix_A), list(wrapper.matrix_B)

    @torch.no_grad()
    def make() -> Tensor:
        base, *matrices = _gathered([weight, *a, *b])
        delta = lora_delta(matrices[: len(a)], matrices[len(a) :], wrapper.scaling)
        return (base.float() + delta.to(base.device)).to(base.dtype)  # a frozen weight may lie on the host

    whole = _whole(weight)
    return Deferred(whole.shape, whole.dtype, make)


def _gathered(parameters: list[Tensor]) -> list[Tensor]:
    """The whole parameters; collective over data-parallel ranks where ZeRO 3 keeps them in pieces."""
    if not any(hasattr(p, "ds_shape") for p in parameters):
        return [p.detach() for p in parameters]
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return [p.detach().clone() for p in parameters]


def write_together(tensors: Tensors, write: Callable[[Tensors], Any] | None, *, collective: bool) -> None:
    """Let one process write `tensors` while the others take part in making them.

    If writing breaks off, the tensors that are left are still made, so that no other process waits for ever.

    Args:
        write: makes every tensor once and in order (as the writers of `sgm.weights.save` do); None on processes that
            do not write.
        collective: making a tensor takes all processes.
    Raises:
        WeightsError: a tensor to be written holds NaN or infinity.
    """
    made: set[int] = set()

    def counted(name: str, source: Deferred) -> Deferred:
        def make() -> Tensor:
            made.add(id(source))
            tensor = source.make()
            require_finite({name: tensor}, "the weights", EARLIER_ONES)
            return tensor

        return Deferred(source.shape, source.dtype, make)

    unique = {id(source): source for source in tensors.values()}
    wrapped = {id(source): counted(name, source) for name, source in tensors.items()}
    try:
        if write is not None:
            write(OrderedDict((name, wrapped[id(source)]) for name, source in tensors.items()))
    finally:
        if collective:
            for key, source in unique.items():
                if key not in made:
                    source.make()


# --- what a file says of its adapter -----------------------------------------------------------------------------


def lora_facts(module: nn.Module, load: str | None) -> dict[str, Any]:
    """Facts that the matrices do not say: rank, alpha, targets, kind of scaling, the base they belong to; and, with or
    without an adapter, how a few-step student is sampled.

    `base_hash` is `weights_fingerprint` of the file at `load`. Empty where there is neither adapter nor student.
    """
    few_steps = getattr(module, "few_steps", None)
    said = {FEW_STEPS: few_steps.as_dict()} if few_steps else {}
    mixins = getattr(getattr(module, "network", None), "mixins", {})
    if "lora" not in mixins:
        return said
    mixin = mixins["lora"]
    path, fingerprint = _base(load)
    return {
        "rank": int(mixin.r),
        "alpha": float(mixin.lora_alpha),
        "targets": [str(name) for name in mixin.targets],
        "rank_stabilised": bool(mixin.rank_stabilised),
        "base_path": path,
        "base_hash": fingerprint,
        **said,
    }


def _base(load: str | None) -> tuple[str, str]:
    if not load:
        return "", ""
    try:
        file = locate(load)[0][0]
        return str(file), weights_fingerprint(file)
    except (WeightsError, OSError) as error:  # no reason to lose a checkpoint
        logger.warning("the base weights are not where they were loaded from; their hash is not saved: %s", error)
        return str(load), ""


def as_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """`lora_facts` as the texts that a safetensors header holds: lists with commas, mappings as JSON."""
    forms: dict[type, Callable[[Any], str]] = {list: ",".join, dict: json.dumps}
    return {name: forms.get(type(value), str)(value) for name, value in facts.items()}

"""Weights into the parts of an engine that was built on the meta device: network with adapters, VAE, text encoder.

Loading is strict. A transformer file may leave out only what its configuration determines (`allow_absent`): the
sin-cos position table and the rotary models' unused position embedding, which the published files lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sgm.places import CONFIGS
from sgm.weights import WeightsError, assign_state, weights_fingerprint
from sgm.weights.identify import fitting_configs, what_is
from sgm.weights.release import Adapter, Checkpoint, read_transformer


class _WithoutValues(TorchFunctionMode):
    """Leaves initial values undrawn where there is nothing to hold them.

    Besides taking time for nothing, PyTorch 2.13 draws normal numbers on the meta device by way of `torch._dynamo`,
    whose import takes a second.
    """

    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built in this context have shapes and types alone: no memory, no values, no time for drawing any."""
    with torch.device("meta"), _WithoutValues():
        yield


@dataclass
class LoadedNetwork:
    """What was loaded into the network, for the record of a run."""

    source: str
    iteration: int | None
    fingerprint: str
    adapters: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_network(
    network: nn.Module,
    path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    allow_absent: bool,
    adapters: Sequence[Adapter] = (),
    merge: bool = False,
) -> LoadedNetwork:
    """Fill a `DiffusionTransformer` built on meta with `defer_lora=True`, then attach or merge adapters.

    LoRA matrices in the checkpoint itself count as an adapter of scale 1. One adapter is attached beside the weights
    unless `merge`; several are always merged.

    Raises:
        WeightsError: unreadable file, wrong model, missing, unexpected or misshapen entries (all listed).
    """
    from sgm.modules.transformer.lora import split_lora

    checkpoint = read_transformer(path)
    base, own_lora = split_lora(checkpoint.network)
    if own_lora and not base:
        raise WeightsError(
            f"{checkpoint.source} holds a LoRA adapter without base weights. Set args.load to the base model and give "
            f"this file as --lora {path}."
        )
    loaded = LoadedNetwork(checkpoint.source, checkpoint.iteration, weights_fingerprint(checkpoint.files[0]))
    _assign_base(network, base, checkpoint, device, dtype, allow_absent, loaded)
    found = [(Adapter(str(path)), own_lora, checkpoint)] if own_lora else []
    for adapter in adapters:
        source = read_transformer(adapter.path)
        found.append((adapter, _adapter_state(source, network), source))
    for adapter, lora, source in found:
        _apply_adapter(network, adapter, lora, source, merge or len(found) > 1)
        loaded.adapters.append(f"{source.source} x {adapter.scale:g}")
    if not found and network.has_lora_config:
        loaded.notes.append(f"lora_config is set, but {checkpoint.source} holds no LoRA: running the base model")
    return loaded


def _assign_base(
    network: nn.Module,
    base: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    allow_absent: bool,
    loaded: LoadedNetwork,
) -> None:
    computed = network.computed_state()
    absent = sorted(name for name in computed if name not in base)
    if absent and not allow_absent:
        raise WeightsError(
            f"{checkpoint.source} lacks {', '.join(absent)}, which the configuration determines "
            "(the published files lack it too). Set args.force_inference: True (training: args.force_train: True) to "
            "compute it."
        )
    if absent:
        loaded.notes.append(f"computed from the configuration: {', '.join(absent)}")
    from sgm.distributed import model_parallel_rank, model_parallel_world_size
    from sgm.weights.tensor_parallel import partition_state

    unused = {name: torch.zeros(network.state_dict()[name].shape) for name in network.dead_keys() if name not in base}
    whole = {**{name: computed[name] for name in absent}, **unused, **base}
    state = partition_state(whole, model_parallel_rank(), model_parallel_world_size())
    assign_state(network, state, source=checkpoint.source, device=device, dtype=dtype, hint=_hint(base))


def _hint(base: Mapping[str, Tensor]) -> str:
    fits = fitting_configs(base, CONFIGS)
    found = f"The file holds {what_is(base)}."
    return found + (f" This configuration fits: {', '.join(fits)}." if fits else " No shipped configuration fits it.")


def _adapter_state(checkpoint: Checkpoint, network: nn.Module) -> dict[str, Tensor]:
    from sgm.modules.transformer.lora import split_lora

    _, lora = split_lora(checkpoint.network)
    if not lora:
        raise WeightsError(f"{checkpoint.source} holds no LoRA matrices (matrix_A, matrix_B) but {_found(checkpoint)}.")
    return lora


def _found(checkpoint: Checkpoint) -> str:
    return what_is(checkpoint.network)


def _apply_adapter(
    network: nn.Module, adapter: Adapter, lora: Mapping[str, Tensor], source: Checkpoint, merge: bool
) -> None:
    from sgm.modules.transformer.lora import apply_adapter

    try:
        apply_adapter(network, lora, facts=source.lora, scale=adapter.scale, merge=merge)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{source.source}: {error}") from error


def load_first_stage(stage: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """Fill a VAE built on meta from its `ckpt_path`; returns the file's fingerprint."""
    if not stage.ckpt_path:
        raise WeightsError("first_stage_config has no ckpt_path: set it to the release's vae/3d-vae.pt.")
    stage.load_weights(device=device, dtype=dtype)
    return weights_fingerprint(stage.ckpt_path)


def load_text_encoder(conditioner: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """Fill every embedder of a conditioner built on meta; returns the first weight file's fingerprint of each."""
    for embedder in conditioner.embedders:
        embedder.load_weights(device=device, dtype=dtype)
    return " ".join(weights_fingerprint(embedder.files.weights[0]) for embedder in conditioner.embedders)

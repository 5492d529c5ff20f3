"""A SAT checkpoint as lazy tensors: parts of tensor-parallel ranks joined, adapter apart, other models beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, deferred
from sgm.modules.transformer.lora_state import split_further, split_lora
from sgm.weights.files import read_checkpoint, tensors_of
from sgm.weights.release import read_parts, weights_entry
from sgm.weights.tensor_parallel import join_partitions

TEXT_ENCODER = "conditioner.embedders.0.transformer."
FIRST_STAGE = "first_stage_model."


@dataclass(frozen=True)
class SatWeights:
    """What a checkpoint holds.

    Attributes:
        file: the first, and only one but for tensor-parallel parts.
        network: the transformer's base weights, without prefix.
        lora: adapter matrices (small, mapped), without prefix.
        text_encoder, first_stage: those parts' entries, without prefix.
    """

    file: Path
    source: str
    network: dict[str, Deferred]
    lora: dict[str, Tensor]
    facts: Mapping[str, Any]
    text_encoder: dict[str, Deferred]
    first_stage: dict[str, Deferred]


def open_sat(path: str | Path, *, allow_drift: bool = False) -> SatWeights:
    """Open a checkpoint (file, iteration folder or release folder) without reading its values.

    Args:
        allow_drift: tensors that every tensor-parallel part holds whole may differ between parts (the original's
            training lets q/k norms drift apart); the first part's are taken.
    Raises:
        WeightsError: unreadable, or not a SAT transformer checkpoint.
        WeightsError: parts that do not belong together.
        ConvertError: there are mixins beyond a release's own.
    """
    parts = read_parts(path)
    state = join_partitions([part.network for part in parts], strict=not allow_drift)
    release, mixins = split_further(state)
    if mixins:
        raise ConvertError(
            f"{parts[0].files[0]} holds mixins ({', '.join(mixins)}) that other layouts have no place for; convert the "
            "base that they were trained on, and sample with them here."
        )
    base, lora = split_lora(release)
    others = parts[0].others
    return SatWeights(
        file=parts[0].files[0],
        source=str(parts[0].files[0]) + (f" (and {len(parts) - 1} more parts)" if len(parts) > 1 else ""),
        network=base,
        lora={name: value.make() for name, value in lora.items()},
        facts=parts[0].lora,
        text_encoder=_under(others, TEXT_ENCODER),
        first_stage=_under(others, FIRST_STAGE),
    )


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Deferred]:
    return {name.removeprefix(prefix): deferred(t) for name, t in state.items() if name.startswith(prefix)}


def open_vae(path: str | Path) -> tuple[dict[str, Deferred], int]:
    """(the autoencoder's tensors, number of `loss.*` entries left out) of a `3d-vae.pt`.

    Raises:
        WeightsError: unreadable.
        ConvertError: no tensors in it.
    """
    state = tensors_of(weights_entry(read_checkpoint(path)))
    kept = {name: deferred(value) for name, value in state.items() if not name.startswith("loss.")}
    if not kept:
        raise ConvertError(f"{path} holds no tensors of an autoencoder.")
    return kept, len(state) - len(kept)

"""A SAT checkpoint as lazy tensors: parts of tensor-parallel ranks joined, adapter apart, other models beside it.

What no tensor says of a model comes from the YAML file that lies beside the weights, or a shipped one that names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.config import merge_yaml
from sgm.convert.dit_sizes import Sizes, sizes_of_params
from sgm.convert.lazy import ConvertError, Deferred, deferred
from sgm.errors import SgmError
from sgm.modules.transformer.lora_state import split_further, split_lora
from sgm.places import CONFIGS, found_path
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
        PartitionError: parts that do not belong together.
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


ABOVE = 3  # folders: of an iteration; of its run, or a release's transformer/; of the release


@dataclass(frozen=True)
class Described:
    """Sizes of a network, factor on latents and shift of the noise schedule; None where `path` does not say."""

    path: Path
    sizes: Sizes
    scale_factor: float | None
    shift_scale: float | None

    @classmethod
    def read(cls, path: Path) -> Described:
        """The `model:` section of a YAML file.

        Raises:
            ConvertError: it describes no network.
        """
        try:
            model = merge_yaml([path])["model"]
            sizes = sizes_of_params(model["network_config"]["params"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{path} has no model.network_config.params that describe a network.") from error
        schedule = ((model.get("sampler_config") or {}).get("params") or {}).get("discretization_config")
        shift = (schedule.get("params") or {}).get("shift_scale", 1.0) if schedule else None  # SAT's default is 1
        return cls(path, sizes, model.get("scale_factor"), shift)


def described_beside(weights: Path, state: Mapping[str, Deferred]) -> Described | None:
    """What YAML files say of the network whose tensors `state` (SAT's names; may be empty) lie in the file `weights`.

    Raises:
        ConvertError: two of them differ.
    """
    found = list(_fitting(weights.resolve(), state))
    for name in ("sizes", "scale_factor", "shift_scale"):
        said = {value: d.path for d in found if (value := getattr(d, name)) is not None}
        if len(said) > 1:
            raise ConvertError(f"{' and '.join(map(str, said.values()))} say different things of {weights}: name the "
                               "right one with --config.")  # fmt: skip
    return max(found, key=lambda d: (d.scale_factor is not None) + (d.shift_scale is not None), default=None)


def _fitting(weights: Path, state: Mapping[str, Deferred]) -> Iterator[Described]:
    for path in _candidates(weights):
        try:
            described = Described.read(path)
            sizes = described.sizes.in_form_of(state)
            if state:
                sizes.check(state, str(weights))
        except SgmError:  # not a model's, or another model's
            continue
        yield replace(described, sizes=sizes)


def _candidates(weights: Path) -> Iterator[Path]:
    folders = weights.parents[:ABOVE]
    for folder in folders:
        yield from sorted(folder.glob("*.yaml"))
    for path in sorted(CONFIGS.glob("*.yaml")):
        load = (merge_yaml([path]).get("args") or {}).get("load")
        if load and Path(found_path(load)).resolve() in (weights, *folders):
            yield path

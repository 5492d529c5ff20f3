"""Weights into the parts of an engine that was built on the meta device: network with adapters, VAE, text encoder.

Loading is strict. A transformer file may leave out only what its configuration determines (`allow_absent`): the
sin-cos position table and the rotary models' unused position embedding, which the published files lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm.distributed import model_parallel_rank, model_parallel_world_size
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.conditioner import GeneralConditioner
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.transformer.lora_state import MAGNITUDE, collect_pairs, replaced_parts, split_further, split_lora
from sgm.modules.transformer.patch_embed import PATCHES, with_image_channels
from sgm.places import CONFIGS
from sgm.weights import WeightsError, assign_state, weights_fingerprint
from sgm.weights.checksums import verifying
from sgm.weights.files import while_files_change
from sgm.weights.identify import fitting_configs, what_is
from sgm.weights.release import Adapter, Checkpoint, read_transformer
from sgm.weights.save import require_finite
from sgm.weights.tensor_parallel import partition_state

if TYPE_CHECKING:
    from sgm.models.network import DiffusionTransformer  # at run time its `target:` brings it, and SAT with it


@dataclass
class LoadedNetwork:
    """What was loaded into the network, for the record of a run."""

    source: str
    iteration: int | None
    fingerprint: str
    adapters: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    merged: set[str] = field(default_factory=set)  # linears whose weights adapters were added to
    replaced: set[str] = field(default_factory=set)  # entries that an adapter has in place of the file's


@verifying()
def load_network(
    network: DiffusionTransformer,
    path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    allow_absent: bool,
    adapters: Sequence[Adapter] = (),
    read: Callable[[str], Checkpoint] = read_transformer,
    merge: bool = False,
    trains: bool = False,
    add_image_channels: bool = False,
) -> LoadedNetwork:
    """Fill a `DiffusionTransformer` built on meta with `defer_lora=True`, then attach or merge adapters.

    LoRA matrices in the checkpoint itself count as an adapter of scale 1. One adapter is attached beside the weights
    unless `merge`; several are always merged. Further mixins that are configured are attached, too, with what the
    checkpoint or one of the adapters holds of them. Parts that were trained whole beside an adapter take the place of
    the checkpoint's.

    Args:
        read: gives the entries of an adapter's file in SAT's layout; those of other trainers need another reader.
        trains: further mixins that no file has anything of are to be trained from their initial values.
        add_image_channels: a text-to-video model's file is to become an image-to-video network, whose patch projection
            reads nothing of pictures yet.
    Raises:
        WeightsError: unreadable file, wrong model, missing, unexpected or misshapen entries (all listed).
    """
    checkpoint, fingerprint = while_files_change(lambda: (c := read_transformer(path), weights_fingerprint(c.files[0])))
    own = _Parts.of(Adapter(str(path)), checkpoint)
    if (own.lora or own.mixins) and (not own.base or own.replaced):
        raise WeightsError(
            f"{checkpoint.source} holds {own.kind} without base weights. Set args.load to the base model; when "
            f"sampling, name the adapter in args.lora ({path})."
        )
    loaded = LoadedNetwork(checkpoint.source, checkpoint.iteration, fingerprint)
    added = [_adapter_parts(adapter, read(adapter.path)) for adapter in adapters]
    replaced = _replaced(added)
    loaded.replaced |= replaced.keys()
    base = own.base | replaced
    if add_image_channels:
        base = _with_image_channels(network, base, loaded)
    source = " with ".join([checkpoint.source, *(parts.file.source for parts in added if parts.replaced)])
    _assign_base(network, base, source, device, dtype, allow_absent, loaded)
    _attach_further(network, [own, *added], device, trains, loaded)
    _apply_adapters(network, [own, *added], merge, loaded)
    if not any(parts.lora for parts in (own, *added)) and network.has_lora_config:
        loaded.notes.append(f"lora_config is set, but {checkpoint.source} holds no LoRA: running the base model")
    return loaded


@verifying()
def replace_adapters(
    network: DiffusionTransformer,
    loaded: LoadedNetwork,
    path: str | Path,
    adapters: Sequence[Adapter],
    *,
    read: Callable[[str], Checkpoint] = read_transformer,
    merge: bool = False,
) -> None:
    """Put other adapters onto a network that `load_network` has filled from `path`; `loaded` says so then.

    The base stays where it is: adapters beside it are taken off, and weights that some were merged into, or that they
    had in place of the base's, are read again.

    Raises:
        WeightsError: as `load_network`; or the base's file is another one by now, a file holds further mixins, which
            stay where they were put, or without an adapter's part the base does not fit the network.
    """
    checkpoint, fingerprint = while_files_change(lambda: (c := read_transformer(path), weights_fingerprint(c.files[0])))
    if fingerprint != loaded.fingerprint:
        raise WeightsError(f"{checkpoint.source} has changed since it was loaded; load the model again.")
    own = _Parts.of(Adapter(str(path)), checkpoint)
    every = [own, *(_adapter_parts(adapter, read(adapter.path)) for adapter in adapters)]
    further = [parts.file.source for parts in every if parts.mixins]
    if further or network.further_configs:
        raise WeightsError(
            f"{', '.join(further) or 'the configuration'} names mixins beyond a release's own, which cannot be taken "
            "off a network; load a second model for other adapters."
        )
    from sgm.models.adapters import restore_base

    replaced = _replaced(every[1:])
    restore_base(network, network.in_own_form(own.base | replaced), loaded.merged, loaded.replaced | replaced.keys())
    loaded.merged.clear()
    loaded.replaced = set(replaced)
    loaded.adapters.clear()
    _apply_adapters(network, every, merge, loaded)


def _apply_adapters(network: DiffusionTransformer, every: Sequence[_Parts], merge: bool, loaded: LoadedNetwork) -> None:
    """Those of the base's file, which is the first, and of the adapters'."""
    found = _in_order([parts for parts in every if parts.lora])
    for parts in found:
        require_finite(parts.lora, parts.file.source)
        loaded.notes += [note for note in parts.file.notes if note not in loaded.notes]
        _apply_adapter(network, parts, merge or len(found) > 1, loaded)
    loaded.adapters += [
        f"{parts.file.source} x {parts.adapter.scale:g}" for k, parts in enumerate(every) if parts.lora or k
    ]


def _assign_base(
    network: DiffusionTransformer,
    base: Mapping[str, Tensor],
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    allow_absent: bool,
    loaded: LoadedNetwork,
) -> None:
    base = network.in_own_form(base)
    computed = network.computed_state()
    absent = sorted(name for name in computed if name not in base)
    if absent and not allow_absent:
        raise WeightsError(
            f"{source} lacks {', '.join(absent)}, which the configuration determines "
            "(the published files lack it too). Set args.force_inference: True (training: args.force_train: True) to "
            "compute it."
        )
    if absent:
        loaded.notes.append(f"computed from the configuration: {', '.join(absent)}")

    unused = {name: torch.zeros(network.state_dict()[name].shape) for name in network.dead_keys() if name not in base}
    whole = {**{name: computed[name] for name in absent}, **unused, **base}
    state = partition_state(whole, model_parallel_rank(), model_parallel_world_size())
    assign_state(network, state, source=source, device=device, dtype=dtype, hint=lambda: _hint(network, base))


def _hint(network: DiffusionTransformer, base: Mapping[str, Tensor]) -> str:
    fits = fitting_configs(base, CONFIGS)
    found = f"The file holds {what_is(base)}."
    found += f" This configuration fits: {', '.join(fits)}." if fits else " No shipped configuration fits it."
    if network.lacks_image_channels(base):
        found += " To train it to begin with a picture: args.add_image_channels: True (configs/image_to_video.yaml)."
    return found


@dataclass(frozen=True)
class _Parts:
    """What a file holds: the base's entries, LoRA's, and those of each further mixin under its own names."""

    adapter: Adapter
    file: Checkpoint
    base: dict[str, Tensor]
    lora: dict[str, Tensor]
    mixins: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, adapter: Adapter, file: Checkpoint) -> _Parts:
        release, mixins = split_further(file.network)
        return cls(adapter, file, *split_lora(release), mixins)

    @property
    def replaced(self) -> dict[str, Tensor]:
        """Of an adapter, parts of the base that were trained whole with it."""
        return replaced_parts(self.base, self.lora)

    @property
    def is_dora(self) -> bool:
        return any(map(MAGNITUDE.match, self.lora))

    @property
    def kind(self) -> str:
        """What it is where there is no base."""
        return "a LoRA adapter" if self.lora else f"what a run has trained of the mixin {' and '.join(self.mixins)}"


def _in_order(found: list[_Parts]) -> list[_Parts]:
    """A DoRA first: the norms that it was trained for are those of the base's rows.

    Raises:
        WeightsError: there are two of them.
    """
    dora = [parts.file.source for parts in found if parts.is_dora]
    if len(dora) > 1:
        raise WeightsError(
            f"{' and '.join(dora)} are both DoRA, each for the base's own weights; only one of them can be used."
        )
    return sorted(found, key=lambda parts: not parts.is_dora)


def _adapter_parts(adapter: Adapter, file: Checkpoint) -> _Parts:
    parts = _Parts.of(adapter, file)
    if not parts.lora and not parts.mixins:
        raise WeightsError(
            f"{parts.file.source} holds no LoRA matrices (matrix_A, matrix_B) but {what_is(parts.file.network)}."
        )
    unscaled = [*(f"the mixin {name}" for name in parts.mixins), *parts.replaced]
    if unscaled and adapter.scale != 1:
        raise WeightsError(
            f"{parts.file.source} x {adapter.scale:g}: {unscaled[0]} was trained whole and has no scale; leave it out."
        )
    return parts


def _replaced(adapters: Sequence[_Parts]) -> dict[str, Tensor]:
    """Parts that were trained whole, of all adapters. Raises WeightsError: two have the same."""
    found: dict[str, Tensor] = {}
    for parts in adapters:
        if common := sorted(found.keys() & parts.replaced.keys()):
            files = " and ".join(other.file.source for other in adapters if common[0] in other.replaced)
            raise WeightsError(f"{common[0]} was trained whole by {files}; only one of them can be used.")
        found |= parts.replaced
    return found


def _with_image_channels(
    network: DiffusionTransformer, base: dict[str, Tensor], loaded: LoadedNetwork
) -> dict[str, Tensor]:
    """Of a text-to-video model with the patch projection of an image-to-video one; of others as they are."""
    if not network.lacks_image_channels(base):
        return base
    loaded.notes.append("the picture's channels of the patch projection start from zero")
    return base | {PATCHES: with_image_channels(base[PATCHES])}


def _attach_further(
    network: DiffusionTransformer, sources: Sequence[_Parts], device: torch.device, trains: bool, loaded: LoadedNetwork
) -> None:
    """The configured mixins beyond a release's own, with their stored values."""
    network.attach_further()
    for name in network.further_configs:
        mixin = network.mixins[name].to(device)
        stored = [parts for parts in sources if name in parts.mixins]
        if len(stored) > 1:
            files = " and ".join(parts.file.source for parts in stored)
            raise WeightsError(f"the mixin {name!r} is in {files}; only one of them can be used.")
        if stored:
            assign_state(mixin, stored[0].mixins[name], source=f"mixin {name!r} of {stored[0].file.source}")
        elif mixin.state_dict() and not trains:
            raise WeightsError(
                f"modules.{name}_config is set, but {sources[0].file.source} holds nothing of that mixin: name the run "
                "that has trained it (args.lora), or leave the mixin out."
            )
        elif mixin.state_dict():
            loaded.notes.append(f"mixin {name!r} starts from its initial values")
    for parts in sources:
        lacking = [name for name in parts.mixins if name not in network.further_configs]
        if lacking:
            raise WeightsError(
                f"{parts.file.source} holds the mixin {' and '.join(lacking)}, which the configuration lacks: give "
                f"modules {' and '.join(f'{name}_config' for name in lacking)}, as the training_config.yaml and the "
                "infer.yaml of the run that made it have it."
            )


def _apply_adapter(network: DiffusionTransformer, parts: _Parts, merge: bool, loaded: LoadedNetwork) -> None:
    from sgm.models.adapters import apply_adapter

    source, scale = parts.file, parts.adapter.scale
    try:
        touched = collect_pairs(parts.lora).keys()
        loaded.merged |= touched  # also where it breaks off in the middle
        spec = apply_adapter(network, parts.lora, facts=source.lora, scale=scale, merge=merge)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{source.source}: {error}") from error
    if spec.only_folded and not merge:
        loaded.notes.append(f"{source.source} is folded into the weights: {spec.only_folded}")
    elif not merge:
        loaded.merged -= touched


@verifying()
def load_first_stage(stage: VideoAutoencoderInferenceWrapper, *, device: torch.device, dtype: torch.dtype) -> str:
    """Fill a VAE built on meta from its `ckpt_path`; returns the file's fingerprint."""
    if not stage.ckpt_path:
        raise WeightsError("first_stage_config has no ckpt_path: set it to the release's vae/3d-vae.pt.")
    stage.load_weights(device=device, dtype=dtype)
    return weights_fingerprint(stage.ckpt_path)


@verifying()
def load_text_encoder(conditioner: GeneralConditioner, *, device: torch.device, dtype: torch.dtype) -> str:
    """Fill every embedder of a conditioner built on meta; returns the first weight file's fingerprint of each.

    Raises:
        WeightsError: an embedder that does not read its weights from files, or files that do not fit.
    """
    fingerprints = []
    for embedder in conditioner.embedders:
        if not isinstance(embedder, FrozenT5Embedder):
            raise WeightsError(f"{type(embedder).__name__} is no text encoder whose weights can be read.")
        embedder.load_weights(device=device, dtype=dtype)
        fingerprints.append(weights_fingerprint(embedder.files.weights[0]))
    return " ".join(fingerprints)

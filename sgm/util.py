"""From the `target:` names of a YAML file to objects: the only dynamic import of the project.

A YAML file must not be able to run code, so a target is resolved only if its name starts with an allowed prefix, or
stands in the alias table, *and* the object found is a class (or a function that the table names) defined inside the
allowed packages. `sat.helpers.os.system` passes the first test and fails the second. And each slot takes classes of its
own `Role` only, which stands in the annotation of the constructor that reads it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sgm.errors import SgmError, first_line
from sgm.typed import Misfit, arguments, coerce, nearest, shown

_PREFIXES = ("sgm.", "sat.", "torch.nn.", "torch.optim.", "deepspeed.ops.")
ALLOWED_PREFIXES: list[str] = [*_PREFIXES]

_TRANSFORMER = "sgm.modules.transformer"
_VAE, _VAE_PARTS = "sgm.models.autoencoder", "sgm.modules.autoencoding"
_MIXINS = {
    "ImagePatchEmbeddingMixin": f"{_TRANSFORMER}.patch_embed.ImagePatchEmbeddingMixin",
    "Basic3DPositionEmbeddingMixin": f"{_TRANSFORMER}.positions.Basic3DPositionEmbeddingMixin",
    "Rotary3DPositionEmbeddingMixin": f"{_TRANSFORMER}.positions.Rotary3DPositionEmbeddingMixin",
    "AdaLNMixin": f"{_TRANSFORMER}.adaln.AdaLNMixin",
    "FinalLayerMixin": f"{_TRANSFORMER}.adaln.FinalLayerMixin",
    "DiffusionTransformer": "sgm.models.network.DiffusionTransformer",
}

# Names that the original keeps at its root, or elsewhere, and where the same thing lives here.
TARGET_ALIASES: dict[str, str] = {
    **{f"dit_video_concat.{name}": path for name, path in _MIXINS.items()},
    "diffusion_video.SATVideoDiffusionEngine": "sgm.models.diffusion.SATVideoDiffusionEngine",
    "data_video.SFTDataset": "sgm.data.dataset.SFTDataset",
    "data_video.VideoDataset": "sgm.data.dataset.VideoDataset",
    "sat.ops.FusedEmaAdam": "sgm.training.optimizers.ema_adam.FusedEmaAdam",
    "sat.model.finetune.lora2.LoraMixin": f"{_TRANSFORMER}.lora.LoraMixin",
    "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper": f"{_VAE}.VideoAutoencoderInferenceWrapper",
    "vae_modules.regularizers.DiagonalGaussianRegularizer": f"{_VAE_PARTS}.regularizers.DiagonalGaussianRegularizer",
    "vae_modules.cp_enc_dec.ContextParallelEncoder3D": f"{_VAE_PARTS}.coders.ContextParallelEncoder3D",
    "vae_modules.cp_enc_dec.ContextParallelDecoder3D": f"{_VAE_PARTS}.coders.ContextParallelDecoder3D",
    "sgm.modules.GeneralConditioner": "sgm.modules.conditioner.GeneralConditioner",
    "sgm.modules.encoders.modules.GeneralConditioner": "sgm.modules.conditioner.GeneralConditioner",
}


class TargetError(SgmError):
    """A `target:` cannot be resolved, is not allowed, or does not take the params given. The message says which."""


def allow_target(prefix: str) -> None:
    """Also accept targets whose name starts with `prefix` (a package of the user's own), for the whole process."""
    ALLOWED_PREFIXES.append(prefix if prefix.endswith(".") else prefix + ".")


def allowed_packages() -> list[str]:
    """Those that `allow_target` has added."""
    return [prefix.removesuffix(".") for prefix in ALLOWED_PREFIXES[len(_PREFIXES) :]]


Config = Mapping[str, Any]  # a node: `target`, and `params` for it


@dataclass(frozen=True)
class Role:
    """What a slot of a configuration takes, as an annotation of the argument that holds it: a node, or a class's name.

    Attributes:
        base: classes derived from it; by name where it is heavy to import.
        rooms: packages that they may be in, beside the user's own.
        given: arguments that the slot's reader adds; None: others may be missing, too.
        beside: TypedDict of what may stand beside `target`.
    """

    base: type | str
    rooms: tuple[str, ...] = ("sgm.",)
    given: tuple[str, ...] | None = ()
    beside: Any = None

    def fit(self, value: Any, place: str) -> Any:
        """The node with its place, checked with all that is below it. Raises Misfit."""
        try:
            if not isinstance(value, Mapping):
                self.find(value)
                return value
            target, params = split_config(value, tuple(self.beside.__annotations__) if self.beside else ())
            cls = self.find(target)
        except TargetError as error:
            raise Misfit(str(error), place=place) from error
        if self.beside:
            coerce({name: v for name, v in value.items() if name not in ("target", "params")}, self.beside, place)
        fitting = arguments(cls, params, f"{place}.params", self.given)
        node = Node({**value, "params": params | fitting} if "params" in value else value)
        node.place = place
        return node

    def find(self, name: str) -> Any:
        """The class of that name. Raises TargetError: there is none, or it is of another role."""
        if not self._takes(name):
            known = {get_obj_from_str(name): name for name in reversed(known_targets()) if self._takes(name)}
            raise TargetError(f"{name!r} has another role; choose {' or '.join(sorted(known.values()))}")
        return get_obj_from_str(name)

    def _takes(self, name: str) -> bool:
        found = get_obj_from_str(name)
        rooms = (*self.rooms, *ALLOWED_PREFIXES[len(_PREFIXES) :])
        base = get_obj_from_str(self.base) if isinstance(self.base, str) else self.base
        # a protocol takes no class by its mere form
        return TARGET_ALIASES.get(name, name).startswith(rooms) and base in inspect.getmro(found)


class Node(dict[str, Any]):
    """A checked `target:` node that knows its place in the configuration."""

    place = ""


def get_obj_from_str(name: str) -> Any:
    """The class (or function named in the alias table) behind a dotted target name.

    Raises:
        TargetError: outside the allow-list, no such module or attribute, one that cannot be imported, or not a class
            defined inside the list.
    """
    resolved = TARGET_ALIASES.get(name, name)
    if not resolved.startswith(tuple(ALLOWED_PREFIXES)):
        raise TargetError(
            f"target {shown(name)} is not allowed: a configuration may only name classes under "
            f"{', '.join(p + '*' for p in ALLOWED_PREFIXES)} or the original's own names. "
            f"For code of your own that you trust, add --allow-target {name.split('.', maxsplit=1)[0]}."
        )
    module_name, _, attribute = resolved.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module_name.startswith(error.name or "\0"):
            raise TargetError(f"target {name!r} cannot be imported: {error}") from error
        raise TargetError(f"unknown target {shown(name)}{nearest(name, known_targets()) or '.'}") from error
    except Exception as error:  # whatever another package's module does when it is imported
        raise TargetError(f"target {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    home = (getattr(found, "__module__", None) or "") + "."
    callable_kind = inspect.isclass(found) or (inspect.isfunction(found) and name in TARGET_ALIASES)
    if not callable_kind or not home.startswith(tuple(ALLOWED_PREFIXES)):
        raise TargetError(
            f"target {name!r} is not allowed: it resolves to {found!r}, which is not a class of the allowed packages."
        )
    return found


def known_targets() -> list[str]:
    """Names that shipped and upstream YAML files use, for suggestions."""
    diffusion = "sgm.modules.diffusionmodules."
    return [
        *TARGET_ALIASES,
        *TARGET_ALIASES.values(),
        f"{diffusion}denoiser.DiscreteDenoiser",
        *(f"{diffusion}denoiser_weighting.{n}Weighting" for n in ("Unit", "EDM", "V", "Eps")),
        *(f"{diffusion}denoiser_scaling.{n}Scaling" for n in ("Video", "V", "Eps", "EDM")),
        *(f"{diffusion}discretizer.{n}DDPMDiscretization" for n in ("ZeroSNR", "Legacy")),
        *(f"{diffusion}guiders.{n}" for n in ("DynamicCFG", "VanillaCFG", "IdentityGuider")),
        *(f"{diffusion}sampling.{n}Sampler" for n in ("VPSDEDPMPP2M", "VPODEDPMPP2M", "VideoDDIM")),
        f"{diffusion}loss.VideoDiffusionLoss",
        f"{diffusion}sigma_sampling.DiscreteSampling",
        "sgm.modules.encoders.modules.FrozenT5Embedder",
        "torch.nn.Identity",
    ]


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object that `{"target": name, "params": {...}}` describes; `extra` are further keyword arguments.

    Raises:
        TargetError: see `get_obj_from_str` and `check_params`; `config` has no `target`; or the constructor refuses
            the values. Further errors of the constructor say where in the configuration it stands.
    """
    target, params = split_config(config, config if isinstance(config, Node) else ())
    place = getattr(config, "place", "")
    cls = get_obj_from_str(target)
    kept = check_params(target, cls, params, f"{place}.params" if place else target, tuple(extra))
    try:
        return cls(**kept, **extra)
    except SgmError as error:
        if place and not hasattr(error, "__notes__"):
            error.add_note(f"at {place}")
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise TargetError(f"{place or target}: {first_line(error)}") from error


def split_config(config: Mapping[str, Any], beside: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """(target, params) of a config node, checked for form.

    Args:
        beside: what else may stand beside the two.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("target"), str):
        found = dict(config) if isinstance(config, Mapping) else config
        raise TargetError(f"expected a mapping with `target:` (and `params:`), got {shown(found)}.")
    stray = [str(key) for key in config if key not in ("target", "params", *beside)]
    if stray:
        raise TargetError(
            f"{config['target']}: {', '.join(stray)} stands beside `target:`; arguments belong under `params:`."
        )
    params = {} if config.get("params") is None else config["params"]
    if not isinstance(params, Mapping):
        raise TargetError(f"{config['target']}: `params:` must be a mapping, it is {shown(params)}.")
    return config["target"], dict(params)


def check_params(
    target: str, cls: Any, params: Mapping[str, Any], place: str = "", given: Collection[str] = ()
) -> dict[str, Any]:
    """`params` as the constructor takes them, checked against its signature.

    Numbers given as text, and whole numbers given as 50.0, become what the annotation says.

    Args:
        place: where they stand. given: arguments that the caller adds.
    Raises:
        TargetError: names every parameter that is unknown or missing, and every value that its annotation excludes.
    """
    try:
        return arguments(cls, params, place or target, given)
    except Misfit as error:
        raise TargetError(str(error)) from error

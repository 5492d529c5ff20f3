"""From the `target:` names of a YAML file to objects: the only dynamic import of the project.

A YAML file must not be able to run code, so a target is resolved only if its name starts with an allowed prefix, or
stands in the alias table, *and* the object found is a class (or a function that the table names) defined inside the
allowed packages. `sat.helpers.os.system` passes the first test and fails the second.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from sgm.errors import SgmError
from sgm.typed import argument_types, nearest, typed

logger = logging.getLogger(__name__)

ALLOWED_PREFIXES: list[str] = ["sgm.", "sat.", "torch.nn.", "torch.optim.", "deepspeed.ops."]

_TRANSFORMER = "sgm.modules.transformer"
_VAE, _VAE_PARTS = "sgm.models.autoencoder", "sgm.modules.autoencoding"
_MIXINS = {
    "ImagePatchEmbeddingMixin": f"{_TRANSFORMER}.patch_embed.ImagePatchEmbeddingMixin",
    "Basic3DPositionEmbeddingMixin": f"{_TRANSFORMER}.positions.Basic3DPositionEmbeddingMixin",
    "Rotary3DPositionEmbeddingMixin": f"{_TRANSFORMER}.positions.Rotary3DPositionEmbeddingMixin",
    "AdaLNMixin": f"{_TRANSFORMER}.adaln.AdaLNMixin",
    "FinalLayerMixin": f"{_TRANSFORMER}.final_layer.FinalLayerMixin",
    "DiffusionTransformer": "sgm.models.network.DiffusionTransformer",
}

# Names that the original keeps at its root, or elsewhere, and where the same thing lives here.
TARGET_ALIASES: dict[str, str] = {
    **{f"dit_video_concat.{name}": path for name, path in _MIXINS.items()},
    "diffusion_video.SATVideoDiffusionEngine": "sgm.models.diffusion.SATVideoDiffusionEngine",
    "data_video.SFTDataset": "sgm.data.dataset.SFTDataset",
    "data_video.VideoDataset": "sgm.data.shards.VideoDataset",
    "sat.ops.FusedEmaAdam": "sgm.training.optimizers.ema_adam.FusedEmaAdam",
    "sat.model.finetune.lora2.LoraMixin": f"{_TRANSFORMER}.lora.LoraMixin",
    "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper": f"{_VAE}.VideoAutoencoderInferenceWrapper",
    "vae_modules.regularizers.DiagonalGaussianRegularizer": f"{_VAE_PARTS}.regularizers.DiagonalGaussianRegularizer",
    "vae_modules.cp_enc_dec.ContextParallelEncoder3D": f"{_VAE_PARTS}.coders.ContextParallelEncoder3D",
    "vae_modules.cp_enc_dec.ContextParallelDecoder3D": f"{_VAE_PARTS}.coders.ContextParallelDecoder3D",
    "sgm.modules.GeneralConditioner": "sgm.modules.conditioner.GeneralConditioner",
    "sgm.modules.encoders.modules.GeneralConditioner": "sgm.modules.conditioner.GeneralConditioner",
}

# Parameters that YAML files of the original carry although its classes make nothing of them.
NO_EFFECT_PARAMS: dict[str, frozenset[str]] = {
    "sgm.models.network.DiffusionTransformer": frozenset({"adm_in_channels"}),
}

_warned_no_effect: set[tuple[str, str]] = set()


class TargetError(SgmError):
    """A `target:` cannot be resolved, is not allowed, or does not take the params given. The message says which."""


def allow_target(prefix: str) -> None:
    """Also accept targets whose name starts with `prefix` (a package of the user's own), for the whole process."""
    ALLOWED_PREFIXES.append(prefix if prefix.endswith(".") else prefix + ".")


def get_obj_from_str(name: str) -> Any:
    """The class (or function named in the alias table) behind a dotted target name.

    Raises:
        TargetError: outside the allow-list, no such module or attribute, or not a class defined inside the list.
    """
    resolved = TARGET_ALIASES.get(name, name)
    if not resolved.startswith(tuple(ALLOWED_PREFIXES)):
        raise TargetError(
            f"target {name!r} is not allowed: a configuration may only name classes under "
            f"{', '.join(p + '*' for p in ALLOWED_PREFIXES)} or the original's own names. "
            f"For code of your own that you trust, add --allow-target {name.split('.', maxsplit=1)[0]}."
        )
    module_name, _, attribute = resolved.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module exists and lacks a dependency: that is another matter
        raise TargetError(_unknown_target(name)) from error
    except AttributeError as error:
        raise TargetError(_unknown_target(name)) from error
    _check_inside(name, found)
    return found


def _check_inside(name: str, found: Any) -> None:
    home = (getattr(found, "__module__", None) or "") + "."
    callable_kind = inspect.isclass(found) or (inspect.isfunction(found) and name in TARGET_ALIASES)
    if not callable_kind or not home.startswith(tuple(ALLOWED_PREFIXES)):
        raise TargetError(
            f"target {name!r} is not allowed: it resolves to {found!r}, which is not a class of the allowed packages."
        )


def _unknown_target(name: str) -> str:
    return f"unknown target {name!r}" + (nearest(name, known_targets()) or ".")


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
        TargetError: see `get_obj_from_str` and `check_params`; or `config` has no `target`.
    """
    target, params = split_config(config)
    cls = get_obj_from_str(target)
    return cls(**check_params(target, cls, params), **extra)


def split_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(target, params) of a config node, checked for form."""
    if not isinstance(config, Mapping) or "target" not in config:
        shown = dict(config) if isinstance(config, Mapping) else config
        raise TargetError(f"expected a mapping with `target:` (and `params:`), got {shown!r}.")
    stray = [str(key) for key in config if key not in ("target", "params")]
    if stray and not _SIBLINGS.keys() >= set(stray):
        raise TargetError(
            f"{config['target']}: {', '.join(stray)} stands beside `target:`; arguments belong under `params:`."
        )
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise TargetError(f"{config['target']}: `params:` must be a mapping, it is {params!r}.")
    return str(config["target"]), dict(params)


# Keys that the conditioner reads from beside an embedder's `target:`, with their types.
_SIBLINGS: dict[str, Any] = {
    "is_trainable": bool, "input_key": str, "input_keys": Any, "ucg_rate": float, "legacy_ucg_value": Any, "name": Any,
}  # fmt: skip


def check_params(target: str, cls: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` as the constructor takes them: checked against its signature, without the known no-effect names.

    Numbers given as text, and whole numbers given as 50.0, become what the annotation says.

    Raises:
        TargetError: names the unknown parameter and the nearest valid one, or the first value of a wrong type.
    """
    kept = _known_params(target, cls, params)
    values, problems = typed(kept, argument_types(cls))
    for name, problem in problems.items():
        raise TargetError(f"{target}: `{name}`: {problem}")
    return values


def _known_params(target: str, cls: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    resolved = TARGET_ALIASES.get(target, target)
    idle = NO_EFFECT_PARAMS.get(resolved, frozenset())
    for name in sorted(idle & set(params)):
        if (resolved, name) not in _warned_no_effect:
            _warned_no_effect.add((resolved, name))
            logger.info("%s: `%s` has no effect (nor in the original)", target, name)
    kept = {name: value for name, value in params.items() if name not in idle}
    accepted = _accepted_names(cls)
    if accepted is not None:
        for name in kept:
            if name not in accepted:
                raise TargetError(_unknown_param(target, name, accepted))
    return kept


def _accepted_names(cls: Any) -> list[str] | None:
    """Keyword names that the constructor takes; None where it takes any (`**kwargs`)."""
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _unknown_param(target: str, name: str, accepted: list[str]) -> str:
    hint = nearest(name, accepted) or f"; it takes: {', '.join(accepted) or 'nothing'}."
    return f"{target} takes no parameter `{name}`{hint}"


def check_tree(config: Any, place: str = "model") -> list[str]:
    """Problems of every `target:` node below `config` (found without building anything), as readable lines."""
    problems: list[str] = []
    if isinstance(config, Mapping):
        if "target" in config:
            try:
                target, params = split_config(config)
                cls = get_obj_from_str(target)
                wrong = typed(_known_params(target, cls, params), argument_types(cls))[1]
                problems += [f"{place}.params.{name}: {problem}" for name, problem in wrong.items()]
                problems += [f"{place}.{name}: {problem}" for name, problem in typed(config, _SIBLINGS)[1].items()]
            except TargetError as error:
                problems.append(f"{place}: {error}")
        for key, value in config.items():
            problems += check_tree(value, f"{place}.{key}")
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            problems += check_tree(value, f"{place}[{index}]")
    return problems

"""Run configuration: YAML files, `--set` overrides and flags become one typed, checked record.

Precedence: defaults < YAML files in order < `--set key=value` < named flags. (The original lets YAML beat the command
line.) Every problem found is reported at once. A run keeps its resolved configuration beside its results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Generic

from sgm.files import refuse_lfs_pointer
from sgm.places import CONFIGS
from sgm.secrets import environment_value, holds_secret
from sgm.typed import Args, ConfigError, Misfit, arguments, build_args, listing, nearest, option

Place = tuple[str | int, ...]  # keys down to a value
SECTIONS = ("args", "model", "data", "deepspeed", "accelerate")

# Every option of the original's parsers. A name that the running mode does not use is accepted and named once.
UPSTREAM_ARGS = frozenset(
    """batch_from_same_dataset batch_size bf16 block_size checkpoint_activations checkpoint_num_layers
    checkpoint_skip_layers cuda debug deepscale deepscale_config deepspeed deepspeed_activation_checkpointing
    deepspeed_config device distributed_backend epochs eval_batch_size eval_interval eval_iters exit_interval
    experiment_name final_size force_inference force_pretrain force_train fp16 gradient_accumulation_steps
    grid_num_rows image2video input_dir input_file input_type iterable_dataset iterable_dataset_eval latent_channels
    lcm_steps load local_rank log_image log_interval lr lr_decay_iters lr_decay_ratio lr_decay_style mode
    model_parallel_size no_load_rng no_save_rng num_workers only_log_video_latents only_save_latents output_dir
    prefetch_factor profiling rank resume_dataloader sampling_fps sampling_image_size sampling_num_frames
    sampling_video_size save save_args save_interval sdedit seed split strict_eval summary_dir test_data train_data
    train_data_weights train_iters valid_data wandb wandb_project_name warmup weight_decay world_size
    zero_stage""".split()
)


# Configurations that the original's commands and guides name, and what takes their place.
_MODELS = ("cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")
_OURS, _OURS_LORA = "configs/{0}_infer.yaml to sample, configs/{0}_sft.yaml to train", "configs/{0}_sft.yaml {1}"
UPSTREAM_FILES = {
    "inference.yaml": "configs/cogvideox_2b_infer.yaml, which has the model's section, too",
    "sft.yaml": "configs/cogvideox_2b_sft.yaml, which has the model's section, too",
    **{f"{name}.yaml": _OURS.format(name) for name in _MODELS},
    **{f"{name}_lora.yaml": _OURS_LORA.format(name, "configs/lora.yaml") for name in _MODELS[:3]},
}

# Keys of `model:` that the original's later files have, and that have no effect.
IDLE_MODEL_KEYS = ("augmentation_dropout", "lora_train", "use_pd", "lr_scale", "en_and_decode_n_samples_a_time")

EXACT = ("kernels", "attention", "cpu_bf16")  # switches of `accelerate:` with the same result within rounding

# Fast mode of earlier versions, by values that turned it off, and how its options began: saved configurations have all.
_PATTERNS = {"step_cache": False, "guidance_every": 1, "guidance_least": 0}
_PATTERN_OPTIONS = ("step_cache_", "guidance_keep_")


@dataclass(frozen=True)
class AccelerateArgs:
    """The `accelerate:` section: faster ways to the same result, and from `reuse_error` on, to nearly the same."""

    kernels: str = option(
        "plain",
        "operations between the matrix products: plain (PyTorch), triton (fused, needs an NVIDIA GPU), auto (triton "
        "on a GPU, else plain)",
        choices=("auto", "plain", "triton"),
    )
    attention: str = option(
        "default",
        "implementation of attention that is tried first: default (PyTorch chooses), cudnn, flash, flash4 (GPUs of "
        "compute capability 9 and 10; docs/installation.md says how its package is installed)",
        choices=("default", "cudnn", "flash", "flash4"),
    )
    cpu_bf16: bool | str = option(
        False,
        "matrix products of the transformer and convolutions of the VAE in bfloat16 on a CPU, weights and all else as "
        "they are: auto where the CPU has instructions for them (AVX512-BF16, AMX), true also elsewhere, where it is "
        "slow; no effect on a GPU",
        choices=(False, True, "auto"),
    )
    reuse_error: float = option(
        0.0,
        "fast mode by measured errors: an earlier answer of the network stands in for its next ones while the errors "
        "expected of it, added up, stay below this (root mean square in the latents, which have about 0.8); 0: never",
        at_least=0,
    )
    reuse_keep_first: int = option(3, "so many first steps always ask the network", at_least=3)
    reuse_keep_last: int = option(1, "so many last steps always ask the network", at_least=0)
    guidance_interval: list[float] = option(
        [0.0, 1.0], "part of the run, from 0 (noise) to 1, that is guided; outside it one call a step does"
    )
    fp8: bool = option(False, "the blocks' linear layers in 8-bit floats (GPUs from capability 8.9 on; CPU: simulated)")

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ConfigError(
                f"accelerate.guidance_interval is {interval}; it must be [start, end] with 0 <= start < end <= 1"
            )

    def approximate(self) -> dict[str, Any]:
        """The switches that change results, where they are on; the options of `reuse_error` with it only."""
        defaults = dataclasses.asdict(AccelerateArgs())
        given = {n: v for n, v in dataclasses.asdict(self).items() if n not in EXACT}
        return {n: v for n, v in given.items() if (self.reuse_error if n.startswith("reuse") else v != defaults[n])}


@dataclass(frozen=True)
class RunConfig(Generic[Args]):
    """One run's resolved configuration. `args` is typed; the other sections are plain mappings (None when absent)."""

    args: Args
    model: dict[str, Any]
    data: dict[str, Any] | None
    deepspeed: dict[str, Any] | None
    accelerate: AccelerateArgs
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    written: Mapping[Place, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All sections as a YAML file says them: what came from the environment as the interpolation that it was."""
        return typing.cast("dict[str, Any]", _as_written(self._content(), self.written))

    def _content(self) -> dict[str, Any]:
        sections = {"args": dataclasses.asdict(self.args), "model": self.model, "data": self.data}
        sections |= {"deepspeed": self.deepspeed, "accelerate": dataclasses.asdict(self.accelerate)}
        return {name: value for name, value in sections.items() if value is not None}

    def as_yaml(self) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))

    def hash(self, sections: Iterable[str] = ("model",)) -> str:
        """Identity of the named sections (12 hex digits)."""
        content = {name: value for name, value in self._content().items() if name in set(sections)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def load_run_config(
    files: Sequence[str | Path],
    args_type: type[Args],
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunConfig[Args]:
    """Merge, type-check and resolve.

    Args:
        args_type: dataclass of `option` fields that the `args:` section fills; names in its `IDLE` are accepted, too.
        overrides: `a.b=c` texts of `--set`; the value is read as YAML, but `{your_path}` as text.
        flags: named command-line flags, `args` names to values; None values are left out.
    Raises:
        ConfigError: listing every problem.
    """
    merged, written = _merge(files, overrides)
    problems: list[str] = []
    notes: list[str] = []
    problems += [f"unknown section `{n}`{nearest(n, SECTIONS)}" for n in merged if n not in SECTIONS]
    sections = {name: _section(merged, name, problems) for name in SECTIONS}
    given = dict(sections["args"] or {})
    given.update({k: v for k, v in (flags or {}).items() if v is not None})
    flagged = {("args", k) for k, v in (flags or {}).items() if v is not None}
    args = build_args(args_type, given, problems, notes, idle=UPSTREAM_ARGS | getattr(args_type, "IDLE", frozenset()))
    accelerate = build_args(
        AccelerateArgs, _without_patterns(sections["accelerate"] or {}, problems, notes), problems, notes, "accelerate"
    )
    model = sections["model"] or {}
    _mend_log_keys(model, notes)
    notes += [f"{place} has no effect (nor in the original)" for place in _idle_places(model)]
    _take_clips_for_pixels(model, sections["data"] or {}, notes)
    if not model:
        problems.append("the configuration has no `model:` section")
    if problems or args is None or accelerate is None:
        options = ["the options given"] if overrides or flagged else []
        raise ConfigError(listing(problems, ", ".join([*map(str, files), *options])))
    return RunConfig(
        args, model, sections["data"], sections["deepspeed"], accelerate,
        tuple(Path(f) for f in files), tuple(notes),
        {place: text for place, text in written.items() if place[:2] not in flagged},
    )  # fmt: skip


# A placeholder such as {your_path}/vae: YAML would read a mapping with one key, or nothing valid.
_BRACED_WORD = re.compile(r"\{[^{}:,]*[^{}:,\s][^{}:,]*\}[^{}]*$")


def merge_yaml(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain mapping that the files and overrides give together."""
    return _merge(files, overrides)[0]


def _merge(files: Sequence[str | Path], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[Place, str]]:
    """The mapping, and what stands in it in place of values from the environment."""
    from omegaconf import OmegaConf

    OmegaConf.register_resolver("oc.env", environment_value, replace=True)
    place = ", ".join(map(str, files))
    merged = _as_config_error(place, lambda: OmegaConf.merge({}, *(_read_yaml(Path(file)) for file in files)))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected KEY=VALUE, for example --set args.seed=7")
        _as_config_error(f"--set {text!r}", partial(_override, merged, key.strip(), value.strip()))
    raw = OmegaConf.to_container(merged)
    plain = _as_config_error(place, partial(OmegaConf.to_container, merged, resolve=True, throw_on_missing=True))
    names = [(*at, key) for at, node in _nodes(plain) if isinstance(node, dict) for key in node]
    odd = [f"{'.'.join(map(str, name))} is no text, and so no name" for name in names if not isinstance(name[-1], str)]
    if odd:
        raise ConfigError(listing(odd, place))
    shown = {at: text for at, text in _nodes(raw) if _is_from_environment(text, reduce(getitem, at, plain))}
    return plain, shown


def _override(merged: Any, key: str, value: str) -> None:
    from omegaconf import OmegaConf

    read: Any = {"": value} if _BRACED_WORD.match(value) else OmegaConf.to_container(OmegaConf.create(f'"": {value}'))
    OmegaConf.update(merged, key, read[""], merge=False)


# What OmegaConf and PyYAML raise at a user's text; the last five are slips of theirs (`!!bool x`, `a: {a: {a: ...`).
_TEXT_ERRORS = (ValueError, OSError, TypeError, AttributeError, LookupError, RecursionError)


def _as_config_error(place: str, read: Callable[[], Any]) -> Any:
    """What `read` gives. Raises ConfigError: one line that says what is wrong at `place`."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return read()
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, *_TEXT_ERRORS) as error:
        key = getattr(error, "full_key", None)
        kind = "" if isinstance(error, YAMLError | OmegaConfBaseException | OSError) else f"{type(error).__name__}: "
        reason = str(error) if isinstance(error, YAMLError) else str(error).partition("\n")[0]
        raise ConfigError(f"{place}: {f'{key}: ' if key else ''}{kind}{' '.join(reason.split())}") from error


def _nodes(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything below a value, itself included, by its place."""
    yield place, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from _nodes(inner, (*place, key))


def _is_from_environment(text: Any, value: Any) -> bool:
    return isinstance(text, str) and "${" in text and ("oc.env" in text or holds_secret(value))


def _as_written(value: Any, written: Mapping[Place, str], place: Place = ()) -> Any:
    if place in written:
        return written[place]
    if isinstance(value, dict):
        return {key: _as_written(inner, written, (*place, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(inner, written, (*place, k)) for k, inner in enumerate(value)]
    # what looks like an interpolation and is none
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read_yaml(path: Path, below: tuple[Path, ...] = ()) -> Any:
    """A file laid over those that it extends; `below` are the files that extend it."""
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        why = ", which is a folder" * path.is_dir()
        raise ConfigError(f"no configuration file at {path}{why}{_nearby_configs(path)}")
    refuse_lfs_pointer(path, ConfigError)
    content = _as_config_error(f"{path} is not valid YAML", partial(OmegaConf.load, path))
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with the sections {', '.join(SECTIONS)}")
    named = content.pop("extends", [])
    bases = [_read_yaml(base, (*below, path)) for base in _bases(path, named, below)]
    return OmegaConf.merge(*bases, content) if bases else content


def _bases(path: Path, named: Any, below: tuple[Path, ...]) -> list[Path]:
    """The files that `path` extends: beside it, or among the shipped ones."""
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends must be a file, or a list of files, that this one is laid over")
    found = []
    for name in names:
        places = [path.parent / name, CONFIGS / name]
        found.append(next((place for place in places if place.is_file()), places[0]))
        if any(found[-1].samefile(file) for file in (*below, path) if found[-1].exists()):
            raise ConfigError(f"{path} extends {name}, which extends it in turn")
    return found


def _nearby_configs(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = sorted(str(p) for p in folder.glob("*.yaml"))
    ours = f"; its counterpart here: {UPSTREAM_FILES[path.name]}" if path.name in UPSTREAM_FILES else ""
    return ours or (f"; there are: {', '.join(found)}" if found else "")


def _section(merged: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any] | None:
    value = merged.get(name)
    if value is None or isinstance(value, dict):
        return value
    problems.append(f"section `{name}` must be a mapping, it is {value!r}")
    return None


def _mend_log_keys(model: dict[str, Any], notes: list[str]) -> None:
    """The original's guide prints `- txt'`; YAML reads that as the text "txt'"."""
    keys = model.get("log_keys")
    if not isinstance(keys, list):
        return
    mended = [k.strip("'\"") if isinstance(k, str) else k for k in keys]
    if mended != keys:
        notes.append(f"model.log_keys {keys} has a stray quote; read as {mended}")
        model["log_keys"] = mended


def _without_patterns(given: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The `accelerate:` section without the switches of earlier versions, which must be off."""
    gone = [name for name in given if name in _PATTERNS or name.startswith(_PATTERN_OPTIONS)]
    names = f"accelerate: {', '.join(gone)}"
    if any(given[name] != _PATTERNS.get(name, given[name]) for name in gone):
        problems.append(
            f"{names}: fast mode in a pattern has gone, as measured errors do better: leave out these keys, and set "
            "accelerate.reuse_error (--set accelerate.reuse_error=0.5 is what configs/fast.yaml has)"
        )
    elif gone:
        notes.append(f"{names}: of earlier versions, without effect")
    return {name: value for name, value in given.items() if name not in gone}


def _take_clips_for_pixels(model: dict[str, Any], data: Mapping[str, Any], notes: list[str]) -> None:
    """The original's file for 1.5 says `latent_input: true`, and its data sets give pixels (it cannot train so)."""
    if model.get("latent_input") and str(data.get("target")).startswith(("data_video.", "sgm.data.")):
        notes.append("model.latent_input is taken for false: the data set gives pixels (args.cache_dir keeps latents)")
        model["latent_input"] = False


def _idle_places(model: Mapping[str, Any]) -> list[str]:
    """Places of a model section whose values nothing reads."""
    found = [f"model.{name}" for name in IDLE_MODEL_KEYS if model.get(name)]
    match model:
        case {
            "network_config": {
                "params": {"modules": {"pos_embed_config": {"target": str(kind), "params": dict(given)}}}
            }
        }:
            place = "model.network_config.params.modules.pos_embed_config.params"
            if kind.endswith("Rotary3DPositionEmbeddingMixin"):
                found += [f"{place}.{name}" for name in given if name.endswith("_interpolation")]
    return found


def check_model_section(model: Mapping[str, Any], engine: type) -> dict[str, Any]:
    """The `model:` section with each value of its type, every key and `target:` checked; builds nothing.

    Raises:
        ConfigError: listing every problem.
    """
    problems: list[str] = []
    found: dict[str, Any] = {}
    try:
        found = arguments(engine, model, "model", ())
    except Misfit as error:
        problems += error.problems
    problems += _image_problems(model)
    if problems:
        raise ConfigError(listing(problems, "the model section"))
    return typing.cast("dict[str, Any]", _plain(found))


def _image_problems(model: Mapping[str, Any]) -> list[str]:
    """Whether the keys of image-to-video models fit each other and the network's channels."""
    reads = model.get("noised_image_input")
    problems = []
    match model:
        case {"network_config": {"params": {"in_channels": int(taken), "out_channels": int(given)}}}:
            if taken not in (given, 2 * given):
                problems.append(
                    f"model.network_config.params: in_channels is {taken}; with out_channels {given} a text-to-video "
                    f"network takes {given} and an image-to-video one {2 * given}"
                )
            elif reads is not None and bool(reads) != (taken > given):
                problems.append(
                    f"model.noised_image_input is {str(reads).lower()}, but in_channels {taken} with out_channels "
                    f"{given} is of {'image' if taken > given else 'text'}-to-video networks"
                )
    if reads and model.get("latent_input"):
        problems.append(
            "model.latent_input: with noised_image_input the first frame's pixels are needed; set latent_input to false"
        )
    return problems


def _plain(value: Any) -> Any:
    """Mappings as those of YAML, all through."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value

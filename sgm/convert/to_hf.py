"""SAT's release layout into a diffusers pipeline folder.

What no tensor says of a model comes from the YAML file that lies beside the weights, or a shipped one that names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sgm.config import merge_yaml
from sgm.convert import hf_folder as hf
from sgm.convert import vae_keys
from sgm.convert.dit_keys import NOT_IN_HF, POSITIONS, hf_plan
from sgm.convert.dit_sizes import Sizes, read_sine_table, sizes_of_params, sizes_of_sat
from sgm.convert.hf_folder import FEW_STEPS, Component, one_few_steps, text_encoder
from sgm.convert.lazy import ConvertError, Deferred, all_deferred, cast, reshaped, summed_bytes
from sgm.convert.lora_files import adapter_in, merged, open_adapter, write_peft
from sgm.convert.output import SHARD_BYTES, whole_folder
from sgm.convert.sat_source import SatWeights, open_sat, open_vae
from sgm.errors import SgmError
from sgm.files import write_json
from sgm.modules.encoders import t5_files
from sgm.modules.transformer.lora_state import replaced_parts
from sgm.places import CONFIGS, found_path
from sgm.weights.identify import PUBLISHED
from sgm.weights.release import Adapter

_PATCH_HF = "patch_embed.proj.weight"
ABOVE = 3  # folders: of an iteration; of its run, or a release's transformer/; of the release


@dataclass(frozen=True)
class ToHf:
    """What to convert, from where, and how.

    Attributes:
        transformer: SAT checkpoint: file, iteration folder or release folder.
        vae: `3d-vae.pt`; None takes the one in the transformer's checkpoint, if it carries one.
        text_encoder: folder or hub id of the T5; its weights may be missing if the checkpoint carries them.
        dtype: of all weights; None means the transformer's own half precision, or where it has none float16 for 2B
            and bfloat16 for the others.
        adapters: LoRA files to fold in, beside the checkpoint's own.
        lora_alpha: alpha of the checkpoint's own adapter; None believes the file, then SAT's 1.
        config: YAML that says what no tensor does: clip size, text length, scale factor, the schedule's shift. None
            looks beside the weights.
        scheduler: "dpm" (the counterpart of SAT's sampler) or "ddim".
        partial: write the components that there are, without a pipeline around them; a VAE that diffusers cannot hold
            is left out.
    """

    output: Path
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: str | None = None
    cache_dir: str | None = None
    dtype: torch.dtype | None = None
    adapters: Sequence[Adapter] = ()
    lora_alpha: float | None = None
    config: Path | None = None
    scheduler: str = "dpm"
    shard_bytes: int = SHARD_BYTES
    partial: bool = False
    allow_drift: bool = False
    overwrite: bool = False

    def inputs(self) -> dict[str, Path]:
        named = {"--transformer_ckpt_path": self.transformer, "--vae_ckpt_path": self.vae, "--config": self.config}
        named |= {f"--lora {a.path}": Path(a.path) for a in self.adapters}
        if self.text_encoder and Path(self.text_encoder).exists():
            named["--text_encoder_path"] = Path(self.text_encoder)
        return {name: path for name, path in named.items() if path is not None}


def convert(request: ToHf) -> list[str]:
    """Write the folder; returns the report.

    Raises:
        ConvertError, WeightsError, SaveError, ...: what is wrong; nothing is left in `output` then.
    """
    weights = None if request.transformer is None else open_sat(request.transformer, allow_drift=request.allow_drift)
    described = _description(request, weights)
    parts, sizes, notes = _components(request, weights, described)
    missing = [name for name in ("transformer", "vae", "text_encoder") if name not in {p.name for p in parts}]
    if missing and not request.partial:
        options = {"transformer": "--transformer_ckpt_path", "vae": "--vae_ckpt_path",
                   "text_encoder": "--text_encoder_path"}  # fmt: skip
        raise ConvertError(
            f"a pipeline needs {', '.join(missing)}, too: give {', '.join(options[m] for m in missing)}, or convert "
            "the parts alone with --partial."
        )
    if not parts:
        raise ConvertError("nothing to convert: give --transformer_ckpt_path, --vae_ckpt_path or --text_encoder_path.")
    shift_scale = 0.0 if missing or sizes is None else _scale("shift_scale", described, sizes)
    needed = sum(summed_bytes(part.plan) for part in parts)
    with whole_folder(request.output, overwrite=request.overwrite, inputs=request.inputs(), needed=needed) as folder:
        for part in parts:
            part.write(folder / part.name, request.shard_bytes)
            if part.tokenizer:
                part.write_tokenizer(folder / "tokenizer")
        if not missing and sizes is not None:
            write_json(folder / "model_index.json", hf.model_index(sizes.takes_image, request.scheduler), indent=2)
            (folder / "scheduler").mkdir()
            schedule = hf.scheduler_config(shift_scale, request.scheduler)
            write_json(folder / "scheduler" / "scheduler_config.json", schedule, indent=2)
    lines = [line for part in parts for line in part.described()]
    absent = f" (no pipeline: {', '.join(missing)} absent)" if missing else ""
    return [*lines, *notes, f"written: {request.output}{absent}"]


def export_lora(request: ToHf, fold_scale: bool = True) -> list[str]:
    """Write the adapter of `request.transformer` alone, as `pytorch_lora_weights.safetensors`; returns the report.

    Raises:
        ConvertError: no checkpoint given, or one without adapter.
    """
    if request.transformer is None:
        raise ConvertError("--lora_only needs --transformer_ckpt_path, a checkpoint with an adapter.")
    adapter = open_adapter(request.transformer, request.lora_alpha)
    with whole_folder(request.output, overwrite=request.overwrite, inputs=request.inputs()) as folder:
        file = write_peft(folder, adapter, request.dtype, fold_scale)
    kept = "the matrices are unchanged, alpha is in the file's metadata"
    how = "alpha / r is in the matrices" if fold_scale and adapter.scaling != 1 else kept
    return [
        (f"adapter: {adapter}, scaling {adapter.scaling:g}, {len(adapter.modules)} linears ({how})"),
        f"written: {request.output / file.name}",
    ]


# --- components ------------------------------------------------------------------------------------------------------


def _description(request: ToHf, weights: SatWeights | None) -> Described | None:
    """What a YAML file says of the model: the one that is named, or one beside the weights."""
    if request.config is not None:
        return Described.read(request.config)
    if weights is not None:
        return described_beside(weights.file, weights.network) if weights.network else None
    return None if request.vae is None else described_beside(request.vae, {})


def _components(
    request: ToHf, weights: SatWeights | None, described: Described | None
) -> tuple[list[Component], Sizes | None, list[str]]:
    """(what can be written, sizes of the transformer, what is left out and why)."""
    transformer, sizes = (None, None) if weights is None else _transformer(request, weights, described)
    dtype = request.dtype or _usual_dtype(weights, sizes)
    vae, notes = None, []
    try:
        vae = _vae(request, weights, sizes, described)
    except vae_keys.UnequalWidthsError as error:
        if not request.partial:
            raise vae_keys.UnequalWidthsError(
                f"{error} With --partial the transformer and the text encoder are converted without it."
            ) from error
        if transformer is None and request.text_encoder is None:
            raise
        notes = [f"vae: left out: {error}"]
    text = _text_encoder(request, weights, sizes)
    parts = [part for part in (transformer, vae, text) if part is not None]
    for part in parts:
        part.plan = {name: cast(f"{part.name}: {name}", value, dtype) for name, value in part.plan.items()}
        if part is text:
            part.config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return parts, sizes, notes


def _usual_dtype(weights: SatWeights | None, sizes: Sizes | None) -> torch.dtype:
    """The file's own half precision, else the model's: 5B and 1.5, unlike 2B, do not bear float16."""
    kinds = set() if weights is None else {value.dtype for value in weights.network.values()}
    model = torch.bfloat16 if sizes is not None and sizes.rotary else torch.float16
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in kinds), model)


def _transformer(request: ToHf, weights: SatWeights, described: Described | None) -> tuple[Component, Sizes]:
    if not weights.network or replaced_parts(weights.network, weights.lora):
        raise ConvertError(
            f"{weights.source} holds a LoRA adapter without base weights. Give the base as --transformer_ckpt_path and "
            "this file as --lora, or export the adapter alone with --lora_only."
        )
    sizes = _sizes(weights, described)
    sizes.check(weights.network, weights.source)
    if sizes.assumed and not sizes.is_published:
        raise ConvertError(
            f"{weights.source} does not say at which size, for how many frames and text tokens it was trained, and no "
            "YAML file beside it does: name its configuration with --config."
        )
    lines = [f"{sizes.name} from {weights.source}, {len(weights.network)} tensors"]
    lines += [f"sizes from {described.path}"] if described else [f"assumed: {sizes.assumed}"] if sizes.assumed else []
    left_out = [n for n in (*NOT_IN_HF, POSITIONS[0]) if n in weights.network]
    left_out = [n for n in left_out if n != POSITIONS[0] or not sizes.learned_positions]
    lines += [f"left out, computed or never read by diffusers: {', '.join(left_out)}"] if left_out else []
    own = adapter_in(weights, request.lora_alpha)
    adapters = [(own, 1.0)] if own else []
    adapters += [(open_adapter(a.path), a.scale) for a in request.adapters]
    network, folded = merged(weights.network, adapters)
    few_steps = one_few_steps([weights.facts.get(FEW_STEPS), *(a.few_steps for a, _ in adapters)], weights.source)
    lines += [f"distilled: {few_steps} stays in the header; diffusers does not heed it"] if few_steps else []
    plan = hf_plan(network, learned_positions=sizes.learned_positions)
    if sizes.linear_patches and sizes.patch[0] == 1:
        plan[_PATCH_HF] = reshaped(plan[_PATCH_HF], (sizes.width, sizes.in_channels, *sizes.patch[1:]))
    config = hf.with_class("CogVideoXTransformer3DModel", sizes.hf_config())
    return Component("transformer", plan, config, [*lines, *folded], few_steps=few_steps), sizes


def _sizes(weights: SatWeights, described: Described | None) -> Sizes:
    if described is None:
        return sizes_of_sat(weights.network)
    table = weights.network.get(POSITIONS[0])
    if table is not None and not described.sizes.learned_positions:
        read_sine_table(table.make()[0])  # diffusers computes it: it must be the computed one
    return described.sizes.in_form_of(weights.network)


def _scale(name: str, described: Described | None, sizes: Sizes | None) -> float:
    """`scale_factor` of latents or `shift_scale` of the noise schedule: the YAML's, or that of the published models."""
    value = getattr(described, name, None)
    kind = described.sizes if described else sizes if sizes and sizes.is_published else None
    if value is None and kind:
        value = getattr(kind.nearest, name)
    if value is None:
        known = ", ".join(f"{getattr(model, name)} of {model.name}" for model in PUBLISHED.values())
        raise ConvertError(
            f"no tensor says the model's {name} ({known}), and no YAML file beside the weights does: name its "
            "configuration with --config."
        )
    return float(value)


def _vae(
    request: ToHf, weights: SatWeights | None, sizes: Sizes | None, described: Described | None
) -> Component | None:
    if request.vae is not None:
        state, left_out = open_vae(request.vae)
        source = str(request.vae)
    elif weights is not None and weights.first_stage:
        state = {n: t for n, t in weights.first_stage.items() if not n.startswith("loss.")}
        source, left_out = weights.source, len(weights.first_stage) - len(state)
    else:
        return None
    params = vae_keys.params_of(state, source)
    vae_keys.check(state, params, source)
    factor = _scale("scale_factor", described, sizes)
    config = vae_keys.hf_config(params, factor)
    kind = sizes or (described.sizes if described else None)
    if kind is not None and kind.patch[0] > 1:  # as published: image latents are not scaled in SAT
        config["invert_scale_latents"] = True
    said = (
        described.path if described and described.scale_factor is not None else "assumed, that of the published models"
    )
    lines = [f"from {source}, scaling factor {factor:g} ({said})"]
    lines += [f"left out: {left_out} entries of the training loss"] if left_out else []
    lines += _unused(weights.first_stage if weights is not None and request.vae is not None else {})
    return Component("vae", vae_keys.sat_to_hf(state), hf.with_class("AutoencoderKLCogVideoX", config), lines)


def _text_encoder(request: ToHf, weights: SatWeights | None, sizes: Sizes | None) -> Component | None:
    carried = weights.text_encoder if weights is not None else {}
    if request.text_encoder is None:
        if carried and not request.partial:
            raise ConvertError(
                "the checkpoint carries the text encoder's weights, but not its configuration and tokenizer: give "
                "--text_encoder_path, a folder with config.json and spiece.model."
            )
        return None
    folder = Path(request.text_encoder).expanduser()
    if folder.is_dir():
        files = t5_files.files_in(folder, need_weights=not carried)
    else:
        files = t5_files.resolve(request.text_encoder, request.cache_dir)
    state = all_deferred(files.read_weights()) if files.weights else carried
    source = str(files.config.parent) if files.weights else f"{weights.source if weights else ''} (text encoder)"
    part = text_encoder(files, state, source, None if sizes is None else sizes.text_width)
    part.config["architectures"] = ["T5EncoderModel"]
    part.lines += _unused(carried if files.weights else {})
    return part


def _unused(carried: Mapping[str, Deferred]) -> list[str]:
    return [f"left out: {len(carried)} tensors of it in the transformer's checkpoint"] if carried else []


# --- what configurations say -----------------------------------------------------------------------------------------


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

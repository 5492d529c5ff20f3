"""A diffusers pipeline folder into SAT's release layout, with a YAML file that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgm.config import merge_yaml
from sgm.convert import hf_folder as hf
from sgm.convert import vae_keys
from sgm.convert.dit_keys import NETWORK_PREFIX, sat_plan
from sgm.convert.dit_sizes import Sizes, sizes_of_hf
from sgm.convert.hf_folder import FEW_STEPS, Component, one_few_steps, text_encoder
from sgm.convert.lazy import ConvertError, Deferred, all_deferred, cast, reshaped, summed_bytes
from sgm.convert.lora_files import merged, open_adapter, sat_matrices
from sgm.convert.output import SHARD_BYTES, whole_folder
from sgm.files import write_text
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.encoders import t5_files
from sgm.places import CONFIGS
from sgm.weights.checksums import read_json
from sgm.weights.release import Adapter, locate
from sgm.weights.save import save_pt

ITERATION = 1000
TEXT_ENCODER = "t5-v1_1-xxl"
RUN_FILE = "infer.yaml"
_SCHEDULER = "scheduler/scheduler_config.json"
_PATCH = "mixins.patch_embed.proj.weight"


@dataclass(frozen=True)
class ToSat:
    """What to convert, from where, and how.

    Attributes:
        source: pipeline folder, a transformer's own folder, or (for `import_lora`) an adapter.
        dtype: of all weights; None keeps the files'.
        lora_alpha: for `import_lora`: alpha of the training; None believes the file.
        sat_alpha: for `import_lora`: make the matrices right for readers that take this alpha; None states the file's.
        linear_patches: write the patch embedding as SAT's later code has it, for one-frame patches.
        shard_bytes: largest weight file of the text encoder.
    """

    source: Path
    output: Path
    dtype: torch.dtype | None = None
    adapters: Sequence[Adapter] = ()
    lora_alpha: float | None = None
    sat_alpha: float | None = None
    linear_patches: bool = False
    partial: bool = False
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False

    def inputs(self) -> dict[str, Path]:
        return {"--input_path": self.source, **{f"--lora {a.path}": Path(a.path) for a in self.adapters}}


def convert(request: ToSat) -> list[str]:
    """Write the release folder; returns the report.

    Raises:
        ConvertError, WeightsError, SaveError, ...: what is wrong; nothing is left in `output` then.
    """
    folders = _folders(request)
    parts: dict[str, Component] = {}
    if "transformer" in folders:
        parts["transformer"], sizes = _transformer(request, folders["transformer"])
    if "vae" in folders:
        parts["vae"], factor = _vae(request, folders["vae"])
    if "text_encoder" in folders:
        parts["text_encoder"] = _text_encoder(request, sizes.text_width if "transformer" in parts else None)
    needed = sum(summed_bytes(part.plan) for part in parts.values())
    lines = [line for part in parts.values() for line in part.described()]
    lines.append(f"written: {request.output}")
    with whole_folder(request.output, overwrite=request.overwrite, inputs=request.inputs(), needed=needed) as out:
        _write(out, parts, request.shard_bytes)
        if len(parts) == 3:
            scheduler, shift = request.source / _SCHEDULER, sizes.nearest.shift_scale
            if scheduler.is_file():
                shift = float(read_json(scheduler).get("snr_shift_scale", 3.0))
            else:
                lines.append(f"assumed: shift_scale {shift:g}, as the published model's ({_SCHEDULER} is not there)")
            dtype = parts["transformer"].plan[_PATCH].dtype
            run = run_file(request.output, sizes, parts["vae"].config, factor, shift, dtype)
            write_text(out / RUN_FILE, run)
            file = shlex.quote(str(request.output / RUN_FILE))
            plain = f"to sample: python sample_video.py {file}"
            with_image = f"to sample: python sample_video.py {file} --prompt TEXT --image PICTURE"
            lines.append(with_image if sizes.takes_image else plain)
    return lines


def import_lora(request: ToSat) -> list[str]:
    """Write an adapter of another trainer in SAT's checkpoint layout; returns the report."""
    adapter = open_adapter(request.source, request.lora_alpha)
    if adapter.parts:
        raise ConvertError(f"{adapter.source} is in SAT's layout already: sample_video.py --lora takes it as it is.")
    matrices, facts = sat_matrices(adapter, request.sat_alpha)
    plan = {NETWORK_PREFIX + n: cast(n, t, request.dtype) for n, t in all_deferred(matrices).items()}
    with whole_folder(request.output, overwrite=request.overwrite, inputs=request.inputs()) as out:
        _write_network(out, plan, {"lora": facts})
    scaled = "" if request.sat_alpha is None else f", scaled for alpha {request.sat_alpha:g}"
    return [
        f"adapter: {adapter.source}, {adapter}{scaled}, {len(plan)} matrices",
        f"written: {request.output}",
        f"to sample with it: python sample_video.py CONFIG.yaml --lora {shlex.quote(str(request.output))}",
    ]


# --- reading ---------------------------------------------------------------------------------------------------------


def _folders(request: ToSat) -> dict[str, Path]:
    """Component folders by name.

    Raises:
        ConvertError: not there, no diffusers folder, or not all of a pipeline (unless `partial`).
    """
    source = request.source
    if not source.is_dir():
        raise ConvertError(f"--input_path {source} is no folder; it must be a local copy of a diffusers repository.")
    if (source / "config.json").is_file() and not (source / "model_index.json").is_file():
        kinds = {"CogVideoXTransformer3DModel": "transformer", "AutoencoderKLCogVideoX": "vae"}
        kind = kinds.get(read_json(source / "config.json").get("_class_name", ""))
        if kind and request.partial:
            return {kind: source}
        if kind:
            raise ConvertError(f"{source} holds a {kind} alone; convert it with --partial, or give the whole pipeline.")
    wanted = ("transformer", "vae", "text_encoder", "tokenizer")
    found = {name: source / name for name in wanted if (source / name).is_dir()}
    missing = [name for name in wanted if name not in found]
    if not found or (missing and not request.partial):
        hint = "Download the whole repository, or convert what there is with --partial."
        hint = "It is a SAT checkpoint already." if _is_sat(source) else hint
        raise ConvertError(f"{source} is not a whole diffusers pipeline: no {', '.join(missing)} in it. {hint}")
    if "tokenizer" not in found and "text_encoder" in found:
        raise ConvertError(f"{source} has a text_encoder but no tokenizer; both make SAT's text encoder folder.")
    return found


def _is_sat(folder: Path) -> bool:
    try:
        return bool(locate(folder))
    except ValueError:
        return False


def _transformer(request: ToSat, folder: Path) -> tuple[Component, Sizes]:
    config = read_json(folder / "config.json")
    hf.expect_class(folder, config, "CogVideoXTransformer3DModel")
    sizes = sizes_of_hf(config)
    state = hf.read_component(folder, hf.DIFFUSION_STEM)
    lines = [f"{sizes.name} from {folder}, {len(state)} tensors"]
    lines += [f"assumed: {sizes.assumed}"] if sizes.assumed else []
    plan = sat_plan(state)
    sizes.check(plan, str(folder))
    kinds = {name: value.dtype for name, value in plan.items()}
    adapters = [(open_adapter(file.path), file.scale) for file in request.adapters]
    plan, folded = merged(plan, adapters)
    stated = hf.stated(folder, hf.DIFFUSION_STEM).get(FEW_STEPS)
    few_steps = one_few_steps([stated, *(adapter.few_steps for adapter, _ in adapters)], str(folder))
    plan = {n: cast(n, t, request.dtype or kinds[n]) for n, t in plan.items()}  # sums come in float32
    if request.linear_patches and not sizes.linear_patches:
        sizes = replace(sizes, linear_patches=True)
        plan[_PATCH] = reshaped(plan[_PATCH], sizes.sat_shapes()[_PATCH])
    return Component("transformer", plan, config, [*lines, *folded], few_steps=few_steps), sizes


def _vae(request: ToSat, folder: Path) -> tuple[Component, float]:
    """The autoencoder, `config` being the params of its coders, and the factor on latents."""
    config = read_json(folder / "config.json")
    hf.expect_class(folder, config, "AutoencoderKLCogVideoX")
    vae_keys.refuse_foreign(config)
    plan = vae_keys.hf_to_sat(hf.read_component(folder, hf.DIFFUSION_STEM))
    params = vae_keys.params_of(plan, str(folder))
    vae_keys.check(plan, params, str(folder))
    factor = float(config.get("scaling_factor", 1.15258426))
    return Component("vae", _cast_all(plan, request.dtype), params, [f"scale factor {factor}"]), factor


def _text_encoder(request: ToSat, width: int | None) -> Component:
    files = t5_files.files_in(request.source)
    part = text_encoder(files, all_deferred(files.read_weights()), str(files.config.parent), width)
    part.plan = _cast_all(part.plan, request.dtype)
    return part


def _cast_all(plan: Mapping[str, Deferred], dtype: torch.dtype | None) -> dict[str, Deferred]:
    return {name: cast(name, value, dtype) for name, value in plan.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(out: Path, parts: Mapping[str, Component], limit: int) -> None:
    if "transformer" in parts:
        part = parts["transformer"]
        plan = {NETWORK_PREFIX + n: t for n, t in part.plan.items()}
        _write_network(out / "transformer", plan, {"lora": {FEW_STEPS: part.few_steps}} if part.few_steps else None)
    if "vae" in parts:
        (out / "vae").mkdir()
        save_pt(out / "vae" / "3d-vae.pt", {"state_dict": parts["vae"].plan})
    if "text_encoder" in parts:
        parts["text_encoder"].write(out / TEXT_ENCODER, limit)
        parts["text_encoder"].write_tokenizer(out / TEXT_ENCODER)


def _write_network(folder: Path, plan: Mapping[str, Deferred], more: Mapping[str, Any] | None = None) -> None:
    place = folder / str(ITERATION)
    place.mkdir(parents=True)
    save_pt(place / "mp_rank_00_model_states.pt", {"module": dict(plan), **(more or {})})
    write_text(folder / "latest", str(ITERATION))


def run_file(
    release: Path, sizes: Sizes, vae_params: Mapping[str, Any], factor: float, shift_scale: float, dtype: torch.dtype
) -> str:
    """Text of a YAML file for `sample_video.py`.

    Args:
        release: folder that the converter writes; the paths in the file are absolute.
        vae_params: `params` of the first stage's encoder and decoder.
        dtype: of the transformer's weights; the run has it, too.
    """
    from omegaconf import OmegaConf

    release = release.expanduser().absolute()
    content = merge_yaml([CONFIGS / f"{sizes.nearest.config}_infer.yaml"])
    args, model = content["args"], content["model"]
    args |= {"load": str(release / "transformer"), "fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}
    frames = sampled_frames(STRIDES.latent_frames(sizes.frames), sizes.patch[0])
    args |= {"sampling_num_frames": frames, "latent_channels": sizes.out_channels}
    args["input_file"] = str(CONFIGS / "test.txt")
    args |= {"image2video": True} if sizes.takes_image else {}
    if not sizes.is_published:
        args.pop("sampling_image_size", None)
    model["scale_factor"] = factor
    network, given = model["network_config"]["params"], sizes.sat_params()
    given["modules"] = network["modules"] | given["modules"]
    model["network_config"]["params"] = {n: v for n, v in network.items() if n != "ofs_embed_dim"} | given
    stage = model["first_stage_config"]["params"]
    stage["ckpt_path"] = str(release / "vae" / "3d-vae.pt")
    for part in ("encoder_config", "decoder_config"):
        stage[part]["params"] |= vae_params
    embedder = model["conditioner_config"]["params"]["emb_models"][0]["params"]
    embedder |= {"model_dir": str(release / "t5-v1_1-xxl"), "max_length": sizes.text_length}
    sigma_sampler = model["loss_fn_config"]["params"]["sigma_sampler_config"]
    for node in (model["denoiser_config"], sigma_sampler, model["sampler_config"]):
        node["params"]["discretization_config"]["params"] = {"shift_scale": shift_scale}
    return f"# {sizes.name}, written by tools/convert_weight_hf2sat.py\n" + OmegaConf.to_yaml(OmegaConf.create(content))

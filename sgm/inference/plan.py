"""What a run would do, found without weights, network or files written: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm.config import RunConfig
from sgm.inference.fit import follows_picture
from sgm.inference.length import Length
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.prompts import Prompt
from sgm.inference.source_clip import SourceClip
from sgm.placeholders import unedited, weight_paths

_SHOWN_PROMPTS = 20
_PARTS = {"conditioner": "text encoder", "model": "transformer", "first_stage_model": "VAE"}


def weight_lines(model: Mapping[str, Any], load: str | None) -> list[str]:
    """A line for each weight path: there, or what is to be done."""
    paths = weight_paths(model, load)
    left = unedited(paths)

    def state(place: str, value: str) -> str:
        if place in left:
            return "a placeholder, to be edited"
        return "found" if Path(value).expanduser().exists() else "not found"

    return [f"{place}: {value} ({state(place, value)})" for place, value in paths.items()]


def describe(pipeline: Pipeline, prompts: Sequence[Prompt]) -> list[str]:
    """Sizes, steps, device, prompts, and how much memory the weights of each placement take on it."""
    args = pipeline.args
    length = pipeline.visual.length
    frames = pipeline.engine.strides.pixel_frames(length.decoded)
    listed = [line for prompt in prompts[:_SHOWN_PROMPTS] for line in _prompt_lines(pipeline, prompt)]
    more = len(prompts) - _SHOWN_PROMPTS
    products = ", products in bf16" if pipeline.engine.kernels.cpu_bf16 else ""
    return [
        f"device {pipeline.device}, {args.dtype}{products}, placement {args.placement}",
        (
            f"{frames} frames of {_sizes(pipeline, prompts)} ({length.total} latent frames), "
            f"{pipeline.num_steps} steps, {args.batch_size} sample(s) a prompt"
        ),
        *_length_lines(length, pipeline.visual.source),
        *memory_lines(pipeline),
        *listed,
        *([f"... and {more} more prompts"] if more > 0 else []),
    ]


def _length_lines(length: Length, source: SourceClip | None) -> list[str]:
    """Windows, and the clip that is extended."""
    lines, windows = [], length.windows
    if len(windows) > 1:
        most = max(window.frames for window in windows)
        lines.append(f"in {len(windows)} windows of up to {most} latent frames, each from the end of the one before")
    if source is not None and length.new:
        lines.append(
            f"{length.new} new frames behind the {source.frames} of {source.path}, whose last {length.kept} are read"
        )
    return lines


def _sizes(pipeline: Pipeline, prompts: Sequence[Prompt]) -> str:
    """Width and height of the videos; each prompt's picture may have its own."""
    sizes = dict.fromkeys(pipeline.visual.size(prompt.picture) for prompt in prompts) or [pipeline.visual.size()]
    return " and ".join(f"{width}x{height}" for height, width in list(sizes)[:3]) + " ..." * (len(sizes) > 3)


def _prompt_lines(pipeline: Pipeline, prompt: Prompt) -> list[str]:
    text = prompt.text if len(prompt.text) <= 100 else prompt.text[:100] + "..."
    lines, picture = [f"prompt {prompt.index}: {text}"], prompt.picture
    if picture is not None:
        height, width = pipeline.visual.size(picture)
        way = "scaled" if follows_picture(pipeline.engine) else "scaled and cropped"
        lines.append(f"  begins with {picture.path}, {picture.width}x{picture.height}, {way} to {width}x{height}")
    return lines


def memory_lines(pipeline: Pipeline) -> list[str]:
    """Bytes of each part's weights, and how many of them a placement holds on the device at a time."""
    children = dict(pipeline.engine.named_children())
    parts = {title: children[name].parameters() for name, title in _PARTS.items() if name in children}
    sizes = {title: sum(weight.nbytes for weight in weights) for title, weights in parts.items()}
    if pipeline.args.decoder == "small":
        del sizes["VAE"]
        file = Path(pipeline.engine.autoencoder.small_decoder or "").expanduser()
        sizes["small decoder"] = file.stat().st_size if file.is_file() else 0
    lines = [f"weights of the {title}: {_size(size)}" for title, size in sizes.items()]
    if "text encoder" not in sizes:
        lines.append("weights of the text encoder: unknown until its folder is there")
    held = {"all": sum(sizes.values()), "stages": max(sizes.values())}.get(pipeline.args.placement)
    if held is not None and len(sizes) == len(_PARTS):
        lines.append(f"at most {_size(held)} of weights on the device at a time, activations beside them")
    return lines


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def report(config: RunConfig[SampleArgs], pipeline: Pipeline, prompts: Sequence[Prompt]) -> str:
    """The resolved configuration, then the plan as YAML comments, so that the whole is a configuration file again."""
    plan = [*describe(pipeline, prompts), *weight_lines(config.model, config.args.load)]
    return config.as_yaml() + "\n" + "\n".join(f"# {line}" for line in plan)

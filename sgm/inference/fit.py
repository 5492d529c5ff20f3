"""Do the options of a run fit the model, and its parts each other? Asked before any weights are read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from sgm.errors import SgmError
from sgm.inference.options import SampleArgs
from sgm.models.diffusion import SATVideoDiffusionEngine

# Of a side, in relation to training's: a smaller picture is given a part of the trained positions, a larger one some
# that training never had. A third more or less still leaves more than half of the trained picture.
LARGEST_FACTOR = 4 / 3


class SamplingError(SgmError):
    """The model cannot give this sample; the message says why and what to change."""


@runtime_checkable
class Scaled(Protocol):
    """A guider whose scale can be set."""

    scale: float


def check_fit(engine: SATVideoDiffusionEngine, args: SampleArgs, size: tuple[int, int]) -> None:
    """Check an engine (also one on the meta device) for a run of `size` (height, width) pixels.

    Raises:
        SamplingError: lists everything that does not fit.
    """
    problems = [
        *_channel_problems(engine, args.latent_channels),
        *_grid_problems(engine, args.sampling_num_frames, size),
        *_text_problems(engine),
        *_sampler_problems(engine, args),
    ]
    if problems:
        raise SamplingError("\n  - ".join(["the options do not fit the model:", *problems]))


def check_latents(engine: SATVideoDiffusionEngine, latents: Tensor, source: str = "the latents") -> None:
    """Check saved latents (t, c, h, w) before they are decoded.

    Raises:
        SamplingError: not four axes, other channels than the first stage's, or an even t.
    """
    channels = engine.autoencoder.decoder.z_channels
    shape = tuple(latents.shape)
    if len(shape) != 4 or shape[1] != channels or shape[0] % 2 == 0 or 0 in shape:
        raise SamplingError(f"{source} have shape {shape}; this VAE decodes (t, {channels}, h, w) with an odd t.")


def _channel_problems(engine: SATVideoDiffusionEngine, stated: int | None) -> list[str]:
    network = engine.network
    problems = []
    if stated not in (None, network.in_channels):
        problems.append(f"args.latent_channels is {stated}, the network takes {network.in_channels}")
    if network.in_channels != network.out_channels:
        problems.append(
            f"the network takes {network.in_channels} channels and gives {network.out_channels}: it is an "
            "image-to-video model, which this command does not run"
        )
    if engine.first_stage_model is not None:
        decoded = engine.autoencoder.decoder.z_channels
        if decoded != network.out_channels:
            problems.append(f"the VAE decodes {decoded} channels, the network gives {network.out_channels}")
    return problems


def unusual_size(engine: SATVideoDiffusionEngine, size: tuple[int, int]) -> str | None:
    """What to say of a `size` (height, width) that is far from what the network was trained at; None if it is not."""
    network = engine.network
    trained = engine.strides.pixel_size(network.latent_height, network.latent_width)
    if all(own / LARGEST_FACTOR <= side <= own * LARGEST_FACTOR for side, own in zip(size, trained, strict=True)):
        return None
    return (
        f"this model was trained at {trained[0]}x{trained[1]} (height x width); at {size[0]}x{size[1]} expect parts of "
        "scenes, stripes or repetitions"
    )


def _grid_problems(engine: SATVideoDiffusionEngine, frames: int, size: tuple[int, int]) -> list[str]:
    if engine.network.patch.t > 1:
        return [
            f"the network takes {engine.network.patch.t} frames in a patch, as CogVideoX 1.5; such are not run here"
        ]
    if frames % 2 == 0:
        return [
            (
                f"args.sampling_num_frames is {frames} latent frames; the number must be odd (t latent frames decode "
                f"to 4t-3 frames): choose {frames - 1} or {frames + 1}"
            )
        ]
    try:
        grid = engine.network.patch.grid(frames, *engine.strides.latent_size(*size))
        engine.network.mixins.pos_embed.check_grid(grid)
    except ValueError as error:
        return [f"{frames} latent frames of {size[1]}x{size[0]} pixels: {error}"]
    return []


def _text_problems(engine: SATVideoDiffusionEngine) -> list[str]:
    if engine.conditioner is None:
        return []
    encoder, mixins = engine.text_encoder, engine.network.mixins
    length, width = mixins.pos_embed.text_length, mixins.patch_embed.text_hidden_size
    problems = []
    if encoder.input_keys != ("txt",):
        problems.append(
            f"the text encoder's input_key is {', '.join(map(str, encoder.input_keys))}; prompts are given as txt"
        )
    if encoder.max_length != length:
        problems.append(f"the text encoder's max_length is {encoder.max_length}, the network's text_length {length}")
    if encoder.transformer.config.d_model != width:
        problems.append(
            f"the text encoder in {encoder.files.config.parent} gives embeddings of width "
            f"{encoder.transformer.config.d_model}, the network takes {width} (text_hidden_size); set model_dir to the "
            "encoder of this model"
        )
    return problems


def _sampler_problems(engine: SATVideoDiffusionEngine, args: SampleArgs) -> list[str]:
    if not engine.has_sampler:
        return ["the model section has no sampler_config"]
    problems = []
    try:
        engine.sampler.schedule(args.num_steps)
    except ValueError as error:
        problems.append(str(error))
    if engine.sampler.fixed_frames:
        problems.append(
            f"sampler_config.params.fixed_frames is {engine.sampler.fixed_frames}: it keeps frames that are given, and "
            "this command has text alone; set it to 0"
        )
    if args.guidance_scale is not None and not isinstance(engine.sampler.guider, Scaled):
        problems.append(
            f"args.guidance_scale is {args.guidance_scale}, but {type(engine.sampler.guider).__name__} has no scale; "
            "set sampler_config.params.guider_config to VanillaCFG or DynamicCFG"
        )
    return problems

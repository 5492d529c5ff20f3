"""Do the options of a run fit the model, and its parts each other? Asked before any weights are read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from sgm.config import AccelerateArgs, RunConfig
from sgm.data.images import Picture, size_of_short_side
from sgm.errors import SgmError
from sgm.inference.options import OVERLAP, SampleArgs
from sgm.inference.source_clip import SourceClip
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.diffusionmodules.image_condition import clip_frames
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.modules.diffusionmodules.shortcuts import Shortcuts
from sgm.weights.preflight import HOW_TO_GET_SMALL_DECODER
from sgm.weights.save import is_finite

# Of a side, in relation to training's: a smaller picture is given a part of the trained positions, a larger one some
# that training never had. A third more or less still leaves more than half of the trained picture.
LARGEST_FACTOR = 4 / 3

# Decided when a model is loaded.
FIXED_ARGS = ("load", "fp16", "bf16", "device", "placement", "merge_lora", "force_inference", "vae_tiling")
FIXED_ACCELERATE = ("cpu_bf16", "fp8")


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
        *_picture_problems(engine, args),
        *_window_problems(engine, args),
        *_grid_problems(engine, args, size),
        *_decoder_problems(engine, args.decoder),
        *_student_problems(args),
        *_text_problems(engine),
        *_sampler_problems(engine, args),
    ]
    if problems:
        raise SamplingError("\n  - ".join(["the options do not fit the model:", *problems]))


def check_same_model(loaded: RunConfig[SampleArgs], asked: RunConfig[SampleArgs]) -> None:
    """Whether a model that is loaded can do what another configuration asks for.

    Raises:
        SamplingError: lists what is decided when a model is loaded, and differs.
    """
    pairs = {f"args.{name}": (getattr(loaded.args, name), getattr(asked.args, name)) for name in FIXED_ARGS}
    fast = loaded.accelerate, asked.accelerate
    pairs |= {f"accelerate.{name}": (getattr(fast[0], name), getattr(fast[1], name)) for name in FIXED_ACCELERATE}
    sections = [{k: v for k, v in c.model.items() if k != "sampler_config"} for c in (loaded, asked)]
    pairs |= {f"model.{name}": (sections[0].get(name), sections[1].get(name)) for name in sections[0] | sections[1]}
    other = [place for place, (own, wanted) in pairs.items() if own != wanted]
    if other:
        raise SamplingError(
            f"{', '.join(other)}: this is decided when a model is loaded, and the call asks for another value. Load a "
            "second model with it (TextToVideo.from_config)."
        )


def check_latents(engine: SATVideoDiffusionEngine, latents: Tensor, *, any_length: bool = False) -> None:
    """Check saved latents (t, c, h, w) before they are decoded.

    Args:
        any_length: the decoder also takes an even t.
    Raises:
        SamplingError: not four axes, other channels than the first stage's, or a t that no clip has.
    """
    channels, patch = engine.autoencoder.decoder.z_channels, engine.network.patch.t
    shape = tuple(latents.shape)
    whole = clip_frames(shape[0], patch) % 2 == 1 or any_length if len(shape) == 4 else False
    if not whole or shape[1] != channels or 0 in shape:
        parity = "odd t" if patch == 1 else "even t, of which the first is dropped, or an odd one"
        raise SamplingError(
            f"the latents have shape {shape}; this model decodes (t, {channels}, h, w) with an {parity}."
        )


def _channel_problems(engine: SATVideoDiffusionEngine, stated: int | None) -> list[str]:
    network = engine.network
    problems = []
    if stated not in (None, network.out_channels):
        problems.append(f"args.latent_channels is {stated}, the network's latents have {network.out_channels}")
    if engine.first_stage_model is not None:
        decoded = engine.autoencoder.decoder.z_channels
        if decoded != network.out_channels:
            problems.append(f"the VAE decodes {decoded} channels, the network gives {network.out_channels}")
    return problems


def other_kind(engine: SATVideoDiffusionEngine) -> str:
    """The shipped configuration that makes videos from text where this model does from pictures, or the reverse."""
    name = "cogvideox1.5_5b" if engine.network.patch.t > 1 else "cogvideox_5b"
    return f"configs/{name}{'' if engine.noised_image_input else '_i2v'}_infer.yaml"


def _picture_problems(engine: SATVideoDiffusionEngine, args: SampleArgs) -> list[str]:
    other = other_kind(engine)
    if engine.noised_image_input and args.image2video is False:
        said = "args.image2video is false, and this model makes videos from pictures: --set args.image2video=true"
        return [f"{said}; from text alone: {other}"]
    asked = {"args.image2video": args.image2video, "args.image": args.image}
    named = " and ".join(name for name, value in asked.items() if value)
    if named and not engine.noised_image_input:
        return [f"{named}: this model makes videos from text alone; from a picture: {other}"]
    if args.video and args.extend is None and engine.noised_image_input:
        other = f"from a clip: {other}; to go on with the clip from its last frame: --extend N"
        return [f"args.video: this model makes videos from pictures; {other}"]
    return []


def window_frames(engine: SATVideoDiffusionEngine, args: SampleArgs) -> tuple[int, int]:
    """Latent frames that are sampled at once, at most, and those that neighbouring windows share."""
    patch = engine.network.patch.t
    frames = args.sampling_num_frames if args.window_frames is None else args.window_frames
    usual = max(patch, min(OVERLAP, frames // 2) // patch * patch)
    return frames, usual if args.window_overlap is None else args.window_overlap


def _window_problems(engine: SATVideoDiffusionEngine, args: SampleArgs) -> list[str]:
    """Windows that models cannot have."""
    patch, (frames, overlap) = engine.network.patch.t, window_frames(engine, args)
    windows = args.window_frames is not None or args.window_overlap is not None
    if engine.noised_image_input and windows:
        advice = "its videos begin with a picture; go on with such a video, --video FILE --extend N"
        return [f"args.window_frames and args.window_overlap do not go with this model: {advice}"]
    if not (windows or args.extend):
        return []
    if frames % patch == 0 and overlap % patch == 0 and 0 < overlap < frames:
        return []
    name = "args.sampling_num_frames" if args.window_frames is None else "args.window_frames"
    parts = f"a multiple of {patch}" if patch > 1 else ""
    if args.window_overlap is None:
        least = f"{parts}{', ' if parts else ''}{max(3, 2 * patch)} at least"
        return [
            f"{name} is {frames} latent frames, the first of them from the end of what is there; it must be {least}"
        ]
    asked = f"windows of {frames} latent frames ({name}) with {overlap} in common (args.window_overlap)"
    return [f"{asked}: the second number must be the smaller one{', each ' + parts if parts else ''}"]


def follows_picture(engine: SATVideoDiffusionEngine) -> bool:
    """Whether videos have the ratio of their picture (CogVideoX 1.5), or the picture is cut to theirs."""
    return engine.network.patch.t > 1


def fits_picture(engine: SATVideoDiffusionEngine, picture: Picture | SourceClip | None, size: tuple[int, int]) -> None:
    """Whether the model has positions for the (height, width) that a picture asks for.

    Raises:
        SamplingError: names the picture.
    """
    network = engine.network
    most = engine.strides.pixel_size(network.latent_height, network.latent_width)
    if picture is not None and (size[0] > most[0] or size[1] > most[1]):
        raise SamplingError(
            f"{picture.path} ({picture.width}x{picture.height} pixels) asks for a video of {size[1]}x{size[0]}, more "
            f"than the {most[1]}x{most[0]} that this model has positions for; cut it to a shape nearer to a square, or "
            "give a smaller --image-size, of which the shorter side counts."
        )


def trained_size(engine: SATVideoDiffusionEngine) -> tuple[int, int]:
    """(height, width) in pixels that a model was trained at, which is what it samples unless told otherwise."""
    return engine.strides.pixel_size(*engine.network.trained_size)


def video_size(
    engine: SATVideoDiffusionEngine, args: SampleArgs, picture: Picture | SourceClip | None = None
) -> tuple[int, int]:
    """(height, width) in pixels of a video, or of one that begins with a picture or with a clip's last frame."""
    given = args.sampling_image_size
    size = (given[0], given[1]) if given else trained_size(engine)
    if picture is None or not follows_picture(engine):
        return size
    return size_of_short_side(picture.height, picture.width, min(size), engine.strides.size_step)


def unusual_size(engine: SATVideoDiffusionEngine, size: tuple[int, int]) -> str | None:
    """What to say of a `size` (height, width) that is far from what the network was trained at; None if it is not."""
    trained = trained_size(engine)
    usual = all(own / LARGEST_FACTOR <= side <= own * LARGEST_FACTOR for side, own in zip(size, trained, strict=True))
    if engine.noised_image_input and follows_picture(engine):  # upright too, and at all ratios down to a square
        short, long = min(trained), max(trained)
        usual = short / LARGEST_FACTOR <= min(size) <= short * LARGEST_FACTOR and max(size) <= long * LARGEST_FACTOR
    if usual:
        return None
    return (
        f"this model was trained at {trained[0]}x{trained[1]} (height x width); at {size[0]}x{size[1]} expect parts of "
        "scenes, stripes or repetitions"
    )


def unusual_type(engine: SATVideoDiffusionEngine, args: SampleArgs) -> str | None:
    """What to say of float16 with the models that do not bear it: all of 5B and 1.5; None where there is nothing."""
    if not (args.fp16 and engine.network.positions.rotates):
        return None
    return (
        "the 5B models give black frames or NaN in float16; take bfloat16: --set args.fp16=false --set args.bf16=true"
    )


def _decoder_problems(engine: SATVideoDiffusionEngine, decoder: str) -> list[str]:
    stage = engine.first_stage_model
    if decoder == "full" or (isinstance(stage, VideoAutoencoderInferenceWrapper) and stage.small_decoder):
        return []
    return [
        (
            f"args.decoder is {decoder}, but model.first_stage_config.params names no small_decoder: "
            f"{HOW_TO_GET_SMALL_DECODER}"
        )
    ]


def _student_problems(args: SampleArgs) -> list[str]:
    if not args.few_steps or args.student:
        return []
    return [
        (
            "args.few_steps is true, but args.student names no adapter: `bash finetune.sh CONFIG.yaml "
            "configs/distill.yaml --set args.distill.prompts=FILE` makes one (docs/distillation.md)"
        )
    ]


def _grid_problems(engine: SATVideoDiffusionEngine, args: SampleArgs, size: tuple[int, int]) -> list[str]:
    patch, frames = engine.network.patch, args.sampling_num_frames
    if frames % patch.t or (args.decoder == "full" and clip_frames(frames, patch.t) % 2 == 0):
        rule = "odd (t latent frames decode to 4t-3 frames)"
        if patch.t > 1:
            rule = "even (the first latent frame is dropped, t of them decode to 4t-7 frames)"
        near = " or ".join(map(str, sorted({max(frames - 1, patch.t), frames + 1})))
        return [f"args.sampling_num_frames is {frames} latent frames; the number must be {rule}: choose {near}"]
    try:
        grid = patch.grid(min(frames, window_frames(engine, args)[0]), *engine.strides.latent_size(*size))
        if grid.t > engine.network.positions.grid.t and not engine.noised_image_input:
            return [_too_long(engine, args)]
        engine.network.positions.check_grid(grid)
    except ValueError as error:
        return [f"{frames} latent frames of {size[1]}x{size[0]} pixels: {error}"]
    return []


def _too_long(engine: SATVideoDiffusionEngine, args: SampleArgs) -> str:
    most = engine.network.positions.grid.t * engine.network.patch.t
    if args.window_frames is not None:
        return f"args.window_frames is {args.window_frames} latent frames, and this model has positions for {most}"
    return (
        f"args.sampling_num_frames is {args.sampling_num_frames} latent frames, and this model has positions for "
        f"{most}: make a longer video in windows that follow one another, --window-frames {most}"
    )


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


def shortcuts_of(fast: AccelerateArgs) -> Shortcuts | None:
    """The shortcuts that the section asks for; None where it asks for none."""
    start, end = fast.guidance_interval
    if not fast.reuse_error and (start, end) == (0, 1):
        return None
    return Shortcuts(fast.reuse_error, fast.reuse_keep_first, fast.reuse_keep_last, start, end)


def check_shortcuts(shortcuts: Shortcuts | None, sampler: VideoDDIMSampler, steps: int) -> None:
    """Refuse shortcuts that could never be taken.

    Raises:
        SamplingError: says why.
    """
    if shortcuts is None:
        return
    kept = shortcuts.keep_first + shortcuts.keep_last
    if shortcuts.error and kept >= steps:
        raise SamplingError(
            f"accelerate.reuse_error never skips one of reuse_keep_first + reuse_keep_last = {kept} steps, and the run "
            f"has {steps}: lower these or set accelerate.reuse_error=0"
        )
    if (shortcuts.start, shortcuts.end) != (0, 1) and isinstance(sampler.guider, IdentityGuider):
        raise SamplingError("accelerate.guidance_interval needs a guider, and the sampler has none: leave it out")


def check_finite(x: Tensor, what: str, dtype: str) -> None:
    """Whether what was computed in `dtype` (as in `args`) can be used. Raises SamplingError."""
    if not is_finite(x):
        advice = {
            "fp16": "float16 overflowed; use bfloat16 (--set args.fp16=false --set args.bf16=true) or float32",
            "bf16": "use float32 (--set args.bf16=false) to see whether the weights are at fault",
            "fp32": "the weights are damaged or belong to another configuration",
        }[dtype]
        raise SamplingError(f"the {what} contain NaN or infinity, so no video was written: {advice}.")

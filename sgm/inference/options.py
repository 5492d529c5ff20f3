"""The `args:` section of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sgm.modules.autoencoding.strides import STRIDES
from sgm.places import CONFIGS
from sgm.typed import ConfigError, PathText, Range, option

SHIPPED_CONFIG = CONFIGS / "cogvideox_2b_infer.yaml"  # that runs where none is named
DEMO_CONFIG = CONFIGS / "demo_infer.yaml"  # as long as that is unedited
STRENGTH = 0.8  # where a clip is given, and no strength
OVERLAP = 4  # of windows, where none is given


@dataclass(frozen=True)
class SampleArgs:
    """Options of `sample_video.py`; names and meanings of the original where it has them."""

    IDLE = frozenset({"add_image_channels"})  # of the overlay that such a model was trained with

    mode: str = option("inference", "what the configuration is for", choices=("inference",))
    load: PathText | None = option(
        None, "transformer weights: release folder, iteration folder or file", metavar="PATH"
    )
    fp16: bool = option(False, "weights and activations in float16")
    bf16: bool = option(False, "weights and activations in bfloat16 (default: float32)")
    device: str | None = option(None, "cpu, cuda or cuda:N; default: the GPU if there is one")
    seed: int = option(42, "base seed; noise depends on (seed, prompt index, sample index) only", at_least=0)
    seed_mode: str = option(
        "sample",
        "sample: every sample has noise of its own; upstream: one random stream for the whole run, as the original",
        choices=("sample", "upstream"),
    )
    input_type: str = option("txt", "txt: prompts from input_file; cli: ask for them", choices=("txt", "cli"))
    input_file: PathText | None = option(
        None, "one prompt a line; looked for from the current folder, then beside the YAML", metavar="FILE"
    )
    prompts: list[str] = option(
        [], "what the video shows; given so, prompts replace input_type and input_file", metavar="TEXT"
    )
    vocabulary: PathText | None = option(
        None, "YAML file with the words that the model knows; prompts with others get a note", metavar="FILE"
    )
    image: PathText | None = option(
        None, "the picture that videos begin with, where the prompt names none as TEXT@@FILE", metavar="FILE"
    )
    image2video: bool | None = option(None, "videos begin with a picture; default: where the model is made for it")
    video: PathText | None = option(
        None, "the clip that text-to-video models make their videos from: its first frames, noised", metavar="FILE"
    )
    strength: Annotated[float, Range(above=0, most=1)] | None = option(
        None,
        f"share of the steps that are taken from there ({STRENGTH}): near 0 the clip stays, 1 leaves nothing of it",
        metavar="S",
    )
    extend: int | None = option(
        None, "go on with the clip of --video: so many new frames behind its last one", at_least=1, metavar="N"
    )
    negative_prompt: str = option(
        "", "what to steer away from; empty means zeros in place of an embedding", metavar="TEXT"
    )
    refine: bool = option(False, "let a language model write each prompt out first (OPENAI_API_KEY, OPENAI_BASE_URL)")
    refine_model: str | None = option(None, "name of that language model; default: gpt-4o", metavar="NAME")
    batch_size: int = option(1, "samples per prompt", at_least=1, metavar="N")
    max_batch: int = option(
        4, "samples of a prompt that run together; halved when memory runs out", at_least=1, metavar="N"
    )
    sampling_num_frames: int = option(
        13,
        "latent frames: odd, 13 give 49 pixel frames, 1 gives an image; CogVideoX 1.5 takes even numbers, 22 give 81",
        at_least=1,
        metavar="T",
    )
    window_frames: int | None = option(
        None,
        "latent frames that are sampled at once: a longer video is made in windows of so many, each from the end of "
        "the one before; default: all at once",
        at_least=2,
        metavar="T",
    )
    window_overlap: int | None = option(
        None, f"latent frames that a window has in common with the one before ({OVERLAP})", at_least=1, metavar="T"
    )
    sampling_image_size: list[int] | None = option(
        None,
        "height and width in pixels; default: what the model was trained at. From a picture CogVideoX 1.5 takes its "
        "ratio, and the shorter of the two for its shorter side",
        metavar=("H", "W"),
    )
    sampling_fps: int = option(8, "frames per second of the written video", at_least=1)
    num_steps: int | None = option(None, "sampling steps; default: the sampler's setting", at_least=2, metavar="N")
    guidance_scale: float | None = option(None, "in place of the guider's configured scale", metavar="S")
    output_dir: PathText = option("outputs/", "folder for results", metavar="DIR")
    only_save_latents: bool = option(False, "write latents instead of videos; decode them later with --decode-latents")
    decode_latents: PathText | None = option(
        None, "decode latents that an earlier run saved: a file, or a folder of them", metavar="PATH"
    )
    skip_done: bool = option(False, "leave out samples whose video and JSON are there, from the same request")
    cfg_parallel: bool | None = option(
        None,
        "several processes: each branch of guidance by its own; default: where they outnumber the videos",
    )
    sequence_parallel_size: int | None = option(
        None, "several processes: so many share the tokens of a video; default: those that are left", at_least=1
    )
    placement: str = option(
        "stages",
        "all: every part stays on the device; stages: one at a time; lean: parts are streamed through layer by layer",
        choices=("all", "stages", "lean"),
    )
    decoder: str = option(
        "full",
        "full: the VAE's own; small: the one that first_stage_config.params.small_decoder names, many times as fast",
        choices=("full", "small"),
    )
    vae_tiling: bool = option(False, "decode in overlapping tiles: approximate, for GPUs too small otherwise")
    lora: list[PathText] = option(
        [], "an adapter checkpoint, with the scale of what it adds (1)", metavar="PATH[:SCALE]"
    )
    merge_lora: bool = option(False, "fold adapters into the weights before sampling")
    student: PathText | None = option(None, "the adapter of a few-step student, for few_steps", metavar="PATH")
    few_steps: bool = option(False, "sample with `student`, in the steps that it was distilled for")
    force_inference: bool = option(False, "accept a transformer file without the computed position table")
    latent_channels: int | None = option(None, "checked against the first stage's if given")

    def __post_init__(self) -> None:
        problems = []
        if self.fp16 and self.bf16:
            problems.append("args.fp16 and args.bf16 are both true; choose one")
        if self.vae_tiling and self.decoder == "small":
            problems.append(
                "args.vae_tiling is of the full decoder, the small one needs no tiles; leave one of them out"
            )
        if self.strength is not None and not self.video:
            problems.append("args.strength is of a clip to start from: name it, --video FILE, or leave --strength out")
        if self.extend is not None and not self.video:
            problems.append("args.extend goes on with a clip: name it, --video FILE, or leave --extend out")
        if self.extend is not None and self.strength is not None:
            problems.append("args.strength is of videos made from a clip, and args.extend goes on with it; choose one")
        if self.extend is not None and self.only_save_latents:
            problems.append(
                "args.only_save_latents keeps no frames, and args.extend puts new ones behind the clip's own; leave "
                "one of them out"
            )
        if self.window_overlap is not None and self.window_frames is None and self.extend is None:
            problems.append("args.window_overlap is of windows: say how long they are, --window-frames T")
        if self.video and self.image:
            problems.append("args.video and args.image are both given; a video is made from one of them")
        if self.decode_latents and (self.video or self.image):
            given = "args.video" if self.video else "args.image"
            problems.append(
                f"args.decode_latents and {given} are both given; latents that are there are decoded as they are, "
                "leave one of them out"
            )
        size = self.sampling_image_size
        if size is not None and (len(size) != 2 or any(s <= 0 or s % STRIDES.size_step for s in size)):
            problems.append(
                f"args.sampling_image_size is {size}; it must be [height, width], both positive multiples of "
                f"{STRIDES.size_step}"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def share_taken(self) -> float | None:
        """Share of the steps that are taken from a clip, in (0, 1]; None where no video is made from one."""
        if not self.video or self.extend is not None:
            return None
        return STRENGTH if self.strength is None else self.strength

    @property
    def dtype(self) -> str:
        """Name of the weights' type: fp16, bf16 or fp32."""
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "fp32"

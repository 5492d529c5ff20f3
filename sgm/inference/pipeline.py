"""Text, picture or clip to video. The engine's parts are loaded when first needed and placed as the run asks.

`Pipeline` knows tensors, not files of results; `sgm.inference.runner` goes through prompts and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sgm.config import RunConfig
from sgm.data.images import Picture
from sgm.data.video_out import to_uint8
from sgm.inference.adapters import read_adapter, with_adapters
from sgm.inference.fast import check_shortcuts, shortcuts_of
from sgm.inference.few_steps import with_few_steps
from sgm.inference.fit import (
    SamplingError,
    Scaled,
    check_finite,
    check_fit,
    check_latents,
    check_same_model,
    video_size,
)
from sgm.inference.length import CLEAN_BELOW, Window, in_windows
from sgm.inference.noise import SampleId, StackedNoise
from sgm.inference.options import SampleArgs
from sgm.inference.placement import Placement
from sgm.inference.prompts import Prompt
from sgm.inference.rehearsal import compile_ahead, run_block, run_decoder
from sgm.inference.setup import for_inference
from sgm.inference.visual import NOTHING, InMemory, VisualInput
from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import Cond, SATVideoDiffusionEngine
from sgm.models.loading import (
    Adapter,
    LoadedNetwork,
    load_first_stage,
    load_network,
    load_text_encoder,
    replace_adapters,
)
from sgm.models.small_decoder import load_small_decoder
from sgm.modules.autoencoding.small_decoder import SmallDecoder
from sgm.modules.diffusionmodules.guiders import DynamicCFG
from sgm.modules.diffusionmodules.shortcuts import CallCount, ShortcutRun
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.ops.fp8 import check_fp8
from sgm.modules.transformer.quantize import quantize_network
from sgm.parallel.apply import share_network
from sgm.parallel.decoding import SharedChunks
from sgm.parallel.team import ParallelError, Team
from sgm.util import instantiate_from_config
from sgm.weights import weights_fingerprint
from sgm.weights.checksums import Checks

Part = Literal["conditioner", "network", "first_stage", "small_decoder"]

PREVIEWED = 4  # latent frames that a preview by the full decoder shows


@dataclass(frozen=True)
class EncodedPrompt:
    """Conditioning of one prompt and of its negative (CPU, (1, l, d) each), and the end of the prompt that was cut.

    Prompts that were encoded together share their negative's. `image` is what `encode_picture` gave of the picture that
    the video begins with; `drawn` what `draw_picture` drew of it for all samples, None where each draws its own.
    """

    cond: Cond
    uncond: Cond
    cut: str
    image: Tensor | None = None
    drawn: Tensor | None = None


@dataclass
class WeightFacts:
    """Which weights a run used, for its records."""

    network: LoadedNetwork | None = None
    first_stage: str | None = None
    text_encoder: str | None = None
    notes: list[str] = field(default_factory=list)


def unobserved(total: int) -> AbstractContextManager[Callable[..., None]]:
    """`total` steps that nobody watches."""
    return nullcontext(lambda *_, **__: None)


class Pipeline:
    """The engine of a run configuration on one device.

    Latents: (b, t, c, h, w), scaled; frames: uint8 (f, height, width, 3). Its text encoder's files are looked up at
    once (not read), unless it is built `with_text_encoder=False`, to plan or to decode latents only.
    """

    def __init__(self, config: RunConfig[SampleArgs], device: torch.device, *, with_text_encoder: bool = True):
        config, self.notes = with_few_steps(with_adapters(config))  # what is to be said of it
        self.device = device
        self.placement = Placement(config.args.placement, device)
        model = for_inference(config.model)
        if not with_text_encoder:
            del model["conditioner_config"]
        with torch.device("meta"):
            self.engine = SATVideoDiffusionEngine(**model, dtype=config.args.dtype)
        self.engine.eval().requires_grad_(False)
        self.fp8 = config.accelerate.fp8
        if self.fp8:
            check_fp8(device)
        self.calls: CallCount | None = None  # of the last sampling run, where shortcuts were taken
        self.facts = WeightFacts()
        self._first_stage: dict[str, Any] = model.get("first_stage_config") or {}
        self._decoder_compiles = False
        self._small_decoder: SmallDecoder | None = None
        self._loaded: set[Part] = set()
        self._adapters: list[str] | None = None  # that the network has; None: no base is there yet, or in between
        self.team = Team()
        self._checks = Checks()  # of what was loaded; nothing that came of it leaves here before they are done
        self._take(config)

    def ask(self, config: RunConfig[SampleArgs], held: InMemory = NOTHING) -> None:
        """Take another configuration; what is loaded stays, but for adapters that it does not name.

        Args:
            held: in place of the picture and the clip that `config` names.
        Raises:
            ConfigError: it differs in what is decided when a model is loaded.
            SamplingError: its options do not fit the model, or each other.
        """
        check_same_model(self.config, config)
        config, self.notes = with_few_steps(with_adapters(config))
        self.engine.sampler = instantiate_from_config(config.model["sampler_config"])
        self._take(config, held)
        if self.args.lora != self._adapters:
            self._loaded.discard("network")

    def _take(self, config: RunConfig[SampleArgs], held: InMemory = NOTHING) -> None:
        """Let sampler, guider and the rooms for pictures and clips be as `config` has them."""
        self.config, self.args = config, config.args
        fast = config.accelerate
        self.engine.use_kernels(choose_kernels(fast.kernels, fast.attention, self.device, fast.cpu_bf16))
        self.shortcuts = shortcuts_of(fast)
        if self.args.share_taken is not None and self.engine.has_sampler:
            self.engine.sampler.strength = self.args.share_taken
        check_fit(self.engine, self.args, video_size(self.engine, self.args))
        self.visual = VisualInput(self.engine, self.args, self.device, self._moments, held)
        sampler = self.engine.sampler
        # Of each sampling run; found by making its schedule, which refuses numbers that it cannot have.
        self.num_steps = len(sampler.schedule(self.args.num_steps).timesteps)
        check_shortcuts(self.shortcuts, sampler, self.num_steps)
        sampler.verbose = False  # the caller shows progress
        sampler.clean_below = CLEAN_BELOW  # of what windows and clips hand on
        guider = sampler.guider
        if self.args.guidance_scale is not None and isinstance(guider, Scaled):  # else it did not fit
            # Set on the guider: the release's one ignores a scale that is given to a call, as in the original.
            guider.scale = self.args.guidance_scale
        if self.args.share_taken is not None and isinstance(guider, DynamicCFG):
            guider.num_steps = self.num_steps  # its curve is that of the steps taken, as in diffusers

    def join(self, team: Team) -> None:
        """Make videos together with the other processes of a team, which make the same calls.

        Raises:
            ParallelError: the network, or an approximation, cannot be shared.
        """
        if team.size > 1 and self.shortcuts is not None and self.shortcuts.measures:
            raise ParallelError(
                "accelerate.reuse_error and step_cache_threshold let each process decide by what it measures: leave "
                "them out (configs/fast.yaml), or args.cfg_parallel and args.sequence_parallel_size."
            )
        share_network(self.engine, team)
        self.team = team

    @property
    def shares_decoding(self) -> bool:
        """Whether all processes of the team decode a clip; else each can do so alone."""
        return self.team.size > 1 and self.args.decoder == "full"

    # --- sizes ----------------------------------------------------------------------------------------------------

    def size(self, picture: Picture | None = None) -> tuple[int, int]:
        """(height, width) in pixels of a video, or of one that begins with a picture."""
        return self.visual.size(picture)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(t, c, h, w) of what is sampled at once."""
        latent_size = self.engine.strides.latent_size(*size)
        return self.visual.length.windows[0].frames, self.engine.network.out_channels, *latent_size

    @property
    def max_batch(self) -> int:
        """Samples that run together. Where errors are measured each decides for itself, so that its company changes
        nothing; with the single random stream they follow each other as in the original."""
        alone = self.args.seed_mode == "upstream" or (self.shortcuts is not None and self.shortcuts.measures)
        return 1 if alone else self.args.max_batch

    # --- loading --------------------------------------------------------------------------------------------------

    def load(self, part: Part) -> None:
        """Read a part's weights unless they are there. Whether a file is damaged is told when it is first used."""
        if part not in self._loaded:
            with self._checks.collecting():
                self._load(part)
            self._loaded.add(part)

    def _load(self, part: Part) -> None:
        device, dtype = self.placement.load_device, self.engine.dtype
        if part == "conditioner":
            self.facts.text_encoder = load_text_encoder(self.engine.text_conditioner, device=device, dtype=dtype)
        elif part == "first_stage":
            self.facts.first_stage = load_first_stage(self.engine.autoencoder, device=device, dtype=dtype)
            self._arrange_first_stage()
        elif part == "small_decoder":
            self._load_small_decoder(device, dtype)
        else:
            if self._fuses_on_gpu and self.facts.network is None:
                compile_ahead(partial(run_block, self.engine, self.latent_shape(self.size())))
            self.facts.network = self._load_network(device, dtype)

    @property
    def _fuses_on_gpu(self) -> bool:
        return self.engine.kernels.fused and self.device.type == "cuda"

    def _compile_decoder(self) -> None:
        """Begin to, once, by means of a second one without values."""
        if not self._fuses_on_gpu or self._decoder_compiles or not self._first_stage or self.args.decoder == "small":
            return
        self._decoder_compiles = True
        with torch.device("meta"):
            stage: VideoAutoencoder = instantiate_from_config(self._first_stage)
        stage.to(self.engine.dtype).eval().use_ops(self.engine.kernels.vae)
        shape = (self.visual.length.decoded, *self.latent_shape(self.size())[1:])
        compile_ahead(partial(run_decoder, stage, shape, self.engine.dtype))

    def _working_meanwhile(self, callback: Callable[..., None]) -> Callable[..., None]:
        """`callback` of a sampling step that, once the GPU has a step to work at, sees whether weights are whole and
        begins to compile the decoder."""

        def stepped(*args: Any, **kwargs: Any) -> None:
            callback(*args, **kwargs)
            self._checks.wait()
            if not self.args.only_save_latents:
                self._compile_decoder()

        return stepped

    def _load_small_decoder(self, device: torch.device, dtype: torch.dtype) -> None:
        stage = self.engine.autoencoder
        if not (stage.small_decoder and stage.ckpt_path):
            raise SamplingError("--decoder small needs ckpt_path and small_decoder in first_stage_config.params.")
        # on a CPU its activations have the type of its products: conversions would take longer than these
        dtype = torch.bfloat16 if self.engine.kernels.cpu_bf16 else dtype
        self._small_decoder = load_small_decoder(stage.small_decoder, stage.ckpt_path, device=device, dtype=dtype)
        self.facts.first_stage = weights_fingerprint(stage.ckpt_path)

    def _arrange_first_stage(self) -> None:
        stage, lean = self.engine.autoencoder, self.placement.kind == "lean"
        if self.engine.kernels.fused or (lean and self.device.type == "cuda"):
            # In the other layout cuDNN turns its input and result around, in memory of its own.
            stage.set_channels_last()
        stage.set_low_memory(lean, cache_on_cpu=lean)
        if self.args.vae_tiling:
            stage.set_tiling()

    def _load_network(self, device: torch.device, dtype: torch.dtype) -> LoadedNetwork:
        """The base, unless it is there, with the adapters that are asked for."""
        if not self.args.load:
            raise SamplingError("args.load is not set: give the transformer weights (release folder or file).")
        network, loaded = self.engine.network, self.facts.network
        adapters = [Adapter.parse(text) for text in self.args.lora]
        if loaded is None:
            allow_absent = self.args.force_inference
            loaded = load_network(
                network, self.args.load, device=device, dtype=dtype, allow_absent=allow_absent, adapters=adapters,
                read=read_adapter, merge=self.args.merge_lora,
            )  # fmt: skip
            self.facts.notes += loaded.notes
        elif self.args.lora == self._adapters:
            return loaded
        elif self.fp8:
            raise SamplingError("the adapters of a network in 8-bit floats (accelerate.fp8) cannot be changed.")
        else:
            self._adapters, told = None, len(loaded.notes)
            self.placement.forget(self.engine.model)
            replace_adapters(network, loaded, self.args.load, adapters, read=read_adapter, merge=self.args.merge_lora)
            self.facts.notes += loaded.notes[told:]
        self._adapters = list(self.args.lora)
        if self.fp8:
            quantize_network(network)
        return loaded

    @property
    def small_decoder_weights(self) -> str | None:
        """Fingerprint of the small decoder's file; None where the full one decodes."""
        file = self.engine.autoencoder.small_decoder if self.args.decoder == "small" else None
        return weights_fingerprint(file) if file else None

    @property
    def decoder_part(self) -> Part:
        """What decodes."""
        return "small_decoder" if self.args.decoder == "small" else "first_stage"

    def is_loaded(self, part: Part) -> bool:
        return part in self._loaded

    def drop_text_encoder(self) -> None:
        """Free the text encoder when no further prompt will come."""
        if "conditioner" in self._loaded:
            self.placement.forget(self.engine.text_conditioner)
            self.engine.text_conditioner.to("meta")
            self._loaded.discard("conditioner")

    # --- the three stages -----------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], negative: str = "") -> list[EncodedPrompt]:
        """Conditioning of each prompt, on the CPU. Each is encoded alone, so that its company changes no bit of it.

        Raises:
            PromptError: a prompt names a picture, and the model makes videos from text alone.
            SamplingError: the text encoder gives NaN or infinity.
        """
        if not self.visual.pictures.wanted:
            self.visual.pictures.attach([Prompt(k, text) for k, text in enumerate(prompts)])
        self.load("conditioner")
        encoder = self.engine.text_encoder
        cut = encoder.tokenize(list(prompts)).truncated
        encoded: list[EncodedPrompt] = []
        blocks = [[block] for block in encoder.blocks()]
        with self._checks.first(), self.placement.use(self.engine.text_conditioner, blocks):
            for text, end in zip(prompts, cut):
                cond, uncond = self.engine.condition([text], [] if encoded else [negative])
                shared = encoded[0].uncond if encoded else _on_cpu(uncond)
                encoded.append(EncodedPrompt(_on_cpu(cond), shared, end))
        return encoded

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the text encoder does not read."""
        return self.engine.text_encoder.tokenize([prompt]).truncated[0]

    def encode_picture(self, picture: Picture) -> Tensor:
        """Moments of the posterior of a picture at the video's size, (1, 2c, 1, h, w) on the CPU.

        Raises:
            ImageError: its file cannot be read any more, or has changed.
            SamplingError: they are not finite.
        """
        return self.visual.encode_picture(picture)

    def _moments(self, pixels: Tensor, what: str) -> Tensor:
        """Of the posterior of pixels (1, 3, f, h, w): (1, 2c, t, h/8, w/8) on the CPU."""
        self.load("first_stage")
        stage, plan = self.engine.autoencoder, self.engine.autoencoder.memory
        # one frame needs no tiles, which would make it approximate
        stage.memory = replace(plan, tiling=plan.tiling if pixels.shape[2] > 1 else None)
        try:
            with self._checks.first(), torch.no_grad(), self.placement.use(stage.encoder):
                moments = stage.moments(pixels.to(self.device, self.engine.dtype)).cpu()
                check_finite(moments, f"latents of the {what}", self.args.dtype)
        finally:
            stage.memory = plan
        return moments

    def sample(
        self,
        prompt: EncodedPrompt,
        samples: Sequence[SampleId],
        steps: Callable[[int], AbstractContextManager[Callable[..., None]]] = unobserved,
    ) -> Tensor:
        """Latents (b, t, c, h, w) on the CPU, one per entry of `samples`.

        `steps(total)` gives a context with the sampler's callback, called after each step. With seed_mode `upstream`
        the process's global random stream is used, as the original does.

        Raises:
            SamplingError: the latents are not finite, or the prompt has no image, or one that the model has no use for.
        """
        self.visual.encode_source()
        image = self.visual.last_frame if prompt.image is None else prompt.image
        if (image is None) == self.visual.reads_picture:
            raise SamplingError(
                f"this model {'needs' if image is None else 'takes no'} image; see {self.visual.pictures.other}"
            )
        self.load("network")
        count, length = len(samples), self.visual.length
        noise = None if self.args.seed_mode == "upstream" else StackedNoise(samples)
        latents_of_image = self.visual.image_latents(image, prompt.drawn, noise, count)
        source = self.visual.source_latents(noise, count)
        channels, *size = self.latent_shape(self.size())[1:]
        if image is not None:
            size = list(image.shape[-2:])
        cond, uncond = (_expanded(part, count, self.device) for part in (prompt.cond, prompt.uncond))
        runs: list[ShortcutRun] = []

        def sample_window(window: Window, kept: Tensor | None, callback: Callable[..., None]) -> Tensor:
            shape = (window.frames, channels, *size)
            if self.shortcuts:
                runs.append(ShortcutRun(self.shortcuts))
            return self.engine.sample(
                cond,
                uncond,
                batch_size=count,
                shape=shape,
                noise=noise.start(shape) if noise else None,
                prefix=kept,
                image=latents_of_image,
                clip=None if source is None else source[:, window.start : window.stop],
                noise_sampler=noise.like if noise else None,
                num_steps=self.args.num_steps,
                callback=callback,
                shortcuts=runs[-1] if runs else None,
            )

        network = self.engine.network
        with (
            self._checks.first(),
            self.placement.use(self.engine.model, network.streamable_blocks(), pin=True),
            steps(self.num_steps * len(length.windows)) as callback,
        ):
            heard = self._working_meanwhile(callback)
            latents = in_windows(length.windows, self.visual.kept_latents(count), sample_window, heard).cpu()
            check_finite(latents, "latents", self.args.dtype)
        self.calls = sum((run.calls for run in runs), CallCount()) if runs else None
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents of one sample (t, c, h, w), scaled, to frames (f, height, width, 3).

        Raises:
            SamplingError: latents of another model, or the decoded pixels are not finite.
        """
        check_latents(self.engine, latents, any_length=self.args.decoder == "small")
        self._compile_decoder()
        self.load(self.decoder_part)
        stage, small = self.engine.autoencoder, self._small_decoder if self.args.decoder == "small" else None
        z = self._unscaled(latents)
        share = SharedChunks(self.team) if self.shares_decoding else None
        pieces: list[Tensor] = []
        extremes: list[float] = []
        with self._checks.first(), torch.no_grad(), self.placement.use(small or stage.decoder):
            z = z.to(small.dtype if small else self.engine.dtype)
            for pixels in small.decode_chunks(z) if small else stage.decode_chunks(z, share):
                extremes += map(float, torch.aminmax(pixels))
                piece = to_uint8(pixels)[0]
                pieces.append(piece if share else piece.cpu())
            with (self.team if share else Team()).together():  # before, others wait for what this process sends
                self._checks.wait()
                check_finite(torch.tensor(extremes), "pixels", self.args.dtype)
        if share is not None:
            pieces = share.collect(pieces, stage.piece_shapes(z), self.device)
        return np.concatenate([piece.cpu().numpy() for piece in pieces])

    def preview(self, latents: Tensor) -> np.ndarray:
        """What is foreseen of one sample (t, c, h, w) while it is made: uint8 (f, height, width, 3).

        By the small decoder where the configuration names one; else up to `PREVIEWED` of its latent frames, each
        decoded alone, as a picture.
        """
        stage, z = self.engine.autoencoder, self._unscaled(latents)
        if stage.small_decoder and Path(stage.small_decoder).exists():
            self.load("small_decoder")
            small, parts = self._small_decoder, [z]
        else:
            self.load("first_stage")
            shown = np.linspace(0, z.shape[2] - 1, min(PREVIEWED, z.shape[2])).round().astype(int)
            small, parts = None, [z[:, :, k : k + 1] for k in shown.tolist()]
        decoder, dtype = small or stage, small.dtype if small else self.engine.dtype
        with torch.no_grad(), self.placement.use(small or stage.decoder):
            pieces = [to_uint8(x)[0].cpu().numpy() for part in parts for x in decoder.decode_chunks(part.to(dtype))]
        return np.concatenate(pieces)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Sampled latents (t, c, h, w) as decoders take them, (1, c, t, h, w)."""
        latents = self.engine.drop_first(latents[None])
        return latents.to(self.device, torch.float32).transpose(1, 2) / self.engine.scale_factor


def _expanded(cond: Cond, count: int, device: torch.device) -> Cond:
    return {name: value.expand(count, *value.shape[1:]).to(device) for name, value in cond.items()}


def _on_cpu(cond: Cond) -> Cond:
    return {name: value.cpu() for name, value in cond.items()}

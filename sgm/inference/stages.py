"""The stages of making a video with an engine whose parts are there: encode, sample, decode.

`sgm.inference.pipeline` loads the parts and places them first; a training run looks at its own model with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sgm.data.video_out import to_uint8
from sgm.inference.fit import SamplingError
from sgm.inference.length import Window, in_windows
from sgm.inference.noise import SampleId, StackedNoise
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Prompt
from sgm.inference.visual import NOTHING, InMemory, VisualInput
from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import Cond, SATVideoDiffusionEngine
from sgm.modules.autoencoding.small_decoder import SmallDecoder
from sgm.modules.diffusionmodules.shortcuts import CallCount, ShortcutRun, Shortcuts
from sgm.parallel.first_stage import SharedChunks
from sgm.parallel.team import Team

Use = Literal["conditioner", "network", "encoder", "decoder"]
Steps = Callable[[int], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True)
class EncodedPrompt:
    """Conditioning of one prompt and of its negative ((1, l, d) each), and the end of the prompt that was cut.

    Prompts that were encoded together share their negative's. `image` is what `visual.encode_picture` gave of the
    picture that the video begins with; `drawn` what `draw_picture` drew of it for all samples, None where each draws
    its own.
    """

    cond: Cond
    uncond: Cond
    cut: str = ""
    image: Tensor | None = None
    drawn: Tensor | None = None


def unobserved(total: int) -> AbstractContextManager[Callable[..., None]]:
    """`total` steps that nobody watches."""
    return nullcontext(lambda *_, **__: None)


class Stages:
    """What is made with one engine on its device, under the options that it takes.

    Latents: (b, t, c, h, w), scaled; frames: uint8 (f, height, width, 3).

    Attributes:
        visual: what is given beside prompts. num_steps: of each sampling run.
        team: the processes that make a video together.
        calls: of the last sampling run, where shortcuts were taken.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, device: torch.device):
        self.engine, self.device = engine, device
        self.team = Team()
        self.calls: CallCount | None = None

    def take(self, args: SampleArgs, shortcuts: Shortcuts | None = None, held: InMemory = NOTHING) -> None:
        """Let what follows be as `args` has it, which fit the engine."""
        self.args, self.shortcuts = args, shortcuts
        self.visual = VisualInput(self.engine, args, self.device, self.moments, held)
        # Found by making the schedule, which refuses numbers that it cannot have.
        self.num_steps = len(self.engine.sampler.schedule(args.num_steps).timesteps)

    @contextmanager
    def using(self, part: Use) -> Iterator[None]:
        """The block computes with that part of the engine."""
        yield

    def check(self, x: Tensor, what: str) -> None:
        """Look at what was computed."""

    def after_step(self) -> None:
        """Called after each step of a sampling run."""

    @property
    def decoder(self) -> VideoAutoencoder | SmallDecoder:
        """What decodes."""
        return self.engine.autoencoder

    @property
    def shares_decoding(self) -> bool:
        """Whether all processes of the team decode a clip; else each can do so alone."""
        return self.team.size > 1 and self.args.decoder == "full"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(t, c, h, w) of what is sampled at once."""
        latent_size = self.engine.strides.latent_size(*self.visual.size())
        return self.visual.length.windows[0].frames, self.engine.network.out_channels, *latent_size

    # --- prompts and pixels to what is sampled from ---------------------------------------------------------------

    def encode(self, prompts: Sequence[str], negative: str = "") -> list[EncodedPrompt]:
        """Conditioning of each prompt, on the CPU. Each is encoded alone, so that its company changes no bit of it.

        Raises:
            PromptError: a prompt names a picture, and the model makes videos from text alone.
            SamplingError: the text encoder gives NaN or infinity.
        """
        if not self.visual.pictures.wanted:
            self.visual.pictures.attach([Prompt(k, text) for k, text in enumerate(prompts)])
        encoded: list[EncodedPrompt] = []
        with self.using("conditioner"):
            for text in prompts:
                cond, uncond = self.engine.condition([text], [] if encoded else [negative])
                shared = encoded[0].uncond if encoded else _on_cpu(uncond)
                encoded.append(EncodedPrompt(_on_cpu(cond), shared, self.cut_off(text)))
        return encoded

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the text encoder does not read."""
        return self.engine.text_encoder.tokenize([prompt]).truncated[0]

    def moments(self, pixels: Tensor, what: str) -> Tensor:
        """Of the posterior of pixels (1, 3, f, h, w), `what` they are: (1, 2c, t, h/8, w/8) on the CPU."""
        with torch.no_grad(), self.using("encoder"):
            moments = self.engine.first_stage.moments(pixels.to(self.device, self.engine.dtype)).cpu()
            self.check(moments, f"latents of the {what}")
        return moments

    # --- latents --------------------------------------------------------------------------------------------------

    def sample(self, prompt: EncodedPrompt, samples: Sequence[SampleId], steps: Steps = unobserved) -> Tensor:
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
        count, length = len(samples), self.visual.length
        noise = None if self.args.seed_mode == "upstream" else StackedNoise(samples)
        latents_of_image = self.visual.image_latents(image, prompt.drawn, noise, count)
        source = self.visual.source_latents(noise, count)
        channels, *size = self.latent_shape[1:]
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

        with self.using("network"), steps(self.num_steps * len(length.windows)) as callback:

            def stepped(*step: Any) -> None:
                callback(*step)
                self.after_step()

            latents = in_windows(length.windows, self.visual.kept_latents(count), sample_window, stepped).cpu()
            self.check(latents, "latents")
        self.calls = sum((run.calls for run in runs), CallCount()) if runs else None
        return latents

    # --- frames ---------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents of one sample (t, c, h, w), scaled, to frames (f, height, width, 3).

        Raises:
            SamplingError: latents of another model, or the decoded pixels are not finite.
        """
        share = SharedChunks(self.team) if self.shares_decoding else None
        stage, z = self.engine.autoencoder, self.unscaled(latents)
        pieces: list[Tensor] = []
        extremes: list[float] = []  # least and greatest pixel of each
        with torch.no_grad(), self.using("decoder"):
            z = z.to(self.decoder.dtype)
            for pixels in stage.decode_chunks(z, share) if share else self.decoder.decode_chunks(z):
                extremes += map(float, torch.aminmax(pixels))
                piece = to_uint8(pixels)[0]
                pieces.append(piece if share else piece.cpu())
            with (self.team if share else Team()).together():  # before, others wait for what this process sends
                self.check(torch.tensor(extremes), "pixels")
        if share is not None:
            pieces = share.collect(pieces, stage.piece_shapes(z), self.device)
        return np.concatenate([piece.cpu().numpy() for piece in pieces])

    def unscaled(self, latents: Tensor) -> Tensor:
        """Sampled latents (t, c, h, w) as decoders take them, (1, c, t, h, w)."""
        latents = self.engine.drop_first(latents[None])
        return latents.to(self.device, torch.float32).transpose(1, 2) / self.engine.scale_factor


def _expanded(cond: Cond, count: int, device: torch.device) -> Cond:
    return {name: value.expand(count, *value.shape[1:]).to(device) for name, value in cond.items()}


def _on_cpu(cond: Cond) -> Cond:
    return {name: value.cpu() for name, value in cond.items()}

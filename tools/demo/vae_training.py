"""Training of the demo's 3D VAE: loss, schedule, loop, and the export with latents of unit variance.

Axes: b batch, c channels, f pixel frames, t latent frames, h w height and width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgm.models.autoencoder import VideoAutoencoder
from sgm.modules.autoencoding.blocks import SpatialNorm3D
from sgm.modules.autoencoding.regularizers import DiagonalGaussian
from sgm.modules.ops.choice import choose_kernels
from sgm.weights.save import save_pt
from tools.demo.clip_feed import ClipFeed
from tools.demo.vae_phases import Phase, learning_rate, phase_at

LOG_SECONDS = 4.0
FIRST_LOG_VARIANCE = -5.0  # little noise at first, so that there is something to learn from


@dataclass(frozen=True)
class LossWeights:
    """Of the terms in `vae_loss`."""

    square: float = 4.0
    edge: float = 0.5
    motion: float = 0.5
    border: float = 1.5
    kl: float = 1e-4
    centre: float = 0.1
    soft: float = 0.02  # errors below this count by their square


@dataclass(frozen=True)
class Settings:
    """Of a run. One of `seconds` and `steps` is its length; `amp` the type of convolutions, None for float32."""

    phases: tuple[Phase, ...]
    seconds: float | None
    steps: int | None
    rate: float = 2e-3
    ema: float = 0.998
    latent_noise: float = 0.1
    amp: torch.dtype | None = torch.bfloat16
    save_every: float = 60.0
    weights: LossWeights = LossWeights()


@dataclass
class Progress:
    """What a run has done. `curve` has one entry a progress line; `samples` counts pieces."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class TrainingError(ValueError):
    """The loss left the numbers."""


# ---- the model ----


def trainable_vae(first_stage: Mapping[str, Any]) -> VideoAutoencoder:
    """The autoencoder of a YAML's `first_stage_config`, with gradients, initialised for training from nothing."""
    parts = ("encoder_config", "decoder_config", "loss_config", "regularizer_config")
    vae = VideoAutoencoder(**{name: value for name, value in first_stage["params"].items() if name in parts})
    channels = vae.decoder.z_channels
    with torch.no_grad():
        for part in vae.modules():
            if isinstance(part, SpatialNorm3D):  # begin near plain normalisation
                part.conv_y.conv.bias.fill_(1.0)
                part.conv_b.conv.bias.zero_()
        vae.decoder.conv_out.conv.weight *= 0.1  # begin with gray
        vae.encoder.conv_out.conv.weight[channels:] *= 0.1
        vae.encoder.conv_out.conv.bias[channels:] = FIRST_LOG_VARIANCE
    return vae


def rescale_latents(vae: nn.Module, factors: Tensor) -> None:
    """Multiply latent channel c by factors[c] (all positive), in the encoder, and divide by it in the decoder.

    Exact: the mean's rows of the encoder's last layer are scaled, log variances shifted by 2 log(factor), and every
    layer of the decoder that sees the latent has its input weights divided.
    """
    channels = vae.decoder.z_channels
    if factors.shape != (channels,) or not bool((factors > 0).all()):
        raise ValueError(f"rescale_latents takes {channels} positive factors, got {factors.tolist()}")
    last = vae.encoder.conv_out.conv
    with torch.no_grad():
        last.weight[:channels] *= factors[:, None, None, None, None]
        last.bias[:channels] *= factors
        last.bias[channels:] += 2 * factors.log()
        inputs = [vae.decoder.conv_in]
        for part in vae.decoder.modules():
            if isinstance(part, SpatialNorm3D):
                inputs += [part.conv_y, part.conv_b]
        for layer in inputs:
            layer.conv.weight /= factors[None, :, None, None, None]


QUIET = 4096.0  # float16 ends at 65 504; other clips than those looked at may go higher


def quieten_last_level(vae: VideoAutoencoder, latents: Tensor) -> float:
    """Scale down the decoder's last level so that its values, for latents (b, c, t, h, w), stay below `QUIET`.

    Nothing in training keeps that level's sums small, since norms read them, and float16 may not hold them. What adds
    to them is multiplied by one power of two: the upsampling in front, and the last convolution of each block. Norms
    give the same as before, but for their eps. Returns the factor; 1 where nothing was too large.
    """
    level, before = vae.decoder.up[0], vae.decoder.up[1].upsample.conv
    seen: list[float] = []
    watched = [vae.decoder.up[1].upsample, *level.block]
    hooks = [part.register_forward_hook(lambda _, __, out: seen.append(float(out.abs().max()))) for part in watched]
    with torch.no_grad():
        vae.decode(latents)
        for hook in hooks:
            hook.remove()
        factor = 2.0 ** min(0, math.floor(math.log2(QUIET / max(seen))))
        for layer in (before, *(block.conv2.conv for block in level.block)):
            layer.weight *= factor
            layer.bias *= factor
        for block in level.block:
            if hasattr(block, "nin_shortcut"):  # what it takes is scaled already
                block.nin_shortcut.bias *= factor
    return factor


def to_pixels(x: Tensor) -> Tensor:
    """uint8 (b, f, h, w, 3) -> (b, 3, f, h, w) in [-1, 1], float32; on a GPU channels stay last in memory."""
    pixels = x.movedim(-1, 1).float() / 127.5 - 1
    return pixels if x.is_cuda else pixels.contiguous()


# ---- the loss ----


def vae_loss(x: Tensor, made: Tensor, mean: Tensor, logvar: Tensor, w: LossWeights) -> dict[str, Tensor]:
    """Terms (unweighted, scalars) and their weighted sum `total`.

    Args:
        x, made: clips (b, 3, f, h, w) in [-1, 1] and their reconstructions, float32.
        mean, logvar: the posterior (b, c, t, h/8, w/8), float32.
    """
    error = made - x
    terms = {"pixel": _soft_absolute(error, w.soft), "square": error.square().mean()}
    along_y, along_x = error.diff(dim=3), error.diff(dim=4)
    terms["edge"] = _soft_absolute(along_y, w.soft) + _soft_absolute(along_x, w.soft)
    along_t = error.diff(dim=2)
    # Each chunk of the decoder has norms of its own, so errors jump where one ends: after 9 frames, then every 8.
    for name, steps in (("motion", along_t), ("border", along_t[:, :, 8::8])):
        terms[name] = _soft_absolute(steps, w.soft) if steps.shape[2] else error.new_zeros(())
    terms["kl"] = DiagonalGaussian(mean, logvar).kl() * mean.shape[0] / mean.numel()
    terms["centre"] = mean.mean(dim=(0, 2, 3, 4)).square().mean()
    weighted = [getattr(w, name) * value for name, value in terms.items() if name != "pixel"]
    return terms | {"total": terms["pixel"] + sum(weighted)}


def _soft_absolute(error: Tensor, soft: float) -> Tensor:
    """Mean of |error| with a round bottom (Charbonnier et al. 1994), 0 at 0."""
    return torch.sqrt(error.square() + soft * soft).mean() - soft


def training_pass(vae: VideoAutoencoder, x: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Encode the pieces x in one go, disturb the latents, decode as inference does, in chunks; `vae_loss`'s terms.

    Diffusion's samples are never exact, so every piece gets latent noise of its own strength, uniform up to
    `latent_noise` standard deviations of the channel.
    """
    half = settings.amp or torch.bfloat16
    # A recorded step must not keep casts of weights from one replay to the next.
    with torch.autocast(x.device.type, half, enabled=settings.amp is not None, cache_enabled=False):
        moments = vae.moments(x)
        posterior = DiagonalGaussian.from_moments(moments.float())
        z = posterior.sample(torch.randn_like(posterior.mean))
        spread = z.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        strength = settings.latent_noise * torch.rand(len(x), 1, 1, 1, 1, device=x.device)
        made = vae.decode(z + strength * spread * torch.randn_like(z))
    return vae_loss(x, made.float(), posterior.mean, posterior.logvar, settings.weights)


# ---- the loop ----


class TrainingStep:
    """One optimizer step on a batch, uint8 (b, f, h, w, 3); gives the loss terms and the gradient's norm."""

    def __init__(self, vae: VideoAutoencoder, settings: Settings, device: torch.device) -> None:
        self.vae, self.settings, self.device = vae, settings, device
        self.rate: Tensor | float = settings.rate
        options: dict[str, Any] = {}
        if device.type == "cuda":
            self.rate = torch.tensor(settings.rate, device=device)
            options = {"fused": True, "capturable": True}
        self.optimizer = torch.optim.AdamW(
            vae.parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0, **options
        )

    def __call__(self, batch: np.ndarray, rate: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._step(torch.from_numpy(batch).to(self.device))

    def _step(self, batch: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        terms = training_pass(self.vae, to_pixels(batch), self.settings)
        terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        return {name: value.detach() for name, value in terms.items()} | {"gradient": norm}


class RecordedStep(TrainingStep):
    """The same on a GPU, as one CUDA graph for each shape of batch: launched singly, its thousands of small kernels
    leave the GPU waiting for the host half of the time. The terms are valid until the next step."""

    WARM_UP = 3  # steps before recording, which initialise the optimizer and let cuDNN choose

    def __init__(self, vae: VideoAutoencoder, settings: Settings, device: torch.device) -> None:
        super().__init__(vae, settings, device)
        self._input: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._terms: dict[str, Tensor] = {}

    def __call__(self, batch: np.ndarray, rate: float) -> dict[str, Tensor]:
        host = torch.from_numpy(batch).pin_memory()
        self.rate.fill_(rate)
        if self._input is None or self._input.shape != host.shape:
            self._record(host)
        self._input.copy_(host, non_blocking=True)
        self._graph.replay()
        return self._terms

    def _record(self, host: Tensor) -> None:
        self._graph, self._terms = None, {}  # their memory goes first
        self._input = host.to(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self._step(self._input)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._terms = self._step(self._input)


class Averages:
    """A mean of a model's parameters over about the last twentieth of the steps (at most 1 / (1 - decay) steps).

    The power function's average of Karras et al. 2023 (EDM2), which needs no length of the run in advance.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = list(model.parameters())
        self.values = [p.detach().clone(memory_format=torch.preserve_format) for p in self.source]

    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 - 1 / self.count) ** 17)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], 1 - decay)

    def copy_to(self, model: nn.Module) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), self.values)


def train(vae: VideoAutoencoder, feed: ClipFeed, settings: Settings, device: torch.device, out: Path) -> Progress:
    """Train until the time or the steps are over; leaves the averaged weights in `vae`.

    The clock starts when the first batch is there. `out/checkpoint.pt` gets the averaged weights now and then, latents
    not rescaled.
    """
    vae.to(device).train()
    if device.type == "cuda":
        vae.set_channels_last()  # tensor cores want it; CPUs are slower with it
        vae.use_ops(choose_kernels("auto", "default", device).vae)
    averages = Averages(vae, settings.ema)
    step = (RecordedStep if device.type == "cuda" else TrainingStep)(vae, settings, device)
    clock = _Clock(settings)
    log = _Log(settings, feed, device)
    batch = _next_batch(feed, clock, settings)
    clock.start()
    while not clock.over:
        terms = step(batch, learning_rate(clock.part, settings.rate))
        averages.update()
        clock.step()
        log.add(terms, batch, clock)
        if clock.saves():
            save_pt(out / "checkpoint.pt", {"state_dict": named_values(vae, averages), "step": clock.steps})
        if not clock.over:
            batch = _next_batch(feed, clock, settings)
    log.write(clock)
    averages.copy_to(vae)
    save_pt(out / "checkpoint.pt", {"state_dict": named_values(vae, averages), "step": clock.steps})
    return log.progress


def named_values(vae: nn.Module, averages: Averages) -> dict[str, Tensor]:
    """Averaged parameters by name."""
    return {name: value for (name, _), value in zip(vae.named_parameters(), averages.values, strict=True)}


def _next_batch(feed: ClipFeed, clock: _Clock, settings: Settings) -> np.ndarray:
    """The next batch, with as many as there is room for ordered after it."""
    while feed.room:
        feed.ask(phase_at(clock.part_after(feed.pending), settings.phases).batch)
    return feed.take()


class _Clock:
    """How far a run is, by time or by steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.steps = settings, 0
        self.start()

    def start(self) -> None:
        self._began = self._saved = time.perf_counter()

    def step(self) -> None:
        self.steps += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def part(self) -> float:
        """0 at the start, 1 at the end."""
        if self.settings.steps is not None:
            return min(1.0, self.steps / self.settings.steps)
        return min(1.0, self.seconds / self.settings.seconds)

    def part_after(self, steps: int) -> float:
        """`part` when `steps` more have been done, as far as one can tell."""
        if self.settings.steps is not None:
            return min(1.0, (self.steps + steps) / self.settings.steps)
        return min(1.0, self.part * (1 + steps / max(self.steps, 1)))

    @property
    def over(self) -> bool:
        return self.part >= 1.0

    def saves(self) -> bool:
        """Whether a checkpoint is due; true once an interval."""
        if time.perf_counter() - self._saved < self.settings.save_every:
            return False
        self._saved = time.perf_counter()
        return True


class _Log:
    """Sums of the loss terms on the device, read only when a line is due, so that steps do not wait for it."""

    def __init__(self, settings: Settings, feed: ClipFeed, device: torch.device) -> None:
        self.progress, self._settings, self._feed, self._device = Progress(), settings, feed, device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = self._samples = 0
        self._since, self._waited = time.perf_counter(), self._feed.waited

    def add(self, terms: Mapping[str, Tensor], batch: np.ndarray, clock: _Clock) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1
        self._samples += len(batch)
        self._shape = batch.shape[:4]
        if time.perf_counter() - self._since >= LOG_SECONDS:
            self.write(clock)

    def write(self, clock: _Clock) -> None:
        """Print a line and remember it. Raises TrainingError where the loss is no number."""
        if not self._count:
            return
        values = {name: float(value) / self._count for name, value in self._sums.items()}
        passed = time.perf_counter() - self._since
        psnr = 10 * math.log10(4 / max(values["square"], 1e-12)) if math.isfinite(values["square"]) else math.nan
        p = self.progress
        p.steps, p.samples, p.seconds = clock.steps, p.samples + self._samples, clock.seconds
        p.waited += self._feed.waited - self._waited
        p.curve.append({"step": p.steps, "seconds": p.seconds, "psnr": psnr, **values})
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self._device.type == "cuda" else ""
        print(
            f"{p.seconds:6.1f} s ({clock.part:4.0%}) step {p.steps}: loss {values['total']:.4f}, pixel "
            f"{values['pixel']:.4f}, PSNR {psnr:.1f} dB, kl {values['kl']:.2f}, gradient {values['gradient']:.2f}, "
            f"{self._samples / passed:.1f} samples/s of {'x'.join(map(str, self._shape[1:]))}, waited "
            f"{self._feed.waited - self._waited:.1f} s of {passed:.1f}{memory}",
            flush=True,
        )
        if not math.isfinite(values["total"]):
            raise TrainingError(f"the loss is {values['total']} at step {p.steps}: lower --rate")
        self._reset()


def export(vae: VideoAutoencoder, path: Path, dtype: torch.dtype) -> None:
    """Write `3d-vae.pt` as the release has it: {"state_dict": ...}, in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_pt(path, {"state_dict": {name: value.to(dtype) for name, value in vae.state_dict().items()}})

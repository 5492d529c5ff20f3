"""Training of a small decoder on what the full one makes of the same latents: pairs, loss, steps, figures.

Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width (latent or pixel).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sgm.data.video_out import to_uint8
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.small_decoder import SmallDecoder
from sgm.weights.save import save_pt
from tools.demo.vae_phases import learning_rate
from tools.demo.vae_training import Averages

TEACHER_BATCH = 8  # clips that the full decoder makes at once on a GPU
RENEWED_EVERY = 4  # steps after which one of the pairs gives way to a new one, where not all find room
MARGIN = 2  # latent cells beside a crop's inner edges that do not count: what lies beyond them is unseen
SOFT = 0.02  # errors below this count by their square
SQUARE, EDGE, MOTION = 4.0, 0.5, 0.5  # weights in the loss
DECAY = 0.999  # of the averaged weights


class Teacher:
    """The full decoder: frames uint8 (3, f, h, w) of latents (c, t, h, w)."""

    def __init__(self, vae: VideoAutoencoderInferenceWrapper, device: torch.device) -> None:
        self.vae, self.device = vae, device

    @torch.no_grad()
    def frames(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Of latents on the device; those of one shape that follow each other are decoded together on a GPU."""
        most, done = TEACHER_BATCH if self.device.type == "cuda" else 1, []
        while len(done) < len(latents):
            rest = latents[len(done) :][:most]
            same = [z for z in rest if z.shape == rest[0].shape]
            count = len(same) if all(a is b for a, b in zip(same, rest)) else 1
            pixels = self.vae.decode(torch.stack(rest[:count]).to(self.vae.dtype))
            done += [x.movedim(-1, 0) for x in to_uint8(pixels)]
        return done


class Pairs:
    """Latents with the full decoder's frames, on the device as far as there is room.

    Where there is not, one pair after the other gives way to a new one while training goes on. What a step sees depends
    on the seed and its number alone.

    Args:
        latents: (c, t, h, w) each, on the CPU.
        room: bytes for frames.
        noise: most noise on a clip's latents, in standard deviations of all latents: what a model samples is never
            quite what the VAE encodes.
    """

    def __init__(self, teacher: Teacher, latents: Sequence[Tensor], room: int, noise: float, seed: int) -> None:
        self.teacher, self.latents, self.seed = teacher, latents, seed
        largest = max(self._frame_bytes(z) for z in latents)
        self.count = max(1, min(len(latents), room // largest))
        spread = torch.cat([z.float().reshape(-1)[::97] for z in latents]).std()
        self.noise = noise * float(spread)
        self.window = range(0)  # numbers in the endless row of latents
        self.items: dict[int, tuple[Tensor, Tensor]] = {}
        self.alike: list[list[int]] = []  # for each item, those of its shape

    def _frame_bytes(self, z: Tensor) -> int:
        strides = self.teacher.vae.strides
        return 3 * strides.pixel_frames(z.shape[1]) * z.shape[2] * z.shape[3] * strides.space**2

    def at(self, step: int) -> None:
        """Make the pairs of a step."""
        first = 0 if self.count == len(self.latents) else step // RENEWED_EVERY
        wanted = range(first, first + self.count)
        if wanted == self.window:
            return
        kept = {n: pair for n, pair in self.items.items() if n in wanted}
        missing = [n for n in wanted if n not in kept]
        disturbed = [self._disturbed(n) for n in missing]
        self.items = kept | dict(zip(missing, zip(disturbed, self.teacher.frames(disturbed))))
        self.window = wanted
        groups: dict[torch.Size, list[int]] = {}
        for n in wanted:
            groups.setdefault(self.items[n][0].shape, []).append(n)
        self.alike = [groups[self.items[n][0].shape] for n in wanted]

    def _disturbed(self, number: int) -> Tensor:
        z = self.latents[number % len(self.latents)].to(self.teacher.device, torch.float32)
        rng = np.random.default_rng([self.seed, number])
        noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32)).to(z.device)
        return z + self.noise * rng.random() * noise

    def batch(self, step: int, size: int, crop: int) -> tuple[Tensor, Tensor, tuple[slice, slice]]:
        """Latents (b, c, t, h, w) and frames (b, 3, f, h, w) in [-1, 1] of `size` pairs of one shape, and the rows and
        columns of these that count: of clips with a side over `crop` latent cells a piece of that size."""
        self.at(step)
        rng = np.random.default_rng([self.seed + 1, step])
        alike = self.alike[rng.integers(self.count)]
        chosen = [self.items[alike[k]] for k in rng.integers(len(alike), size=size)]
        shape = chosen[0][0].shape
        factor = self.teacher.vae.strides.space
        (rows, valid_rows), (cols, valid_cols) = (_piece(side, crop, factor, rng) for side in shape[2:])
        pixel = (..., _scaled(rows, factor), _scaled(cols, factor))
        z = torch.stack([z[..., rows, cols] for z, _ in chosen])
        frames = torch.stack([frames[pixel] for _, frames in chosen]).float() / 127.5 - 1
        return z, frames, (valid_rows, valid_cols)


def _piece(side: int, crop: int, factor: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """A piece of `crop` of `side` latent cells, and the pixels of it that count."""
    start = int(rng.integers(side - crop + 1)) if side > crop else 0
    length = min(side, crop)
    first = MARGIN if start > 0 else 0
    last = length - (MARGIN if start + length < side else 0)
    return slice(start, start + length), slice(first * factor, last * factor)


def _scaled(cells: slice, factor: int) -> slice:
    return slice(cells.start * factor, cells.stop * factor)


def loss_terms(made: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """Of clips (b, 3, f, h, w), float32, and those they should be: terms, unweighted, and their sum `total`."""
    error = made - frames
    terms = {"pixel": _soft(error), "square": error.square().mean()}
    terms["edge"] = _soft(error.diff(dim=3)) + _soft(error.diff(dim=4))
    terms["motion"] = _soft(error.diff(dim=2)) if error.shape[2] > 1 else error.new_zeros(())
    total = terms["pixel"] + SQUARE * terms["square"] + EDGE * terms["edge"] + MOTION * terms["motion"]
    return terms | {"total": total}


def _soft(error: Tensor) -> Tensor:
    """Mean of |error| with a round bottom (Charbonnier et al. 1994)."""
    return torch.sqrt(error.square() + SOFT**2).mean() - SOFT


@dataclass
class Clock:
    """How far a run is: by steps, or by the seconds of training, those before an interruption included."""

    steps: int | None
    seconds: float | None
    done: int = 0
    before: float = 0.0
    began: float = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    @property
    def passed(self) -> float:
        """Seconds of training."""
        return self.before + time.perf_counter() - self.began

    @property
    def part(self) -> float:
        """0 at the start, 1 at the end."""
        return min(1.0, self.done / self.steps if self.steps is not None else self.passed / (self.seconds or 1.0))


class Learner:
    """A small decoder, its averaged weights and its optimizer; what a checkpoint holds."""

    def __init__(self, decoder: SmallDecoder, rate: float, device: torch.device) -> None:
        self.decoder, self.rate, self.device = decoder.to(device).train(), rate, device
        self.averages = Averages(decoder, DECAY)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            decoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0, fused=fused
        )

    def step(self, z: Tensor, frames: Tensor, valid: tuple[slice, slice], part: float) -> dict[str, Tensor]:
        """One step of the optimizer; the loss's terms."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(part, self.rate)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            made = self.decoder(z)
        terms = loss_terms(made.float()[(..., *valid)], frames[(..., *valid)])
        terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.averages.update()
        return {name: value.detach() for name, value in terms.items()} | {"gradient": norm}

    def averaged(self) -> SmallDecoder:
        """The decoder with the averaged weights, frozen."""
        copy = SmallDecoder(self.decoder.sizes).to(self.device)
        self.averages.copy_to(copy)
        return copy.requires_grad_(False).eval()

    def save(self, path: Path, clock: Clock, facts: Mapping[str, Any]) -> None:
        content = {
            "decoder": self.decoder.state_dict(),
            "averages": {"values": list(self.averages.values), "count": self.averages.count},
            "optimizer": self.optimizer.state_dict(),
            "done": clock.done,
            "seconds": clock.passed,
            "facts": dict(facts),
        }
        save_pt(path, _plain(content))

    def restore(self, content: Mapping[str, Any], clock: Clock) -> None:
        """Go on from what `save` wrote."""
        self.decoder.load_state_dict(content["decoder"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.averages.count = content["averages"]["count"]
        for own, value in zip(self.averages.values, content["averages"]["values"], strict=True):
            own.copy_(value)
        clock.done, clock.before = content["done"], content["seconds"]


def _plain(value: Any) -> Any:
    """Nested values with dicts of the plain kind."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---- figures ----


@torch.no_grad()
def compared(decoder: SmallDecoder, teacher: Teacher, latents: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(small decoder's frames, full one's), uint8 (f, h, w, 3), of each clip."""
    for z in latents:
        z = z.to(teacher.device, torch.float32)
        (full,) = teacher.frames([z])
        yield to_uint8(decoder.decode(z[None].to(decoder.dtype)))[0], full.movedim(0, -1)


def psnr(frames: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB; 99 for equal ones."""
    error = float((frames.float() - expected.float()).square().mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def preview(pairs: Sequence[tuple[Tensor, Tensor]], count: int = 6) -> Image.Image:
    """`count` frames of each clip: the full decoder's, the small one's, and their difference, four times as strong."""
    rows = []
    for small, full in pairs:
        picked = np.linspace(0, len(full) - 1, min(count, len(full))).round().astype(int).tolist()
        apart = ((small.float() - full.float()) * 4 + 128).clamp(0, 255).byte()
        rows += [torch.cat(list(frames[picked]), dim=1) for frames in (full, small, apart)]
    width = max(row.shape[1] for row in rows)
    rows = [nn.functional.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows]
    return Image.fromarray(torch.cat(rows).cpu().numpy())

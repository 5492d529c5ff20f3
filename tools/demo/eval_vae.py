"""How well a 3D VAE keeps the demo's clips: whole clips encoded in one go, decoded in chunks as inference does.

    python tools/demo/eval_vae.py demo/vae/3d-vae.pt --config configs/demo_infer.yaml

The clips show combinations of the withheld list only, so no training has seen them. The report has

    psnr, psnr_least       dB on 0..255 values, mean over clips and the worst one
    psnr_disturbed         the same with noise of 0.1 standard deviations added to the latents
    border_ratio           mean difference of neighbouring frames at chunk borders over the median elsewhere
    border_ratio_source    the same of the clips themselves
    border_error_ratio     as border_ratio, of how the reconstruction's error changes from frame to frame
    latents                mean and standard deviation (of samples, times scale_factor) of each channel, posterior's
                           own deviation
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.config import merge_yaml
from sgm.files import write_text
from sgm.models.autoencoder import VideoAutoencoder, chunk_bounds
from sgm.modules.autoencoding.regularizers import DiagonalGaussian
from sgm.modules.autoencoding.strides import STRIDES
from tools.demo.attributes import ClipSpec, read_withheld
from tools.demo.clip_feed import held_out_specs
from tools.demo.shapes import render_clip
from tools.demo.vae_training import to_pixels, trainable_vae

WITHHELD = Path(__file__).with_name("withheld.json")
TEST_SEED = 20240
DISTURBANCE = 0.1  # standard deviations of latent noise for `psnr_disturbed`


@dataclass(frozen=True)
class ClipScore:
    """Of one clip. Frame differences are means of absolute values, 0..255, one for each pair of neighbours."""

    psnr: float
    psnr_disturbed: float
    made_steps: list[float]
    source_steps: list[float]
    error_steps: list[float]


@dataclass(frozen=True)
class LatentStatistics:
    """Per channel, of unscaled latents: mean, standard deviation of samples, and that of the posterior alone."""

    mean: Tensor
    deviation: Tensor
    posterior: Tensor


def batches_of(specs: Sequence[ClipSpec], device: torch.device, size: int = 4) -> Iterator[Tensor]:
    """Clips as (b, 3, f, h, w) in [-1, 1]."""
    for start in range(0, len(specs), size):
        clips = np.stack([render_clip(spec) for spec in specs[start : start + size]])
        yield to_pixels(torch.from_numpy(clips).to(device))


@torch.no_grad()
def latent_statistics(vae: VideoAutoencoder, specs: Sequence[ClipSpec], device: torch.device) -> LatentStatistics:
    """Over whole clips."""
    sums = torch.zeros(3, vae.decoder.z_channels, dtype=torch.float64, device=device)
    count = 0
    for x in batches_of(specs, device):
        moments = vae.moments(x)
        posterior = DiagonalGaussian.from_moments(moments.double())
        values = (posterior.mean, posterior.mean.square(), posterior.logvar.exp())
        sums += torch.stack([value.sum(dim=(0, 2, 3, 4)) for value in values])
        count += posterior.mean[:, 0].numel()
    mean, square, variance = sums / count
    deviation = (square - mean.square() + variance).sqrt()
    return LatentStatistics(mean.float(), deviation.float(), variance.sqrt().float())


@torch.no_grad()
def score_clips(
    vae: VideoAutoencoder, specs: Sequence[ClipSpec], deviation: Tensor, device: torch.device, seed: int = 0
) -> list[ClipScore]:
    """Encode in one go, draw latents, decode in chunks, compare. `deviation` (c,): of the latents' channels."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = []
    for x in batches_of(specs, device):
        posterior = DiagonalGaussian.from_moments(vae.moments(x))
        like_it = {"device": device, "dtype": posterior.mean.dtype}
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator, **like_it))
        noise = torch.randn(z.shape, generator=generator, device=device)
        disturbed = z + DISTURBANCE * deviation[:, None, None, None] * noise
        source, made, worse = (_levels(y) for y in (x, vae.decode(z), vae.decode(disturbed)))
        steps = (_steps(made), _steps(source), _steps(made - source))
        scores += [
            ClipScore(_psnr(made[k], source[k]), _psnr(worse[k], source[k]), *(s[k].tolist() for s in steps))
            for k in range(len(x))
        ]
    return scores


def _levels(x: Tensor) -> Tensor:
    """[-1, 1] to the whole numbers 0..255 that a video holds."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round()


def _psnr(made: Tensor, source: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (made - source).square().mean().clamp_min(1e-6)))


def _steps(x: Tensor) -> Tensor:
    """(b, c, f, h, w) -> (b, f - 1): mean absolute differences of neighbouring frames."""
    return x.diff(dim=2).abs().mean(dim=(1, 3, 4))


def border_ratio(steps: np.ndarray, latent_frames: int) -> float:
    """Mean frame difference at chunk borders over the median elsewhere, of steps (clips, f - 1) averaged over clips.

    `latent_frames` is at least 5: fewer are one chunk.
    """
    frames_before = [STRIDES.pixel_frames(start) for start, _ in chunk_bounds(latent_frames)[1:]]
    at_border = np.zeros(steps.shape[1], bool)
    at_border[[frames - 1 for frames in frames_before]] = True
    average = steps.mean(axis=0)
    return float(average[at_border].mean() / max(np.median(average[~at_border]), 1e-9))


def report(scores: Sequence[ClipScore], latents: LatentStatistics, scale: float) -> dict:
    """The figures that the module's text explains."""
    made, source, error = (
        np.array([getattr(score, name) for score in scores]) for name in ("made_steps", "source_steps", "error_steps")
    )
    t = STRIDES.latent_frames(made.shape[1] + 1)
    psnr = [score.psnr for score in scores]
    return {
        "clips": len(scores),
        "psnr": float(np.mean(psnr)),
        "psnr_least": float(np.min(psnr)),
        "psnr_disturbed": float(np.mean([score.psnr_disturbed for score in scores])),
        "border_ratio": border_ratio(made, t),
        "border_ratio_source": border_ratio(source, t),
        "border_error_ratio": border_ratio(error, t),
        "latents": {
            "mean": (latents.mean * scale).tolist(),
            "deviation": (latents.deviation * scale).tolist(),
            "posterior": (latents.posterior * scale).tolist(),
        },
    }


def evaluate(vae: VideoAutoencoder, specs: Sequence[ClipSpec], scale: float, device: torch.device) -> dict:
    """`report` of whole clips, and the seconds it took."""
    began = time.perf_counter()
    vae.eval()
    latents = latent_statistics(vae, specs, device)
    figures = report(score_clips(vae, specs, latents.deviation, device), latents, scale)
    return figures | {"seconds": time.perf_counter() - began}


def summary(figures: dict) -> str:
    """One line for a terminal."""
    deviation = figures["latents"]["deviation"]
    return (
        f"{figures['clips']} held-out clips: PSNR {figures['psnr']:.2f} dB (least {figures['psnr_least']:.2f}, latents "
        f"disturbed {figures['psnr_disturbed']:.2f}), chunk borders {figures['border_ratio']:.3f} (source "
        f"{figures['border_ratio_source']:.3f}, error {figures['border_error_ratio']:.3f}), latent deviation "
        f"{min(deviation):.2f} to {max(deviation):.2f}, {figures['seconds']:.1f} s"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="3d-vae.pt")
    parser.add_argument("--config", type=Path, required=True, help="YAML whose first_stage_config describes it")
    parser.add_argument("--clips", type=int, default=16, help="held-out clips (16)")
    parser.add_argument("--seed", type=int, default=TEST_SEED, help=f"of the clips ({TEST_SEED})")
    parser.add_argument("--withheld", type=Path, default=WITHHELD, help="list that training left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="frames of some clips above what is made of them")
    args = parser.parse_args(arguments)
    if args.clips < 1:
        parser.error("--clips must be positive")
    return args


def write_picture(vae: VideoAutoencoder, specs: Sequence[ClipSpec], device: torch.device, path: Path) -> None:
    """Six frames of each clip, around its first chunk border and further on, above their reconstructions."""
    import imageio.v3 as imageio

    rows = []
    with torch.no_grad():
        for x in batches_of(specs, device, 1):
            made = _levels(vae.decode(vae.encode(x)))
            frames = torch.linspace(0, x.shape[2] - 1, 6).long().tolist()
            rows += [torch.cat([y[0, :, k] for k in frames], dim=2) for y in (_levels(x), made)]
    picture = torch.cat(rows, dim=1).byte().permute(1, 2, 0).cpu().numpy()
    imageio.imwrite(path, picture)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    try:
        model = merge_yaml([args.config])["model"]
        specs = held_out_specs(args.clips, args.seed, read_withheld(args.withheld))
        vae = trainable_vae(model["first_stage_config"]).requires_grad_(False)
        vae.load_file(args.weights, ignore_keys=("loss",))
        vae.to(device, getattr(torch, args.dtype))
        figures = evaluate(vae, specs, model["scale_factor"], device)
        print(summary(figures))
        if args.json:
            write_text(args.json, json.dumps(figures, indent=1) + "\n")
        if args.picture:
            write_picture(vae, specs[:4], device, args.picture)
    except (ValueError, OSError) as error:
        print(f"eval_vae.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

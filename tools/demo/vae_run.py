"""One run of `train_vae.py`: build, train, give latents unit variance, store, measure what was stored, report."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sgm.config import merge_yaml
from sgm.files import write_text
from sgm.models.autoencoder import VideoAutoencoder
from tools.demo.clip_feed import ClipFeed, Withheld, held_out_specs
from tools.demo.eval_vae import TEST_SEED, batches_of, evaluate, latent_statistics, summary
from tools.demo.vae_phases import Phase
from tools.demo.vae_training import (
    LossWeights,
    Settings,
    export,
    quieten_last_level,
    rescale_latents,
    train,
    trainable_vae,
)

STATISTICS_SEED = 7  # clips that the latents' scale is measured on, others than those of the report


def run(args: argparse.Namespace, phases: tuple[Phase, ...], withheld: Withheld, feed: ClipFeed) -> None:
    """Train as `train_vae.py`'s arguments say, and write its files."""
    began = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = merge_yaml([args.config])["model"]
    settings = _settings(args, phases, device)
    (args.out / "vae").mkdir(parents=True, exist_ok=True)
    _prepare(device, args.seed)
    vae = trainable_vae(model["first_stage_config"])
    if args.init:
        vae.load_file(args.init, ignore_keys=("loss",))
    parts = (sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder))
    print("{:,} parameters in the encoder, {:,} in the decoder; {}".format(*parts, device), flush=True)
    progress = train(vae, feed, settings, device, args.out)
    feed.close()
    vae.requires_grad_(False).eval()
    scale, specs = model["scale_factor"], held_out_specs(args.test_clips, STATISTICS_SEED, withheld)
    rescale_latents(vae, 1 / scale / latent_statistics(vae, specs, device).deviation)
    quieten_last_level(vae, vae.encode(next(batches_of(specs, device))))
    path = args.out / "vae" / "3d-vae.pt"
    export(vae, path, getattr(torch, args.store))
    figures = evaluate(_stored(vae, path), held_out_specs(args.test_clips, TEST_SEED, withheld), scale, device)
    print(summary(figures), flush=True)
    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "bytes": path.stat().st_size,
        "seconds": {"all": time.perf_counter() - began, "training": progress.seconds, "waited": progress.waited},
        "held_out": figures,
        "training": asdict(progress),
    }
    write_text(args.out / "report.json", json.dumps(record, indent=1) + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes; report in {args.out / 'report.json'}", flush=True)


def _settings(args: argparse.Namespace, phases: tuple[Phase, ...], device: torch.device) -> Settings:
    half = args.amp == "bfloat16" or (args.amp == "auto" and device.type == "cuda")
    return Settings(
        phases,
        args.seconds,
        args.steps,
        rate=args.rate,
        ema=args.ema,
        latent_noise=args.latent_noise,
        amp=torch.bfloat16 if half else None,
        weights=replace(LossWeights(), kl=args.kl),
    )


def _prepare(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 5  # each phase has its own shapes to try
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _stored(vae: VideoAutoencoder, path: Path) -> VideoAutoencoder:
    """The same model with the values that the file holds."""
    vae.load_file(path)
    return vae

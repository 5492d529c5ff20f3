"""Latents that a small decoder is trained on: saved samples, encoded clips of a cache, or the demo's drawn clips.

Axes: c channels, t latent frames, h w latent height and width. All latents are the VAE's own, not scaled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.cache.shards import ShardReader, read_index
from sgm.config import ConfigError
from sgm.inference.writer import find_latents, read_latents
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.regularizers import DiagonalGaussian
from sgm.modules.diffusionmodules.image_condition import drop_first
from sgm.weights import weights_fingerprint
from sgm.weights.checksums import read_json


@dataclass(frozen=True)
class Origin:
    """What of a model decides how its latents are read.

    Attributes:
        scale: the engine's factor on latents, which saved samples have.
        patch_frames: latent frames in a patch; where there are several, saved samples begin with one that is dropped.
    """

    scale: float
    patch_frames: int

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Origin:
        """Of a configuration's model section."""
        patch = ((model.get("network_config") or {}).get("params") or {}).get("patch_size", 1)
        return cls(float(model.get("scale_factor", 1.0)), patch[0] if isinstance(patch, list) else 1)


def read_all(path: Path, origin: Origin, vae: Path, seed: int) -> list[Tensor]:
    """Latents (c, t, h, w), t odd, float16: of a cache's folder, of a saved sample or a folder of such.

    Args:
        vae: the VAE's file, from which a cache must come.
        seed: of the draw from a cached clip's posterior.
    Raises:
        ConfigError: a cache of another VAE, or nothing in it.
        WeightsError: neither, or damaged.
    """
    is_cache = (path / "cache.json").is_file()
    found = list(_cached(path, vae, seed) if is_cache else _sampled(path, origin))
    if not found:
        raise ConfigError(f"{path} holds no clips")
    return [_odd(z).to(torch.float16) for z in found]


def fingerprint(path: Path) -> str:
    """Of what `read_all` finds at a path: 16 digits that other clips, or the same in another order, change.

    From the names of a cache's clips, which are their videos' digests, or from the bytes of saved latents: a draw from
    a posterior may differ in its last bits on another machine.
    """
    digest = hashlib.sha256()
    if (path / "cache.json").is_file():
        for shard in sorted(path.glob("video-*.safetensors")):
            digest.update("\n".join(read_index(shard, 0)[0]).encode() + b"\n")
    else:
        for file in find_latents(path):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _sampled(path: Path, origin: Origin) -> Iterator[Tensor]:
    for file in find_latents(path):
        latents = drop_first(read_latents(file)[0][None], origin.patch_frames)[0]
        yield latents.float().transpose(0, 1) / origin.scale


def _cached(folder: Path, vae: Path, seed: int) -> Iterator[Tensor]:
    made_with = (read_json(folder / "cache.json").get("identity") or {}).get("vae weights")
    if made_with != weights_fingerprint(vae):
        raise ConfigError(f"{folder} is a cache of another VAE than {vae}: fill one with tools/precompute_cache.py")
    shards = sorted(folder.glob("video-*.safetensors"))
    reader, generator = ShardReader(shards), torch.Generator().manual_seed(seed)
    for k, shard in enumerate(shards):
        for entry in read_index(shard, k)[0].values():
            posterior = DiagonalGaussian.from_moments(reader.read(entry).float().transpose(0, 1)[None])
            yield posterior.sample(torch.randn(posterior.mean.shape, generator=generator))[0]


def drawn(count: int, vae: VideoAutoencoderInferenceWrapper, device: torch.device, seed: int) -> list[Tensor]:
    """Latents of `count` clips of moving shapes that the demo draws (tools/demo), without its withheld ones."""
    from tools.demo.attributes import read_withheld
    from tools.demo.clip_feed import CLIP, BatchShape, make_batch
    from tools.demo.eval_vae import WITHHELD
    from tools.demo.vae_training import to_pixels

    withheld, shape, found = read_withheld(WITHHELD), BatchShape(1, *CLIP), []
    for k in range(count):
        pixels = to_pixels(torch.from_numpy(make_batch(k, shape, seed, withheld)).to(device))
        with torch.no_grad():
            found.append(vae.encode(pixels.to(vae.dtype))[0].to("cpu", torch.float16))
    return found


def _odd(z: Tensor) -> Tensor:
    """As many frames as the full decoder takes."""
    return z[:, : z.shape[1] - (z.shape[1] + 1) % 2]

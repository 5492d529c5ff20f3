"""What stands in for VAE and text encoder in a run on cached clips: neither has weights, both take what is stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from sgm.cache.dataset import EMBEDDING, MOMENTS
from sgm.cache.ready import TEXT_KEY, encoder_params, starts_from_picture
from sgm.cache.shards import CacheError
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.first_stage import FirstStage
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.conditioner import AbstractEmbModel
from sgm.modules.ops.vae import VaeOps
from sgm.util import Config, Role, instantiate_from_config


def cached_model_section(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model:` section with stand-ins for VAE and text encoder, which take what the cache holds.

    Raises:
        ConfigError: parts that no cache can stand for.
    """
    encoder_params(model)
    section = copy.deepcopy(dict(model))
    stage = section["first_stage_config"]
    params = {"regularizer_config": stage["params"].get("regularizer_config")}
    if starts_from_picture(model):
        params["image_config"] = stage
    section["first_stage_config"] = {"target": f"{__name__}.{CachedFirstStage.__name__}", "params": params}
    embedder = section["conditioner_config"]["params"]["emb_models"][0]
    embedder.pop("input_key", None)
    embedder |= {
        "target": f"{__name__}.{CachedTextEmbedder.__name__}",
        "input_keys": [TEXT_KEY, EMBEDDING],
        "params": {},
    }
    section["input_key"] = MOMENTS
    return section


class CachedFirstStage(FirstStage):
    """Takes moments where the autoencoder takes pixels; same draws, same result.

    Args:
        regularizer_config: that of the autoencoder: from moments to latents.
        image_config: the autoencoder, of which the encoder stays, for pictures: they are noised before it, anew each
            time, so no encoding of them can be kept. None where no model starts from a picture.
    """

    image_stage: VideoAutoencoderInferenceWrapper | None

    def __init__(
        self,
        regularizer_config: Annotated[Config, Role(DiagonalGaussianRegularizer)] | None = None,
        image_config: Annotated[Config, Role(VideoAutoencoderInferenceWrapper)] | None = None,
    ) -> None:
        super().__init__()
        given = regularizer_config
        self.regularization = instantiate_from_config(given) if given else DiagonalGaussianRegularizer()
        self.image_stage = instantiate_from_config(image_config) if image_config else None
        if self.image_stage is not None:
            self.image_stage.drop_decoder()

    def encode(self, x: Tensor) -> Tensor:
        """Moments x (b, 2c, t, h, w) to latents (b, c, t, h, w), a draw from the posterior."""
        return self.regularization.latents(x.contiguous())

    def moments(self, x: Tensor) -> Tensor:
        """Those of pictures. Raises CacheError: there is no `image_config`."""
        if self.image_stage is None:
            raise CacheError("pictures cannot be encoded: this run on cached clips is of a text-to-video model")
        return self.image_stage.moments(x)

    def use_ops(self, ops: VaeOps) -> None:
        if self.image_stage is not None:
            self.image_stage.use_ops(ops)


class CachedTextEmbedder(AbstractEmbModel):
    """Stands for a frozen encoder whose embeddings lie in the batch; its input keys are the captions and those.

    The captions stay an input so that what is said of them (`force_zero_embeddings`) keeps its meaning. Caption dropout
    is the conditioner's, as for any embedder.
    """

    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Says where the engine lives and in which type; real even when the engine is built on the meta device.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)

    def forward(self, texts: Sequence[str], embedding: Tensor) -> Tensor:
        """Embeddings (b, l, d) of b texts, on the module's device and in its type."""
        if len(texts) != len(embedding):
            raise ValueError(f"{len(texts)} captions with {len(embedding)} embeddings")
        # Converted there: the CPU would take longer, and what it makes is not page-locked.
        return embedding.to(self.place.device, non_blocking=True).to(self.place.dtype)

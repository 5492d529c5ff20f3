"""The first stage of a run on cached clips: it draws from stored posteriors, and has no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.util import instantiate_from_config

_REGULARIZER = {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"}


class NotCachedError(ValueError):
    """Something was asked for that a run on cached clips does not have."""


class CachedFirstStage(nn.Module):
    """Takes moments where the autoencoder takes pixels; same draws, same result.

    Args:
        regularizer_config: that of the autoencoder: from moments to latents.
    """

    def __init__(self, regularizer_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.regularization = instantiate_from_config(regularizer_config or _REGULARIZER)

    def encode(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments (b, 2c, t, h, w) to latents (b, c, t, h, w), a draw from the posterior.

        `noise` (the latents' shape) replaces the draw's randn_like.
        """
        sampler = torch.randn_like if noise is None else lambda mean: noise.to(mean)
        return self.regularization.latents(moments.contiguous(), sampler)

    def use_ops(self, ops: Any) -> None:
        """Nothing here has a choice of implementations."""

    def decode(self, z: Tensor, chunked: bool = True) -> Tensor:
        """Raises NotCachedError: there is no decoder."""
        raise NotCachedError(
            "a run on cached clips has no decoder: set args.only_log_video_latents: True, or leave out args.cache_dir"
        )

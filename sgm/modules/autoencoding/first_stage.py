"""What a diffusion model asks of its first stage."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.autoencoding.strides import STRIDES, Strides
from sgm.modules.ops.vae import VaeOps


class FirstStage(nn.Module, ABC):
    """From a clip to latents and back. Axes: b batch, f pixel frames, t latent frames, c channels, h w pixels.

    Attributes:
        strides: how sizes of pixels and latents belong together.
    """

    regularization: DiagonalGaussianRegularizer
    strides: Strides = STRIDES

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents (b, c, t, h/8, w/8), not scaled, of pixels (b, 3, f, h, w) in [-1, 1]: a draw from the posterior."""

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log variance (b, 2c, t, h/8, w/8) of the posterior of pixels (b, 3, f, h, w)."""

    @abstractmethod
    def use_ops(self, ops: VaeOps) -> None:
        """Run with this implementation of the operations."""

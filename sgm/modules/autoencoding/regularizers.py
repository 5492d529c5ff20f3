"""From the encoder's moments to latents: the diagonal Gaussian posterior of a VAE (Kingma & Welling 2013)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(logvar)), value by value; mean and logvar (b, c, t, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split (b, 2c, t, h, w) into mean and log variance, the latter clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOG_VARIANCE_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; noise has the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Divergence from N(0, 1), summed over all values and divided by b. A scalar, float32 or wider."""
        kind = torch.promote_types(self.mean.dtype, torch.float32)  # a sum over a clip overflows half precision
        mean, logvar = self.mean.to(kind), self.logvar.to(kind)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / mean.shape[0]


class DiagonalGaussianRegularizer(nn.Module):
    """Draws latents from the posterior (`sample=True`, as the released models were trained), or takes its mean."""

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.sample = sample

    def forward(
        self, moments: Tensor, noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """moments (b, 2c, t, h, w) -> latents (b, c, t, h, w) and {"kl_loss": scalar}.

        `noise_sampler(mean)` gives the noise; it is called once, and only when sampling.
        """
        posterior = DiagonalGaussian.from_moments(moments)
        return self._draw(posterior, noise_sampler), {"kl_loss": posterior.kl()}

    def latents(self, moments: Tensor, noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """The first of what `forward` gives, without the second."""
        return self._draw(DiagonalGaussian.from_moments(moments), noise_sampler)

    def _draw(self, posterior: DiagonalGaussian, noise_sampler: Callable[[Tensor], Tensor]) -> Tensor:
        return posterior.sample(noise_sampler(posterior.mean)) if self.sample else posterior.mean

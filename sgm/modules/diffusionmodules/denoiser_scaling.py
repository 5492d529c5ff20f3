"""Preconditioning coefficients: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

Karras et al. 2022 (arXiv 2206.00364), equation 7. Every class is called as `(sigma, idx=None)`, sigma of any shape,
and returns `Scalings`, whose entries broadcast like sigma (c_noise of `VideoScaling` has the shape of idx).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgm.typed import Positive


class Scalings(NamedTuple):
    """Coefficients of the preconditioned network, see the module's first line."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class EDMScaling:
    """Karras et al. 2022, table 1: unit variance of network input and target for data of deviation `sigma_data`."""

    def __init__(self, sigma_data: Positive = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor, idx: Tensor | None = None) -> Scalings:
        total = sigma**2 + self.sigma_data**2
        return Scalings(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            input=1 / total.sqrt(),
            noise=0.25 * sigma.log(),
        )


class EpsScaling:
    """The network predicts the noise (Ho et al. 2020): D = x - sigma F(x / sqrt(1 + sigma^2))."""

    def __call__(self, sigma: Tensor, idx: Tensor | None = None) -> Scalings:
        return Scalings(skip=torch.ones_like(sigma), out=-sigma, input=1 / (sigma**2 + 1).sqrt(), noise=sigma.clone())


class VScaling:
    """The network predicts v (Salimans & Ho 2022, arXiv 2202.00512), for a variance-exploding sigma."""

    def __call__(self, sigma: Tensor, idx: Tensor | None = None) -> Scalings:
        total = sigma**2 + 1
        return Scalings(skip=1 / total, out=-sigma / total.sqrt(), input=1 / total.sqrt(), noise=sigma.clone())


class VScalingWithEDMcNoise:
    """`VScaling` that tells the network 0.25 ln(sigma), as EDM does."""

    def __call__(self, sigma: Tensor, idx: Tensor | None = None) -> Scalings:
        return VScaling()(sigma)._replace(noise=0.25 * sigma.log())


class VideoScaling:
    """v-prediction for signal rates a = sqrt(abar): D = a x - sqrt(1 - a^2) F(x; timestep).

    Salimans & Ho 2022, section 4: v = a eps - sqrt(1 - a^2) x0, hence x0 = a x_t - sqrt(1 - a^2) v. The network is
    told the timestep `idx` as it is given.
    """

    def __call__(self, sigma: Tensor, idx: Tensor | None = None) -> Scalings:
        if idx is None:
            raise ValueError("VideoScaling needs the timesteps: call the denoiser with idx=(b,) timesteps.")
        return Scalings(skip=sigma, out=-((1 - sigma**2) ** 0.5), input=torch.ones_like(sigma), noise=idx.clone())

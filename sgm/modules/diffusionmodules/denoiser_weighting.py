"""Loss weights as functions of sigma (variance-exploding). `VideoDiffusionLoss` has its own weight and asks none."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm.typed import Positive


class UnitWeighting:
    """w = 1."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class EDMWeighting:
    """w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2: unit weight on the network's output (Karras et al. 2022)."""

    def __init__(self, sigma_data: Positive = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """EDM's weight with sigma_data = 1: the plain error of v (Salimans & Ho 2022)."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """w = sigma^-2: the plain error of eps (Ho et al. 2020)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2.0

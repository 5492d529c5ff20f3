"""Embeddings that several networks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(
    timesteps: Tensor, dim: int, max_period: float = 10000.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Sinusoidal embedding of timesteps (b,), whole or real numbers, as (b, dim): all cosines, then all sines.

    The i-th frequency is max_period^(-i / (dim/2)) (Vaswani et al. 2017, 3.5). Computed in float32 and then cast to
    `dtype`; an odd `dim` ends in a zero column.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = timesteps.float()[:, None] * frequencies
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    if dim % 2:
        embedding = torch.nn.functional.pad(embedding, (0, 1))
    return embedding.to(dtype or torch.float32)

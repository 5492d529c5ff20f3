"""Loss by timestep: early timesteps (little noise) and late ones have losses of quite different size and course."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BINS = 10
BIN_NAMES = tuple(f"{100 * k:03d}-{100 * k + 99:03d}" for k in range(BINS))  # in thousandths of the schedule


def bin_sums(logs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(2, BINS) float64: sum of losses and number of samples by timestep, of what is finite.

    `logs`: `sample_loss` (b,) and `timestep_share` (b,) in [0, 1]; where they are absent all is 0.
    """
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    if "sample_loss" not in logs:
        return sums
    loss = logs["sample_loss"].double()
    finite = torch.isfinite(loss)
    place = (logs["timestep_share"] * BINS).long().clamp_(0, BINS - 1)
    members = torch.nn.functional.one_hot(place, BINS).double() * finite[:, None]
    return torch.stack([torch.where(finite, loss, 0.0) @ members, members.sum(0)])


def bin_means(sums: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    """Mean loss of each bin; None for an empty one."""
    return [total / count if count else None for total, count in zip(sums, counts)]

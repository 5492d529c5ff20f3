"""Which noise level each training sample gets."""

from __future__ import annotations

import logging
from typing import Annotated

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.discretizer import Discretization, Timesteps
from sgm.typed import Count, Positive
from sgm.util import Config, Role, instantiate_from_config

logger = logging.getLogger(__name__)


def uniform_groups(world_size: int, num_idx: int) -> int:
    """How many equal intervals `world_size` ranks can split `num_idx` timesteps into: the most that divide both.

    The ranks form groups of equal width w, the smallest for which w divides world_size and world_size / w divides
    num_idx (1000 timesteps: 8 ranks make 8 groups, 6 make 2, 3 make 1).
    """
    return max(g for g in range(1, world_size + 1) if world_size % g == 0 and num_idx % g == 0)


def rank_range(rank: int, world_size: int, num_idx: int, group_num: int = 0) -> range:
    """The timesteps that a data-parallel rank draws from, such that together the ranks cover all of them evenly.

    Args:
        group_num: number of intervals; 0 takes `uniform_groups`.
    Raises:
        ValueError: rank outside the world, or group_num does not divide world_size and num_idx.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"data-parallel rank {rank} is outside a world of {world_size}.")
    groups = group_num or uniform_groups(world_size, num_idx)
    if groups < 1 or world_size % groups or num_idx % groups:
        raise ValueError(
            f"group_num={group_num} must divide the {world_size} data-parallel ranks and the {num_idx} "
            f"timesteps; 0 chooses {uniform_groups(world_size, num_idx)}."
        )
    width, interval = world_size // groups, num_idx // groups
    low = rank // width * interval
    return range(low, low + interval)


class DiscreteSampling:
    """Uniformly drawn timesteps and their table entries.

    Args:
        flip: order the table least noisy first, so that its index is the timestep.
        uniform_sampling: every data-parallel rank draws from its own interval of timesteps (see `rank_range`), which
            evens out the levels of a large batch. With one rank it is the full range.
        group_num: number of those intervals; 0 takes as many as possible, and so does, with a word, a number that does
            not divide the ranks (the original's files for 1.5 say 40).
    """

    def __init__(
        self,
        discretization_config: Annotated[Config, Role(Discretization)],
        num_idx: Timesteps,
        do_append_zero: bool = False,
        flip: bool = True,
        uniform_sampling: bool = False,
        group_num: Count = 0,
    ) -> None:
        self.num_idx = num_idx
        self.sigmas = instantiate_from_config(discretization_config)(num_idx, do_append_zero=do_append_zero, flip=flip)
        self.uniform_sampling = uniform_sampling
        self.group_num = group_num

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """(b,) int64 timesteps -> (b,) float32 table entries, on the CPU."""
        return self.sigmas[idx.cpu()]

    def index_range(self, rank: int | None = None, world_size: int | None = None) -> range:
        """What this rank draws from; rank and world size default to the data-parallel ones of the process."""
        if not self.uniform_sampling:
            return range(self.num_idx)
        if rank is None or world_size is None:
            from sgm import distributed

            rank, world_size = distributed.data_parallel_rank(), distributed.data_parallel_world_size()
        if self.group_num and (world_size % self.group_num or self.num_idx % self.group_num):
            possible = uniform_groups(world_size, self.num_idx)
            if rank == 0:
                logger.warning(
                    "sigma_sampler_config: group_num %d does not divide %d ranks and %d timesteps; %d is taken",
                    self.group_num, world_size, self.num_idx, possible,
                )  # fmt: skip
            self.group_num = 0
        return rank_range(rank, world_size, self.num_idx, self.group_num)

    def __call__(
        self, n_samples: int, rand: Tensor | None = None, return_idx: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b,) float32 table entries, with `return_idx` also their (b,) int64 timesteps.

        These are `rand` where it is given, else drawn on the CPU with one `torch.randint`.
        """
        if rand is None:
            span = self.index_range()
            rand = torch.randint(span.start, span.stop, (n_samples,), device="cpu")
        sigma = self.idx_to_sigma(rand)
        return (sigma, rand) if return_idx else sigma


class EDMSampling:
    """ln(sigma) ~ N(p_mean, p_std^2) (Karras et al. 2022, table 1)."""

    def __init__(self, p_mean: float = -1.2, p_std: Positive = 1.2) -> None:
        self.p_mean = p_mean
        self.p_std = p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """(b,) float32 sigma; `rand` (b,) standard normal values to take instead of drawing."""
        normal = torch.randn(n_samples, device="cpu") if rand is None else rand
        return (self.p_mean + self.p_std * normal).exp()

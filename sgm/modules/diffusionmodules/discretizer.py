"""Noise schedules, and which of their steps a sampling run of n steps visits.

Two kinds of values are handed around, both float32 and both named "sigmas" in YAML files and attributes:

- `LegacyDDPMDiscretization`: sigma = sqrt((1 - abar) / abar), the noise level of a variance-exploding process;
- `ZeroSNRDDPMDiscretization`: a = sqrt(abar), the signal rate of a variance-preserving process, 0 = pure noise.

abar is the cumulative product of 1 - beta (Ho et al. 2020, arXiv 2006.11239).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sgm.typed import ConfigError, Positive, Range

Timesteps = Annotated[int, Range(1, 1_000_000)]
T = TypeVar("T", float, np.ndarray, Tensor)


def shift_snr(abar: T, scale: float) -> T:
    """Divide the signal-to-noise ratio abar / (1 - abar) by `scale` (> 1 means more noise at every step).

    From snr' = snr / scale follows abar' = abar / (scale + (1 - scale) abar).
    """
    return abar / (scale + (1 - scale) * abar)


def rescale_to_zero_snr(signal: Tensor) -> Tensor:
    """Shift and stretch (n,) falling signal rates sqrt(abar) so that the last is 0 and the first stays.

    Lin et al. 2023 (arXiv 2305.08891), Algorithm 1. A single value becomes 0: it is the last one.
    """
    first, last = signal[0].clone(), signal[-1].clone()
    if len(signal) == 1:
        return torch.zeros_like(signal)
    return (signal - last) * (first / (first - last))


def trailing_timesteps(steps: int, num_timesteps: int) -> np.ndarray:
    """(steps,) ascending training timesteps in 0..num_timesteps-1, evenly spaced, the last one always included.

    Lin et al. 2023, section 3.3 ("trailing"): 50 of 1000 gives 19, 39, ..., 999.
    """
    return np.linspace(num_timesteps - 1, 0, steps, endpoint=False).astype(np.int64)[::-1].copy()


class Discretization(ABC):
    """Maps a number of steps to that many schedule values, noisiest first."""

    def __init__(self, linear_start: float, linear_end: float, num_timesteps: int) -> None:
        if not 0 < linear_start <= linear_end < 1:
            raise ConfigError(f"betas need 0 < linear_start <= linear_end < 1, not {linear_start} and {linear_end}.")
        self.num_timesteps = num_timesteps
        # linear in their square roots (Rombach et al. 2022)
        betas = np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps, dtype=np.float64) ** 2
        self.alphas_cumprod = np.cumprod(1.0 - betas)

    def __call__(
        self,
        n: int,
        do_append_zero: bool = True,
        device: torch.device | str = "cpu",
        flip: bool = False,
        return_idx: bool = False,
    ) -> Any:  # a pair under `return_idx`
        """Schedule values for a run of `n` steps.

        Args:
            n: number of steps, 1 to num_timesteps.
            do_append_zero: put a 0 behind the n values (before `flip`).
            device: where the values go; they are computed on the CPU, also under `torch.device("meta")`.
            flip: reverse the order, least noisy first (so that index = training timestep when n = num_timesteps).
        Returns:
            float32 (n,) or (n + 1,); with `return_idx` a pair of that and the int64 (n,) timesteps on the CPU, which
            are always ascending (least noisy first) and never extended.
        Raises:
            ConfigError: n out of range.
        """
        if not 1 <= n <= self.num_timesteps:
            raise ConfigError(
                f"the schedule has {self.num_timesteps} timesteps: num_steps must be 1 to "
                f"{self.num_timesteps}, not {n}."
            )
        timesteps = trailing_timesteps(n, self.num_timesteps)
        abar = torch.tensor(self.alphas_cumprod[timesteps], dtype=torch.float32, device="cpu")
        values = self.values_from(abar).flip(0)
        if do_append_zero:
            values = torch.cat([values, values.new_zeros(1)])
        values = (values.flip(0) if flip else values).to(device)
        return (values, torch.tensor(timesteps, device="cpu")) if return_idx else values

    @abstractmethod
    def values_from(self, abar: Tensor) -> Tensor:
        """float32 (n,) abar, least noisy first -> the (n,) values this schedule hands around, in the same order."""


class LegacyDDPMDiscretization(Discretization):
    """sigma = sqrt((1 - abar) / abar) of the DDPM schedule (terminal SNR above zero)."""

    def __init__(
        self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: Timesteps = 1000
    ) -> None:
        super().__init__(linear_start, linear_end, num_timesteps)

    def values_from(self, abar: Tensor) -> Tensor:
        return ((1 - abar) / abar).sqrt()


class ZeroSNRDDPMDiscretization(Discretization):
    """a = sqrt(abar), shifted in SNR and rescaled to end at zero signal.

    The rescaling is done on the values of the run itself, not on the full table, so the values of a 50-step run
    differ from the 1000-step table's by up to 1e-3. The original does so, and other implementations do not.

    Args:
        shift_scale: divides the SNR; 3 for CogVideoX-2B, 1 (no shift) for 5B.
        keep_start: adjust linear_start so that the shift leaves the first beta as it is (without post_shift only).
        post_shift: shift after the rescaling instead of before it.
    """

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        num_timesteps: Timesteps = 1000,
        shift_scale: Positive = 1.0,
        keep_start: bool = False,
        post_shift: bool = False,
    ) -> None:
        if keep_start and not post_shift:
            linear_start = shift_snr(linear_start, shift_scale)
        super().__init__(linear_start, linear_end, num_timesteps)
        self.shift_scale = shift_scale
        self.post_shift = post_shift
        if not post_shift:
            self.alphas_cumprod = shift_snr(self.alphas_cumprod, shift_scale)

    def values_from(self, abar: Tensor) -> Tensor:
        signal = rescale_to_zero_snr(abar.sqrt())
        return shift_snr(signal**2, self.shift_scale).sqrt() if self.post_shift else signal

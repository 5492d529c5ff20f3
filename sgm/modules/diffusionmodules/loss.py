"""The training loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from sgm.distributed import same_for_clip as shared
from sgm.modules.diffusionmodules.denoiser import Network, append_dims
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling
from sgm.typed import NotNegative, Positive
from sgm.util import Config, Role, instantiate_from_config

Denoise = Callable[..., Tensor]  # (network, noised, signal rate (b,), conditions, idx=..., **extras) -> estimate
Conditioner = Callable[[Mapping[str, Any]], dict[str, Tensor]]


def add_noise(x: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """a x + sqrt(1 - a^2) noise in float32; x and noise (b, ...), a = signal (b,)."""
    a = append_dims(signal.float(), x.ndim)
    return a * x.float() + (1 - a**2) ** 0.5 * noise


def snr_weight(signal: Tensor, cap: float | None = None) -> Tensor:
    """(b,) weight 1 / (1 - a^2) of the error in x, at most `cap`.

    1 / (1 - a^2) = SNR + 1 turns the error of the clean estimate into the error of v (Salimans & Ho 2022, section 4).
    The cap is in the manner of min-SNR (Hang et al. 2023, arXiv 2303.09556).
    """
    weight = 1 / (1 - signal.float() ** 2)
    return weight if cap is None else weight.clamp(max=cap)


def weighted_error(estimate: Tensor, target: Tensor, weight: Tensor, kind: str) -> Tensor:
    """(b,) mean over all axes but the first of weight * |estimate - target|^p, p = 2 for "l2" and 1 for "l1"."""
    difference = estimate - target
    error = difference**2 if kind == "l2" else difference.abs()
    return (append_dims(weight, target.ndim) * error).flatten(1).mean(1)


class LossDetails(NamedTuple):
    """Of each sample: its loss (b,) float32, and where its timestep lies between the first (0) and the last (1)."""

    loss: Tensor
    timestep_share: Tensor


class Loss(ABC):
    """Loss of each sample of clean latents and a batch."""

    @abstractmethod
    def __call__(
        self,
        network: Network,
        denoiser: Denoise,
        conditioner: Conditioner,
        z: Tensor,
        batch: Mapping[str, Any],
        idx: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """(b,) float32.

        Args:
            z: clean latents (b, ...), scaled, in any floating type.
            idx: (b,) int64 timesteps instead of random ones.
            noise: (b, ...) like z instead of random noise.
        """


class VideoDiffusionLoss(Loss):
    """Weighted error of the clean estimate, at a random timestep per sample.

    Random draws, in this order: what the conditioner draws (caption dropout), the timesteps (CPU), the noise like z,
    and the offset (CPU). All but the first are made equal for all processes of a clip.

    Args:
        offset_noise_level: > 0 adds that much of one common normal value to all noise of a sample.
        block_scale, block_size, fixed_frames: known to the original, which makes nothing of them; only their defaults
            are accepted.
        min_snr_value: upper bound of the weight; None for no bound.
        batch2model_keys: entries of the batch that are handed to the network. (Its `concat_images` become the condition
            `concat`, whatever stands here.)
    Raises:
        ValueError: a value for a parameter that has no effect.
    """

    def __init__(
        self,
        sigma_sampler_config: Annotated[Config, Role(DiscreteSampling)],
        type: Literal["l2", "l1"] = "l2",
        offset_noise_level: NotNegative = 0.0,
        block_scale: float | None = None,
        block_size: int | None = None,
        min_snr_value: Positive | None = None,
        fixed_frames: int = 0,
        batch2model_keys: str | Sequence[str] | None = None,
    ) -> None:
        idle = {"block_scale": block_scale, "block_size": block_size, "fixed_frames": fixed_frames or None}
        given = [f"{name}={value}" for name, value in idle.items() if value is not None]
        if given:
            raise ValueError(
                f"VideoDiffusionLoss: {', '.join(given)} would have no effect (nor has it in the "
                "original); remove it from loss_fn_config.params."
            )
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.type = type
        self.offset_noise_level = offset_noise_level
        self.min_snr_value = min_snr_value
        keys = [batch2model_keys] if isinstance(batch2model_keys, str) else list(batch2model_keys or ())
        self.batch2model_keys = frozenset(keys) - {"concat_images"}

    def __call__(
        self,
        network: Network,
        denoiser: Denoise,
        conditioner: Conditioner,
        z: Tensor,
        batch: Mapping[str, Any],
        idx: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        return self.detailed(network, denoiser, conditioner, z, batch, idx, noise).loss

    def detailed(
        self,
        network: Network,
        denoiser: Denoise,
        conditioner: Conditioner,
        z: Tensor,
        batch: Mapping[str, Any],
        idx: Tensor | None = None,
        noise: Tensor | None = None,
        base: Network | None = None,
        base_weight: float = 1.0,
    ) -> LossDetails:
        """As `__call__`, with the timesteps that were drawn.

        With a `base`, samples whose entry in batch["prior"] (b,) is true have its estimate for their target, not z, and
        `base_weight` times the weight.
        """
        cond = conditioner(batch)
        if "concat_images" in batch:
            cond = cond | {"concat": batch["concat_images"]}
        extras = {key: batch[key] for key in self.batch2model_keys if key in batch}
        signal, idx, noise = self._draw(z, idx, noise)
        noised = add_noise(z, noise, signal)
        estimate = denoiser(network, noised, signal, cond, idx=idx, **extras)
        target, weight = z.float(), snr_weight(signal, self.min_snr_value)
        if base is not None:
            (kept,) = batch["prior"].nonzero(as_tuple=True)  # on the CPU, so that nobody waits for the device
            if len(kept):
                rows = kept.to(z.device)
                given = {name: value[rows] for name, value in (cond | extras).items()}
                known = denoiser(
                    base, noised[rows], signal[rows], {name: given.pop(name) for name in cond}, idx=idx[rows], **given
                )
                target = target.index_copy(0, rows, known.float())
                weight = weight.index_copy(0, rows, base_weight * weight[rows])
        loss = weighted_error(estimate, target, weight, self.type)
        return LossDetails(loss, idx / self.sigma_sampler.num_idx)

    def _draw(self, z: Tensor, idx: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Signal rates (b,), timesteps (b,) and noise (b, ...) on z's device, the same for all processes of a clip."""
        signal, idx = self.sigma_sampler(z.shape[0], rand=idx, return_idx=True)
        if noise is None:
            noise = torch.randn_like(z)
        if self.offset_noise_level > 0:
            offset = torch.randn(z.shape[0], device="cpu").to(z.device, non_blocking=True)
            noise = noise + append_dims(offset, z.ndim) * self.offset_noise_level
        signal, idx = (drawn.to(z.device, non_blocking=True) for drawn in (signal, idx))  # nobody waits for the queue
        return shared(signal), shared(idx), shared(noise)

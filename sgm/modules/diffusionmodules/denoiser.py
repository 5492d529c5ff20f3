"""The denoiser: a network's raw output made into an estimate of the clean latent. Training and sampling share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.modules.diffusionmodules.discretizer import Discretization, Timesteps
from sgm.util import Config, Role, instantiate_from_config

# (noised input, noise label (b,), conditions, **extras) -> output like the input; `OpenAIWrapper` is one
Network = Callable[..., Tensor]
WEIGHTING, SCALING = (Role(object, (f"{__package__}.denoiser_{name}.",)) for name in ("weighting", "scaling"))


def append_dims(values: Tensor, ndim: int) -> Tensor:
    """(b, ...) with axes of length 1 appended up to `ndim` axes, to broadcast against a sample."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), coefficients by `scaling_config` (Karras et al. 2022, eq. 7).

    Args:
        weighting_config: target of a loss weight, which the video loss does not use.
    """

    def __init__(
        self, weighting_config: Annotated[Config, WEIGHTING], scaling_config: Annotated[Config, SCALING]
    ) -> None:
        super().__init__()
        self.weighting = instantiate_from_config(weighting_config)
        self.scaling = instantiate_from_config(scaling_config)

    def quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The sigma that is used for a wanted sigma; here itself."""
        return sigma

    def noise_label(self, c_noise: Tensor) -> Tensor:
        """What the network is told; here the scaling's c_noise itself."""
        return c_noise

    def forward(
        self,
        network: Network,
        x: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        idx: Tensor | None = None,
        **additional_model_inputs: Any,
    ) -> Tensor:
        """Estimate the clean sample.

        Args:
            network: called as `network(c_in x, label (b,), cond, **additional_model_inputs)`.
            x: noised sample (b, ...), float32.
            sigma: (b,) noise level, in the terms of the scaling (a signal rate for `VideoScaling`).
            idx: (b,) timesteps, for scalings that pass them on.
        Returns:
            (b, ...) in the type of x (float32), whatever the network's type is.
        """
        sigma = self.quantize_sigma(sigma)
        c = self.scaling(append_dims(sigma, x.ndim), idx=idx)
        label = self.noise_label(c.noise.reshape(sigma.shape))
        return network(x * c.input, label, cond, **additional_model_inputs) * c.out + x * c.skip


class DiscreteDenoiser(Denoiser):
    """A denoiser that snaps sigma to the nearest entry of a table of `num_idx` values, those seen in training.

    Args:
        quantize_c_noise: tell the network the index of the nearest table entry instead of c_noise itself.
        flip: order the table least noisy first, so that its index is the training timestep.
    Raises:
        ValueError: `VideoScaling` with quantize_c_noise, or with a schedule that does not hold signal rates.
    """

    def __init__(
        self,
        weighting_config: Annotated[Config, WEIGHTING],
        scaling_config: Annotated[Config, SCALING],
        num_idx: Timesteps,
        discretization_config: Annotated[Config, Role(Discretization)],
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
    ) -> None:
        super().__init__(weighting_config, scaling_config)
        if quantize_c_noise and isinstance(self.scaling, VideoScaling):
            raise ValueError(
                "quantize_c_noise: True does not go with VideoScaling, whose noise label is a timestep already (it "
                "would be looked up among signal rates, and nearly all timesteps would become 0). "
                "Set denoiser_config.params.quantize_c_noise: False."
            )
        self.quantize_c_noise = quantize_c_noise
        table = instantiate_from_config(discretization_config)(num_idx, do_append_zero=do_append_zero, flip=flip)
        if isinstance(self.scaling, VideoScaling) and not 0 <= float(table.min()) <= float(table.max()) < 1:
            raise ValueError(
                f"VideoScaling needs signal rates in [0, 1), but {discretization_config['target']} gives "
                f"{float(table.min()):.4g} to {float(table.max()):.4g}. Use ZeroSNRDDPMDiscretization."
            )
        # Not a buffer: it belongs to the configuration, stays out of checkpoints, and must not be cast to half.
        self._tables: dict[torch.device, Tensor] = {table.device: table}

    @property
    def sigmas(self) -> Tensor:
        """The table, (num_idx,) float32 on the CPU."""
        return self._tables[torch.device("cpu")]

    def table_on(self, device: torch.device) -> Tensor:
        """The table on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = self.sigmas.to(device)
        return self._tables[device]

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """Index of the nearest table entry, int64 in the shape of sigma."""
        distance = (sigma.reshape(1, -1) - self.table_on(sigma.device)[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """Table entries for int64 indices."""
        return self.table_on(idx.device)[idx]

    def quantize_sigma(self, sigma: Tensor) -> Tensor:
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def noise_label(self, c_noise: Tensor) -> Tensor:
        return self.sigma_to_idx(c_noise) if self.quantize_c_noise else c_noise

"""The seam between denoiser and network: a dict of conditions becomes the network's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class OpenAIWrapper(nn.Module):
    """Holds the network as `diffusion_model` and unpacks the conditions for it.

    Args:
        diffusion_model: called as `net(x, timesteps=t, context=..., **kwargs)`, with `y=` where a vector is given.
        dtype: type that the conditions are cast to, the network's own.
    """

    def __init__(self, diffusion_model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.dtype = dtype

    def forward(
        self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], concat_images: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the network.

        Args:
            x: (b, t, c, h, w) or (b, c, h, w).
            t: (b,) timesteps.
            c: `crossattn` (b, l, d): context; `concat`: joined to x on channels; `vector` (b, d): passed as `y`.
            concat_images: like `concat`, but repeated where guidance has doubled the batch.
            kwargs: passed on as they are.
        Raises:
            ValueError: the batch of x is no multiple of that of concat_images.
        """
        cond = {name: value.to(self.dtype) for name, value in c.items()}
        joined = [x]
        if "concat" in cond:
            joined.append(cond["concat"].to(x.dtype))
        if concat_images is not None:
            joined.append(repeat_batch(concat_images, x.shape[0]).to(x.dtype))
        x = torch.cat(joined, dim=-3) if len(joined) > 1 else x
        extras = {"y": cond["vector"]} if "vector" in cond else {}
        return self.diffusion_model(x, timesteps=t, context=cond.get("crossattn"), **extras, **kwargs)


def repeat_batch(images: Tensor, batch: int) -> Tensor:
    """(b, ...) repeated along the batch to `batch`, [images; images; ...]."""
    times, rest = divmod(batch, images.shape[0])
    if rest or times == 0:
        raise ValueError(f"concat_images has a batch of {images.shape[0]}, which does not go into one of {batch}.")
    return images.repeat(times, *[1] * (images.ndim - 1))

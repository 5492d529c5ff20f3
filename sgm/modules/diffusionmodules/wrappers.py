"""The seam between denoiser and network: a dict of conditions becomes the network's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sgm.modules.ops.graphs import NetworkGraphs

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class NetworkWrapper(nn.Module, Generic[NetworkT]):
    """Holds a network; called as `wrapper(x, t, conditions, **extras)`, which is how denoisers and losses call it."""

    diffusion_model: NetworkT


class OpenAIWrapper(NetworkWrapper[NetworkT]):
    """Holds the network as `diffusion_model` and unpacks the conditions for it.

    Args:
        diffusion_model: called as `net(x, timesteps=t, context=..., **kwargs)`, with `y=` where a vector is given.
        dtype: type that the conditions are cast to, the network's own.
    """

    def __init__(self, diffusion_model: NetworkT, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.dtype = dtype
        self.graphs: NetworkGraphs | None = None  # runs the network in training, where it is set

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
        """Run the network.

        Args:
            x: (b, t, c, h, w) or (b, c, h, w).
            t: (b,) timesteps.
            c: `crossattn` (b, l, d): context; `concat`: joined to x on channels; `vector` (b, d): passed as `y`.
            kwargs: passed on as they are (`concat_images`, `ofs`).
        """
        cond = {name: value.to(self.dtype) for name, value in c.items()}
        if "concat" in cond:
            x = torch.cat([x, cond["concat"].to(x.dtype)], dim=-3)
        extras = {"y": cond["vector"]} if "vector" in cond else {}
        network = self.graphs or self.diffusion_model
        return network(x, timesteps=t, context=cond.get("crossattn"), **extras, **kwargs)

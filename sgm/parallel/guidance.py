"""Guidance in parallel: the unconditional branch by one process, the conditional one by another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.modules.diffusionmodules.sampling import DenoiserFn
from sgm.modules.diffusionmodules.shortcuts import DenoiserCall


class SharedBranches:
    """Process `branch` of two, which both have the whole of x and of the conditions."""

    def __init__(self, branch: int, group: dist.ProcessGroup):
        self.branch, self.group = branch, group

    def around(self, denoiser: DenoiserFn, samples: int) -> DenoiserFn:
        """`denoiser` of which each process computes its branch of a guided call (2b, unconditional half first).

        A call for one branch alone is computed by both.
        """

        def denoise(x: Tensor, signal: Tensor, conditions: Mapping[str, Any], **extras: Any) -> Tensor:
            if x.shape[0] != 2 * samples:
                return denoiser(x, signal, conditions, **extras)
            half = slice(self.branch * samples, (self.branch + 1) * samples)
            call = DenoiserCall(x, signal, conditions, extras).half(half)
            own = denoiser(call.x, call.signal, call.conditions, **call.extras).contiguous()
            both = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(both, own, group=self.group)
            return torch.cat(both)

        return denoise

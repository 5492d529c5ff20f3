"""Random numbers of sampling: one generator a sample, so that batching and ranks change nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleId:
    """What a sample's noise depends on."""

    seed: int
    prompt_index: int
    sample_index: int

    def generator(self) -> torch.Generator:
        """A CPU generator seeded from all three numbers (neighbouring seeds give unrelated streams)."""
        text = f"{self.seed},{self.prompt_index},{self.sample_index}".encode()
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
        return torch.Generator("cpu").manual_seed(number)


class StackedNoise:
    """Draws a batch whose k-th entry comes from the k-th sample's own generator (always on the CPU, in float32)."""

    def __init__(self, samples: Sequence[SampleId]):
        self.generators = [s.generator() for s in samples]

    def start(self, shape: Sequence[int]) -> Tensor:
        """The start (b, *shape)."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.generators])

    def like(self, x: Tensor) -> Tensor:
        """Replaces `torch.randn_like(x)` for x (b, ...)."""
        if x.shape[0] != len(self.generators):
            raise ValueError(f"noise for a batch of {x.shape[0]} was asked of {len(self.generators)} generators")
        return self.start(x.shape[1:]).to(device=x.device, dtype=x.dtype)

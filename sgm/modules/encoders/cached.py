"""A text encoder that looks its answers up: embeddings come with the batch, computed once and stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgm.modules.conditioner import AbstractEmbModel


class CachedTextEmbedder(AbstractEmbModel):
    """Stands for a frozen encoder whose embeddings lie in the batch; its input keys are the captions and those.

    The captions stay an input so that what is said of them (`force_zero_embeddings`) keeps its meaning. Caption dropout
    is the conditioner's, as for any embedder.
    """

    def __init__(self) -> None:
        super().__init__()
        # Says where the engine lives and in which type; real even when the engine is built on the meta device.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)

    def forward(self, texts: Sequence[str], embedding: Tensor) -> Tensor:
        """Embeddings (b, l, d) of b texts, on the module's device and in its type."""
        if len(texts) != len(embedding):
            raise ValueError(f"{len(texts)} captions with {len(embedding)} embeddings")
        # Converted there: the CPU would take longer, and what it makes is not page-locked.
        return embedding.to(self.place.device, non_blocking=True).to(self.place.dtype)

"""What a network knew before fine-tuning, as the target of clips that are there to keep it.

Where the target is the base's own prediction in place of the clip, a network that still agrees with its base gets no
gradient, not even a random one (learning without forgetting: Li and Hoiem 2016, arXiv:1606.09282; clips of what is
known beside those of the new: Ruiz et al. 2022, arXiv:2208.12242, section 4.2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.transformer.lora import lora_layers, set_lora_scale


class BaseNetwork:
    """The network as it is when this is made, called like it, without gradients.

    Where adapters alone learn it is the network with these switched off, else a copy.

    Args:
        model: takes (x, t, cond); what learns in it requires gradients.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.copied: nn.Module | None = None
        if needs_copy(model):
            self.copied = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
        if self.copied is not None:
            return self.copied(x, t, c, **kwargs)
        set_lora_scale(self._model, 0.0)
        try:
            return self._model(x, t, c, **kwargs)
        finally:
            set_lora_scale(self._model, 1.0)


def needs_copy(model: nn.Module) -> bool:
    """Whether more than adapters learns."""
    adapters = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    return any(p.requires_grad and id(p) not in adapters for p in model.parameters())

"""From the last block's tokens back to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.transformer.block import NetworkInputs
from sgm.modules.transformer.patch_embed import Patch, PatchSize, unpatchify
from sgm.modules.transformer.sat_base import BaseMixin
from sgm.typed import Size

FINAL_NORM_EPS = 1e-6


class FinalLayerMixin(BaseMixin):
    """Modulated norm and linear layer on the video tokens, then patches to pixels of the latent.

    The trunk's own `final_layernorm` comes before it: two norms in a row, with different eps.

    Args:
        hidden_size: model width d.
        time_embed_dim: width e of the time embedding.
        patch_size: p or [pt, ph, pw], see `PatchSize`.
    """

    def __init__(
        self,
        hidden_size: Size,
        time_embed_dim: Size,
        patch_size: Patch | Sequence[Patch],
        out_channels: Size,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.patch = PatchSize.parse(patch_size)
        self.norm_final = nn.LayerNorm(hidden_size, eps=FINAL_NORM_EPS, elementwise_affine=elementwise_affine)
        self.linear = nn.Linear(hidden_size, self.patch.volume * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 2 * hidden_size))

    def reinit(self, parent_model: nn.Module | None = None) -> None:
        """Xavier weights and zero bias for the output projection."""
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def final_forward(self, logits: Tensor, *, inputs: NetworkInputs, **_: Any) -> Tensor:
        """SAT hook: tokens (b, l + t*h*w, d) to latents (b, t, c, H, W)."""
        shift, scale = self.adaLN_modulation[-1](inputs.condition).unsqueeze(1).chunk(2, dim=-1)
        video = self.norm_final(logits[:, inputs.text_length :])
        return unpatchify(self.linear(torch.addcmul(shift, video, 1 + scale)), inputs.grid, self.patch)

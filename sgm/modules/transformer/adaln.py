"""Adaptive LayerNorm: the time embedding steers each layer's norms and gates, separately for text and video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sgm.distributed import model_parallel_world_size
from sgm.modules.children import ModuleList
from sgm.modules.ops.block_ops import PLAIN, BlockOps
from sgm.modules.ops.modulation import split_modulation
from sgm.modules.transformer.block import Attend, NetworkInputs, dit_block
from sgm.modules.transformer.sat_base import HOOKS_DEFAULT, BaseMixin, copy_to_model_parallel_region
from sgm.typed import Layers, Size

HEAD_NORM_EPS = 1e-6


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the channels of a head, with one weight for all heads.

    Under tensor parallelism each process sees its own heads only, so the weights' gradients are summed over processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or model_parallel_world_size() == 1:
            return super().forward(x)
        weight, bias = copy_to_model_parallel_region(self.weight), copy_to_model_parallel_region(self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class AdaLNMixin(BaseMixin):
    """Modulation layers, q/k norms, and the hook that runs a layer.

    Args:
        hidden_size: model width d.
        num_layers: number of blocks.
        time_embed_dim: width e of the time embedding; every layer maps e -> 12 d.
        hidden_size_head: width of an attention head.
        qk_ln: normalise q and k per head before the product (Dehghani et al. 2023, arXiv:2302.05442, 2.1).
        elementwise_affine: whether those norms have weights.
    """

    ops: BlockOps = PLAIN  # implementation of the blocks' operations

    def __init__(
        self,
        hidden_size: Size,
        num_layers: Layers,
        time_embed_dim: Size,
        hidden_size_head: Size | None = None,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        if qk_ln and hidden_size_head is None:
            raise ValueError("qk_ln needs hidden_size_head, the width of one attention head.")
        self.qk_ln = qk_ln
        self.adaLN_modulations: ModuleList[nn.Sequential] = ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        if qk_ln:
            norm = partial(HeadNorm, hidden_size_head, eps=HEAD_NORM_EPS, elementwise_affine=elementwise_affine)
            self.query_layernorm_list = nn.ModuleList(norm() for _ in range(num_layers))
            self.key_layernorm_list = nn.ModuleList(norm() for _ in range(num_layers))

    def reinit(self, parent_model: nn.Module | None = None) -> None:
        """Zero modulation: every block starts as the identity (adaLN-Zero)."""
        for modulation in self.adaLN_modulations:
            for parameter in modulation.parameters():
                nn.init.zeros_(parameter)

    def layer_forward(
        self, hidden_states: Tensor, mask: Tensor | None, *, layer_id: int, inputs: NetworkInputs, **_: Any
    ) -> Tensor:
        """SAT hook: one block, (b, n, d) -> (b, n, d)."""
        # The SiLU in front is the same for all layers and was applied once, in `inputs.condition`.
        modulation = split_modulation(self.adaLN_modulations[layer_id][-1](inputs.condition))
        return dit_block(
            hidden_states,
            self.transformer.layers[layer_id],
            self.query_layernorm_list[layer_id] if self.qk_ln else None,
            self.key_layernorm_list[layer_id] if self.qk_ln else None,
            modulation,
            inputs.rotary,
            inputs.text_length,
            self._attention_hook(hidden_states, layer_id, inputs),
            self.ops,
        )

    def layer_parts(self, layer_id: int) -> list[nn.Module]:
        """The modules of this mixin that layer `layer_id` alone uses."""
        parts: list[nn.Module] = [self.adaLN_modulations[layer_id]]
        if self.qk_ln:
            parts += [self.query_layernorm_list[layer_id], self.key_layernorm_list[layer_id]]
        return parts

    def _attention_hook(self, hidden: Tensor, layer_id: int, inputs: NetworkInputs) -> Attend | None:
        """What a further mixin puts around attention or in its place (SAT's `attention_fn`), else None."""
        hook = self.transformer.hooks.get("attention_fn")
        if hook is None or hook is HOOKS_DEFAULT["attention_fn"]:
            return None
        full = hidden.new_ones(1, 1)  # SAT's mark for attention without a mask
        return lambda query, key, value: hook(query, key, value, full, None, layer_id=layer_id, inputs=inputs)

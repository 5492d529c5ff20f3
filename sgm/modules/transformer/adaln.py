"""Adaptive LayerNorm: the time embedding steers each layer's norms and gates, separately for text and video, and the
last norm on the way from tokens back to latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.distributed import model_parallel_world_size
from sgm.modules.children import ModuleList
from sgm.modules.ops.block_ops import PLAIN, BlockOps, head_norm_rotate, split_modulation
from sgm.modules.transformer.block import NetworkInputs, dit_block, feed_forward, joint_attention
from sgm.modules.transformer.hooks import HookError
from sgm.modules.transformer.patch_embed import Patch, PatchSize, unpatchify
from sgm.modules.transformer.sat_base import (
    HOOKS_DEFAULT,
    BaseMixin,
    copy_to_model_parallel_region,
    non_conflict,
    replacable,
)
from sgm.typed import Layers, Size

HEAD_NORM_EPS = 1e-6


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the channels of a head, with one weight for all heads.

    Under tensor parallelism each process sees its own heads only, so the weights' gradients are summed over processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.elementwise_affine:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if model_parallel_world_size() > 1:
            weight, bias = copy_to_model_parallel_region(weight), copy_to_model_parallel_region(bias)
        if self.weight.requires_grad and x.device.type == "cpu" and x.dtype.itemsize == 2:
            # PyTorch sums their gradients in x's type there, and in bfloat16 256 + 1 is 256
            y = F.layer_norm(x.float(), self.normalized_shape, weight.float(), bias.float(), self.eps)
            return y.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class AdaLNMixin(BaseMixin):
    """Modulation layers, q/k norms, and the hook that runs a layer.

    Args:
        hidden_size: model width d.
        time_embed_dim: width e of the time embedding; every layer maps e -> 12 d.
        qk_ln: normalise q and k per head before the product (Dehghani et al. 2023, arXiv:2302.05442, 2.1).
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
        self, hidden_states: Tensor, mask: Tensor | None, *, layer_id: int, inputs: NetworkInputs, **kwargs: Any
    ) -> Tensor:
        """SAT hook: one block, (b, n, d) -> (b, n, d)."""
        hooks = self.transformer.hooks
        is_own = hooks["attention_fn"] == self.attention_fn and hooks["attention_forward"] == self.attention_forward
        handed = {"layer_id": layer_id, "inputs": inputs, **kwargs}
        # The SiLU in front is the same for all layers and was applied once, in `inputs.condition`.
        modulation = split_modulation(self.adaLN_modulations[layer_id][-1](inputs.condition))
        return dit_block(
            hidden_states,
            self.transformer.layers[layer_id],
            *self.head_norms(layer_id),
            modulation,
            inputs.rotary,
            inputs.text_length,
            self.ops,
            attention=None if is_own else lambda x: hooks["attention_forward"](x, mask, **handed),
            mlp=None if hooks["mlp_forward"] == self.mlp_forward else lambda x: hooks["mlp_forward"](x, **handed),
        )

    @replacable
    def attention_forward(
        self, hidden_states: Tensor, mask: Tensor | None, *, layer_id: int, inputs: NetworkInputs, **kwargs: Any
    ) -> Tensor:
        """SAT hook: attention of a block, (b, n, d) -> (b, n, d), by way of `attention_fn` where a mixin has one."""
        module, hook = self.transformer.layers[layer_id].attention, self.transformer.hooks["attention_fn"]
        if hook == self.attention_fn:
            norms = self.head_norms(layer_id)
            return joint_attention(hidden_states, module, *norms, inputs.rotary, inputs.text_length, self.ops)
        dropout = module.attention_dropout if module.training else None

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return hook(query, key, value, mask, dropout, layer_id=layer_id, inputs=inputs, **kwargs)

        ops = self.ops._replace(attention=attend)
        return joint_attention(hidden_states, module, None, None, None, inputs.text_length, ops)

    @non_conflict
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        dropout: nn.Module | None = None,
        *,
        layer_id: int | None = None,
        inputs: NetworkInputs | None = None,
        old_impl: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """SAT hook: q/k norm, rotation and attention; (b, h, n, hd) as they come from the linear, result likewise.

        Keys may be more than the sequence's tokens: those behind them have no position and are not rotated.
        `old_impl` takes the place of the attention product.
        """
        if layer_id is None or inputs is None:
            raise HookError("attention_fn was called without layer_id: a mixin's attention_forward must hand it on.")
        query_norm, key_norm = self.head_norms(layer_id)
        query, key = _norm_rotate(query, query_norm, inputs), _norm_rotate(key, key_norm, inputs)
        if old_impl is not None:
            return old_impl(query, key, value, mask, dropout, layer_id=layer_id, inputs=inputs, **kwargs)
        if mask.numel() == 1 and "scaling_attention_score" not in kwargs:  # SAT's mark for all tokens
            return self.ops.attention(query, key, value)
        return HOOKS_DEFAULT["attention_fn"](query, key, value, mask, dropout, **kwargs)

    @replacable
    def mlp_forward(self, hidden_states: Tensor, *, layer_id: int, **_: Any) -> Tensor:
        """SAT hook: the MLP of a block, (b, n, d) -> (b, n, d)."""
        return feed_forward(hidden_states, self.transformer.layers[layer_id].mlp, self.ops)

    def layer_parts(self, layer_id: int) -> list[nn.Module]:
        """The modules of this mixin that layer `layer_id` alone uses."""
        return [self.adaLN_modulations[layer_id], *(norm for norm in self.head_norms(layer_id) if norm is not None)]

    def head_norms(self, layer_id: int) -> tuple[nn.Module | None, nn.Module | None]:
        """Of queries and of keys."""
        if not self.qk_ln:
            return None, None
        return self.query_layernorm_list[layer_id], self.key_layernorm_list[layer_id]


def _norm_rotate(x: Tensor, norm: nn.Module | None, inputs: NetworkInputs) -> Tensor:
    """`head_norm_rotate` of (b, h, n, hd), whose tokens behind the sequence's are not rotated."""
    x = x.transpose(1, 2)
    own = inputs.text_length + inputs.grid.tokens
    parts = [head_norm_rotate(x[:, :own], norm, inputs.rotary, inputs.text_length)]
    if x.shape[1] > own:
        parts.append(head_norm_rotate(x[:, own:], norm, None, 0))
    return torch.cat(parts, dim=1).transpose(1, 2)


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

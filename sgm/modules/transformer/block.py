"""The transformer trunk: what one forward carries, one block's mathematics, and SAT's layers around it.

Axes: b batch, l text tokens, n all tokens (text first), d width, h heads, hd width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sgm.modules.ops.block_ops import PLAIN, BlockModulation, BlockOps, RotaryTable
from sgm.modules.ops.recompute import ActivationOffload, run_layer
from sgm.modules.transformer.sat_base import (
    MLP,
    BaseTransformer,
    BaseTransformerLayer,
    SelfAttention,
    scaled_init_method,
    unscaled_init_method,
)

Sublayer = Callable[[Tensor], Tensor]  # normalised tokens (b, n, d) -> (b, n, d)
INIT_STD = 0.02
BLOCK_NORM_EPS = 1e-5  # the original configures 1e-6, but SAT hands its own default to every norm of the trunk


class TokenGrid(NamedTuple):
    """Video tokens along time, height and width, after patching."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w


@dataclass
class NetworkInputs:
    """What every mixin may need of one forward.

    `video` (b, t, c, H, W) latents; `context` (b, l, text width); `embedded` (b, e): the time embedding; `condition`
    (b, e): its SiLU, which is the form all modulation layers take; `text_length`: so many of the tokens that layers see
    are text; `rotary`: the table for this grid, where the model rotates.
    """

    video: Tensor
    context: Tensor
    embedded: Tensor
    condition: Tensor
    grid: TokenGrid
    text_length: int
    rotary: RotaryTable | None = None

    def by_original_names(self) -> dict[str, Any]:
        """What mixins that were written for the original find among their keyword arguments."""
        return {
            "images": self.video, "emb": self.embedded, "encoder_outputs": self.context,
            "text_length": self.text_length, "seq_length": self.grid.tokens,
            "rope_T": self.grid.t, "rope_H": self.grid.h, "rope_W": self.grid.w,
        }  # fmt: skip


class TokenShare(Protocol):
    """The tokens of a forward that are computed here, where several processes share them."""

    def own(self, hidden: Tensor, inputs: NetworkInputs) -> tuple[Tensor, NetworkInputs]: ...
    def whole(self, hidden: Tensor) -> Tensor: ...


def dit_block(
    hidden: Tensor,
    layer: BaseTransformerLayer,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    modulation: BlockModulation,
    rotary: RotaryTable | None,
    text_length: int,
    ops: BlockOps = PLAIN,
    attention: Sublayer | None = None,
    mlp: Sublayer | None = None,
) -> Tensor:
    """One block on the joint sequence: modulated attention, then modulated MLP, each behind a gate; (b, n, d).

    (Peebles and Xie 2023, arXiv:2212.09748, adaLN-Zero block, with separate modulations for text and video.)
    `layer` supplies norms and linears; what stands in a linear's place (an adapter, a quantised linear, sharded
    weights) is called as a module. `attention` and `mlp` take the places of `joint_attention` and `feed_forward`.
    """
    text, video = modulation.text_attention, modulation.video_attention
    x = ops.norm_modulate(hidden, layer.input_layernorm, text, video, text_length)
    if attention is None:
        x = joint_attention(x, layer.attention, query_norm, key_norm, rotary, text_length, ops)
    else:
        x = attention(x)
    gates, norm = (text.gate, video.gate), layer.post_attention_layernorm

    text, video = modulation.text_mlp, modulation.video_mlp
    hidden, x = ops.residual_norm(hidden, x, *gates, norm, text, video, text_length)
    x = feed_forward(x, layer.mlp, ops) if mlp is None else mlp(x)
    return ops.gated_residual(hidden, x, text.gate, video.gate, text_length)


def joint_attention(
    x: Tensor,
    module: SelfAttention,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    rotary: RotaryTable | None,
    text_length: int,
    ops: BlockOps = PLAIN,
) -> Tensor:
    """Self-attention of text and video together, (b, n, d) -> (b, n, d), with SAT's `query_key_value` and `dense`.

    The rows of `query_key_value` are the thirds q, k, v, each with its heads one after the other.
    """
    head_width = module.hidden_size_per_attention_head
    qkv = ops.linear(module.query_key_value, x)
    heads = ops.split_heads(qkv, head_width, query_norm, key_norm, rotary, text_length)
    mixed = ops.attention(*(part.transpose(1, 2) for part in heads))  # (b, h, n, hd)
    return ops.linear(module.dense, mixed.transpose(1, 2).flatten(2))


def feed_forward(x: Tensor, module: MLP, ops: BlockOps = PLAIN) -> Tensor:
    """Linear, GELU, linear on every token, (b, n, d) -> (b, n, d)."""
    return ops.linear(module.dense_4h_to_h, ops.linear_gelu(module.dense_h_to_4h, x))


class DiTLayer(BaseTransformerLayer):
    """SAT's layer, called as a module: hooks on it (streaming, profiling, sharding) see every forward."""

    def forward(self, hidden_states: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        return self.hooks["layer_forward"](hidden_states, mask, layer_id=self.layer_id, **kwargs)


class DiTTransformer(BaseTransformer):
    """SAT's transformer with the same parameters and hooks, and a forward of its own.

    Differences to SAT's forward: layers run through their `__call__`; activation checkpointing goes layer by layer
    with torch's non-reentrant form; the features handed to `final_forward` are not marked as the input of a split
    layer, since the final layer is whole on every process (SAT's mark makes all gradients of the trunk N times too
    large under N-fold tensor parallelism); `share`, where it is set, says which of the tokens the layers get, and
    `offload` keeps the inputs of checkpointed layers.
    """

    share: TokenShare | None = None
    offload: ActivationOffload | None = None

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        max_sequence_length: int,
        elementwise_affine: bool,
        checkpoint_activations: bool | str,
        parallel_output: bool,
        model_parallel_size: int,
        skip_init: bool,
        hooks: dict[str, Callable],
        params_dtype: torch.dtype,
    ):
        device = torch.get_default_device()
        norm = partial(nn.LayerNorm, elementwise_affine=elementwise_affine)
        # A bias that joins the product inside the GEMM saves a pass over the sequence; split over several processes it
        # has to come after the sum instead.
        common = dict(
            layernorm=norm,
            row_parallel_linear_final_bias=model_parallel_size > 1,
            params_dtype=params_dtype,
            skip_init=skip_init,
            device=device,
        )
        super().__init__(
            num_layers=0,  # the layers are made below, of our own class
            checkpoint_num_layers=0,
            vocab_size=1,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            max_sequence_length=max_sequence_length,
            layernorm_epsilon=BLOCK_NORM_EPS,
            parallel_output=parallel_output,
            init_method=unscaled_init_method(INIT_STD),
            hooks=hooks,
            **common,
        )
        del self.word_embeddings  # text comes embedded
        self.checkpoint_num_layers = 1
        self.checkpoint_activations = checkpoint_activations
        self.layers.extend(
            DiTLayer(
                hidden_size,
                num_attention_heads,
                attention_dropout_prob=0.0,
                output_dropout_prob=0.0,
                layernorm_epsilon=BLOCK_NORM_EPS,
                init_method=self.init_method,
                layer_id=layer_id,
                output_layer_init_method=scaled_init_method(INIT_STD, num_layers),
                hooks=self.hooks,
                transformer_pointer=self,
                **common,
            )
            for layer_id in range(num_layers)
        )

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """[result of `final_forward`, then one dict a layer (`hidden_states` in it if asked for)], as in SAT.

        Hooks get `kwargs`, and layers' also `output_this_layer`, that dict, and `output_cross_layer`, whose entries are
        keyword arguments of the next layer.
        """
        carried: dict[str, Any] = {}  # what a hook hands on to the next layer's
        hidden = self.hooks["word_embedding_forward"](input_ids, output_cross_layer=carried, **kwargs)
        positions = self.hooks["position_embedding_forward"](position_ids, output_cross_layer=carried, **kwargs)
        if positions is not None:
            hidden = hidden + positions
        layer_inputs = kwargs
        if self.share is not None:
            hidden, inputs = self.share.own(hidden, kwargs["inputs"])
            layer_inputs = kwargs | {"inputs": inputs}
        per_layer: list[dict[str, Any]] = []
        recording = self.training and torch.is_grad_enabled()
        mode = self.checkpoint_activations if recording else False
        for layer in self.layers:
            outputs: dict[str, Any] = {"output_this_layer": {}, "output_cross_layer": {}}
            handed = {**layer_inputs, "position_ids": position_ids, **carried, **outputs}
            with self.offload.keeping() if self.offload and recording else nullcontext():
                hidden = run_layer(mode, layer, hidden, attention_mask, **handed)
            carried = outputs["output_cross_layer"]
            per_layer.append(outputs["output_this_layer"] | ({"hidden_states": hidden} if output_hidden_states else {}))
        if self.share is not None:
            hidden = self.share.whole(hidden)
        features = self.final_layernorm(hidden)
        return [self.hooks["final_forward"](features, parallel_output=self.parallel_output, **kwargs), *per_layer]

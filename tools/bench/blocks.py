"""The operations of one transformer block, each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.ops.block_ops import AttentionError, BlockOps, split_modulation
from sgm.modules.ops.choice import ATTENTIONS, attention_by
from tools.bench.measure import Ceilings, emit, relative_error, time_runs
from tools.bench.models import Clip, token_count

SECONDS = 0.1  # for each operation
Runs = dict[str, tuple[Callable[[BlockOps], Any], float, float]]


def bench_parts(
    network: nn.Module, clip: Clip, device: torch.device, ceilings: Ceilings, ops: tuple[BlockOps, BlockOps]
) -> None:
    """A line for each operation of layer 0 with its plain and its fused time, error and limit."""
    plain, fused = ops
    for name, (run, flops, moved) in _element_wise(network, clip, device).items():
        with torch.no_grad():
            expected = run(plain)  # first: the fused form may overwrite its input
            error = _error(run(fused), expected)
        times = [time_runs(lambda r=run, o=o: r(o), device, SECONDS, least=5).ms for o in ops]
        emit(
            part="block",
            operation=name,
            plain_ms=times[0],
            fused_ms=times[1],
            limit_ms=ceilings.limit_ms(flops, moved),
            error_to_plain=error,
        )
    _bench_attention(network, clip, device, ceilings)


def _element_wise(network: nn.Module, clip: Clip, device: torch.device) -> Runs:
    """Name -> (run, FLOPs, bytes that have to move) of everything but attention."""
    layer, adaln = network.transformer.layers[0], network.mixins.adaln_layer
    d, length, n = network.hidden_size, network.mixins.pos_embed.text_length, token_count(network, clip)
    width = layer.attention.hidden_size_per_attention_head
    hidden, update = (torch.randn(2, n, d, device=device, dtype=network.dtype) for _ in range(2))
    qkv = torch.randn(2, n, 3 * d, device=device, dtype=network.dtype)
    wide = torch.randn(2, n, 4 * d, device=device, dtype=network.dtype)
    raw = torch.randn(2, 12 * d, device=device, dtype=network.dtype)
    video, _, text, _ = split_modulation(raw)
    norm, mlp, attention = layer.input_layernorm, layer.mlp, layer.attention
    heads = (width, adaln.query_layernorm_list[0], adaln.key_layernorm_list[0], None, length)
    gates = (text.gate, video.gate)
    one, product = hidden.nbytes, 2.0 * 2 * n * d * d
    return {
        "norm_modulate": (lambda o: o.norm_modulate(hidden, norm, text, video, length), 0.0, 2.0 * one),
        "qkv": (lambda o: attention.query_key_value(hidden), 3 * product, 4.0 * one),
        # the fused form overwrites its input, which does not change its time
        "split_heads": (lambda o: o.split_heads(qkv, *heads), 0.0, 4.0 * one),
        "dense": (lambda o: attention.dense(hidden), product, 2.0 * one),
        "residual_norm": (lambda o: o.residual_norm(hidden, update, *gates, norm, text, video, length), 0.0, 4.0 * one),
        "mlp_up_gelu": (lambda o: o.linear_gelu(mlp.dense_h_to_4h, hidden), 4 * product, 5.0 * one),
        "mlp_down": (lambda o: mlp.dense_4h_to_h(wide), 4 * product, 5.0 * one),
        "gated_residual": (lambda o: o.gated_residual(hidden, update, *gates, length), 0.0, 3.0 * one),
    }


def _bench_attention(network: nn.Module, clip: Clip, device: torch.device, ceilings: Ceilings) -> None:
    """Each implementation of attention on views of one qkv buffer, as the block hands them over."""
    width = network.transformer.layers[0].attention.hidden_size_per_attention_head
    n = token_count(network, clip)
    qkv = torch.randn(2, n, 3 * network.hidden_size, device=device, dtype=network.dtype)
    heads = [part.transpose(1, 2) for part in qkv.unflatten(-1, (3, -1, width)).unbind(2)]
    flops = 4.0 * 2 * n * n * network.hidden_size
    limit = ceilings.limit_ms(flops)
    expected: Tensor | None = None
    for name in ATTENTIONS:
        try:
            attend = attention_by(name, device)
        except AttentionError as error:
            emit(part="block", operation=f"attention_{name}", skipped=str(error))
            continue
        timing = time_runs(lambda a=attend: a(*heads), device, SECONDS, least=5)
        expected = timing.result if expected is None else expected
        emit(
            part="block",
            operation=f"attention_{name}",
            ms=timing.ms,
            tflops=flops / timing.ms / 1e9,
            limit_ms=limit,
            error_to_default=relative_error(timing.result, expected),
        )


def _error(got: Any, expected: Any) -> float:
    """The largest relative error over the tensors of a result."""
    if isinstance(got, Tensor):
        return relative_error(got, expected)
    return max(relative_error(a, b) for a, b in zip(got, expected))

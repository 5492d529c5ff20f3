"""Names and shapes of a T5 encoder's tensors (transformers' `T5EncoderModel`), from its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sgm.convert.lazy import ConvertError, Deferred, demand_shapes

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
_COUNTS = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "vocab_size")
DECODER = ("decoder.", "lm_head.")  # the other half of a full T5 checkpoint


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder and its shape; the embedding under one of its two names.

    Raises:
        ConvertError: a field is missing, so it is no T5 configuration.
    """
    wrong = [n for n in _COUNTS if n in config and not (isinstance(config[n], int) and 0 < config[n] < 1 << 24)]
    if wrong:
        raise ConvertError(f"the text encoder's config.json is damaged: {', '.join(wrong)}.")
    try:
        d, inner, wide = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
        layers, vocabulary, heads = config["num_layers"], config["vocab_size"], config["num_heads"]
    except KeyError as error:
        raise ConvertError(f"the text encoder's config.json has no {error}; it is not that of a T5.") from error
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    shapes: dict[str, tuple[int, ...]] = {SHARED: (vocabulary, d), "encoder.final_layer_norm.weight": (d,)}
    for k in range(layers):
        attention, feed = f"encoder.block.{k}.layer.0", f"encoder.block.{k}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{n}.weight": (inner, d) for n in "qkv"}
        shapes |= {f"{attention}.SelfAttention.o.weight": (d, inner)}
        shapes |= {f"{feed}.DenseReluDense.{n}.weight": (wide, d) for n in (("wi_0", "wi_1") if gated else ("wi",))}
        shapes |= {f"{feed}.DenseReluDense.wo.weight": (d, wide)}
        shapes |= {f"{part}.layer_norm.weight": (d,) for part in (attention, feed)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {**shapes, bias: (config.get("relative_attention_num_buckets", 32), heads)}


def encoder_plan(
    state: Mapping[str, Deferred], config: Mapping[str, Any], source: str
) -> tuple[dict[str, Deferred], int]:
    """(the encoder's tensors, number of decoder tensors left out) of a T5 checkpoint.

    Raises:
        ConvertError: missing, misshapen or foreign tensors, or two different embeddings.
    """
    kept = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    left_out = len(state) - len(kept)
    tied = kept.pop(TIED, None)
    if tied is not None and not torch.equal(kept.setdefault(SHARED, tied).make(), tied.make()):
        raise ConvertError(f"{source}: {SHARED} and {TIED} differ, but T5 has one embedding; the file is damaged.")
    wanted = t5_shapes(config)
    demand_shapes(kept, wanted, source, "the T5 encoder of its config.json")
    return {name: kept[name] for name in wanted}, left_out

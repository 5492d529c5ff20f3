"""The encoder of T5 (Raffel et al. 2020, arXiv 1910.10683), versions 1.0 and 1.1.

Names of tensors and numbers are those of transformers' `T5EncoderModel`, to the bit; ours, because transformers takes
longer to import than torch. Shape letters: b batch, l tokens, d width, h heads.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from sgm.typed import ConfigError, Range, build_args, listing, option
from sgm.weights import WeightsError
from sgm.weights.assign import without_values
from sgm.weights.checksums import read_json

_SIZE = {"rules": [Range(1)]}


@dataclass(frozen=True)
class T5Config:
    """Sizes by their names in config.json; the defaults are that format's."""

    vocab_size: int = field(metadata=_SIZE)
    d_model: int = field(metadata=_SIZE)
    d_kv: int = field(metadata=_SIZE)
    d_ff: int = field(metadata=_SIZE)
    num_layers: int = field(metadata=_SIZE)
    num_heads: int = field(metadata=_SIZE)
    feed_forward_proj: str = option("relu", "T5 1.0 has relu, 1.1 gated-gelu", choices=("relu", "gated-gelu"))
    relative_attention_num_buckets: int = option(32, "kinds of distance", at_least=4)
    relative_attention_max_distance: int = option(128, "tokens from which all distances are of one kind")
    layer_norm_epsilon: float = option(1e-6, "added to the mean square", at_least=0)
    dropout_rate: float = option(0.1, "in training", at_least=0)

    def __post_init__(self) -> None:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ConfigError("relative_attention_max_distance must exceed relative_attention_num_buckets / 4")

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"


def read_config(path: Path) -> T5Config:
    """The sizes that a config.json gives; what else it holds has no effect.

    Raises:
        WeightsError: no JSON, or fields are missing or wrong; all of them are listed.
    """
    content = read_json(path)
    given = {f.name: content[f.name] for f in fields(T5Config) if f.name in content}
    problems = [f"{f.name} is missing" for f in fields(T5Config) if f.default is MISSING and f.name not in given]
    config = None if problems else build_args(T5Config, given, problems, [], section=path.stem)
    if config is None:
        raise WeightsError(listing(problems, f"the T5 configuration {path}"))
    return config


SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # one tensor, of which files hold either or both
DECODER = ("decoder.", "lm_head.")  # the other half of a full T5 checkpoint


def relative_buckets(length: int, buckets: int, farthest: int, device: torch.device) -> Tensor:
    """Kind of distance from every query (row) to every key (column): int64 (l, l) in [0, buckets).

    The first half of the buckets is for keys at or before the query, the second for keys after it. Half of each is for
    single distances, the rest for ever longer ranges of them up to `farthest`.
    """
    half, near = buckets // 2, buckets // 4
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    share = torch.log(distance.clamp(min=1).float() / near) / math.log(farthest / near)
    far = (near + (share * (half - near)).long()).clamp(max=half - 1)
    return (offset > 0).long() * half + torch.where(distance < near, distance, far)


def gelu(x: Tensor) -> Tensor:
    """The tanh form, operation by operation: torch's fused one rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def without_inf(x: Tensor) -> Tensor:
    """float16 alone has inf replaced, by its largest number less 1000."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), largest - 1000, largest)
    return x.clamp(min=-limit, max=limit)


# --- layers; attributes bear the names that weight files use ----------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.epsilon)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Attention whose scores are not scaled. The first layer has the table of biases by distance for all of them."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """(1, h, l, l)."""
        table, farthest = self.relative_attention_bias, self.config.relative_attention_max_distance
        bias = table(relative_buckets(length, table.num_embeddings, farthest, table.weight.device))
        return bias.permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.config.d_kv)).transpose(1, 2) for part in (self.q, self.k, self.v))
        rate = self.config.dropout_rate if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=1.0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, first)
        self.layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if bias is None:
            bias = self.SelfAttention.position_bias(x.shape[1])
        return x + self.dropout(self.SelfAttention(self.layer_norm(x), bias)), bias


class FeedForward(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.gated
        if config.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        inner = gelu(self.wi_0(x)) * self.wi_1(x) if self.gated else relu(self.wi(x))
        return self.wo(self.dropout(inner))


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class Block(nn.Module):
    """x (b, l, d) and the bias of attention (1, h, l, l), which the first block makes, to the same two."""

    def __init__(self, config: T5Config, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, first), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        x, bias = attention(x, bias)
        return without_inf(feed_forward(without_inf(x))), bias


class Stack(nn.Module):
    def __init__(self, config: T5Config, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.block = nn.ModuleList(Block(config, first=k == 0) for k in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = self.dropout(self.embed_tokens(ids)), None
        for block in self.block:
            x, bias = block(x, bias)
        return self.dropout(self.final_layer_norm(x))


class T5Encoder(nn.Module):
    """Token ids int64 (b, l) to embeddings (b, l, d) of the weights' type. Every token attends to every other.

    The embedding's table goes by two names, as in weight files: `shared` and `encoder.embed_tokens`.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        with without_values():
            self.shared = nn.Embedding(config.vocab_size, config.d_model)
            self.encoder = Stack(config, self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)

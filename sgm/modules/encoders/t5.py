"""T5's encoder (Raffel et al. 2020, arXiv 1910.10683), the first version and the gated one, v1.1 (arXiv 2002.05202).

Names and values are those of `T5EncoderModel` in transformers, to the bit. That one takes 1.5 s to import, since all of
the library's models come with PyTorch's compiler and distributed tensors.

Shape letters: b batch, l tokens, h heads, c channels of a head, d width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.encoders.t5_files import EncoderFilesError


def gelu_new(x: Tensor) -> Tensor:
    """The GELU's approximation by tanh, in the steps (and with the roundings) of BERT's first code."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gated-gelu": gelu_new}


@dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder, with the names and defaults of its `config.json`."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def read(cls, path: Path) -> T5Config:
        """Raises EncoderFilesError: not JSON, not a T5's, or damaged."""
        names = {field.name for field in fields(cls)}
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            config = cls(**{name: value for name, value in given.items() if name in names})
        except (ValueError, AttributeError) as error:
            raise EncoderFilesError(f"{path} cannot be read ({error}); copy or download it again.") from error
        wrong = [f"{name} {value!r}" for name, value in vars(config).items() if not _is_valid(name, value)]
        if wrong:
            raise EncoderFilesError(
                f"{path} is not the configuration of a T5 encoder: {', '.join(wrong)} "
                f"(sizes are positive numbers, feed_forward_proj is one of {', '.join(ACTIVATIONS)})."
            )
        return config


def _is_valid(name: str, value: object) -> bool:
    if name == "feed_forward_proj":
        return value in ACTIVATIONS
    if name in ("dropout_rate", "layer_norm_epsilon"):
        return isinstance(value, int | float) and 0 <= value < 1
    return isinstance(value, int) and value > 0


class T5EncoderModel(nn.Module):
    """Token ids (b, l) to embeddings (b, l, d), all tokens attending to all."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)
        self.encoder.embed_tokens.weight = self.shared.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids)


class T5Stack(nn.Module):
    """Embedding, blocks, final norm. The blocks share the position bias of the first."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList(T5Block(config, has_bias=k == 0) for k in range(config.num_layers))
        self.final_layer_norm = T5LayerNorm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.dropout(self.embed_tokens(input_ids), self.dropout_rate, self.training)
        bias: Tensor | None = None
        for block in self.block:
            x, bias = block(x, bias)
        return F.dropout(self.final_layer_norm(x), self.dropout_rate, self.training)


class T5Block(nn.Module):
    """Attention, then the feed-forward part: (b, l, d) and the bias (1, h, l, l), both handed on."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, has_bias), T5LayerFF(config)])

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        x, bias = attention(x, bias)
        return _clamp_half(feed_forward(_clamp_half(x))), bias


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.SelfAttention = T5Attention(config, has_bias)
        self.layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, bias = self.SelfAttention(self.layer_norm(x), bias)
        return x + F.dropout(mixed, self.dropout_rate, self.training), bias


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.DenseReluDense = T5Dense(config)
        self.layer_norm = T5LayerNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.DenseReluDense(self.layer_norm(x)), self.dropout_rate, self.training)


class T5Dense(nn.Module):
    """The feed-forward part, gated (a second product, not activated, times the first) or not."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.act = ACTIVATIONS[config.feed_forward_proj]
        self.gated = config.feed_forward_proj.startswith("gated-")
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x))
        return self.wo(F.dropout(x, self.dropout_rate, self.training))


class T5Attention(nn.Module):
    """Attention without scale; what a token's distance adds to the scores is learned, once for all blocks."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.d_kv, self.dropout_rate = config.d_kv, config.dropout_rate
        self.buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(self.buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (linear(x).unflatten(-1, (-1, self.d_kv)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        bias = self._position_bias(x.shape[1], x.device) if bias is None else bias
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)  # (b, h, l, c)
        return self.o(mixed.transpose(1, 2).flatten(2)), bias

    def _position_bias(self, length: int, device: torch.device) -> Tensor:
        """(1, h, l, l), added to the scores."""
        place = torch.arange(length, device=device)
        buckets = distance_buckets(place - place[:, None], self.buckets, self.max_distance)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None].contiguous()


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Number of the bucket of each distance (int64), 0 to `buckets` - 1: half of them for tokens that come later.

    Of either half one half holds a single distance each, the rest grow logarithmically up to `max_distance`.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.float() / exact) / math.log(max_distance / exact)
    grown = (exact + (ratio * (half - exact)).to(torch.long)).clamp(max=half - 1)
    return (distance > 0).to(torch.long) * half + torch.where(far < exact, far, grown)


class T5LayerNorm(nn.Module):
    """RMS norm, its mean square in float32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


def _clamp_half(x: Tensor) -> Tensor:
    """float16 is kept inside its range, and off its edge where a value has left it."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), most - 1000, most)
    return torch.clamp(x, min=-limit, max=limit)

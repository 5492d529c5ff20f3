"""Element-wise parts of a transformer block: norm with modulation, gated residual, q/k norm with rotation.

Text and video tokens share one sequence (b, n, d) whose first `text_length` tokens are text, and one set of norms;
only shift, scale and gate differ between the two ("expert adaptive LayerNorm", CogVideoX, arXiv:2408.06072, 2.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """What the time embedding does to one sublayer for one kind of token; each (b, 1, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class BlockModulation(NamedTuple):
    """The four modulations of a block."""

    video_attention: Modulation
    video_mlp: Modulation
    text_attention: Modulation
    text_mlp: Modulation


class RotaryTable(NamedTuple):
    """Rotation of each video token and channel; each (n - text_length, hd)."""

    cos: Tensor
    sin: Tensor


def split_modulation(raw: Tensor) -> BlockModulation:
    """Cut a layer's modulation (b, 12 d): shift, scale, gate for attention and MLP of the video, then of the text."""
    parts = raw.unsqueeze(1).chunk(12, dim=-1)
    return BlockModulation(*(Modulation(*parts[i : i + 3]) for i in range(0, 12, 3)))


def norm_modulate(x: Tensor, norm: nn.Module, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    """norm(x) * (1 + scale) + shift, with the text's or the video's shift and scale; (b, n, d) -> (b, n, d)."""
    y = norm(x)
    y_text, y_video = _split(y, text_length)
    return _join((text.shift, y_text, 1 + text.scale), (video.shift, y_video, 1 + video.scale), y)


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    """hidden + gate * update, with the text's or the video's gate (b, 1, d); all else (b, n, d)."""
    text, video = zip(_split(hidden, text_length), _split(update, text_length), (text_gate, video_gate))
    return _join(text, video, hidden)


def head_norm_rotate(x: Tensor, norm: nn.Module | None, rotary: RotaryTable | None, text_length: int) -> Tensor:
    """LayerNorm over each head's channels, then rotation of the video tokens; (b, n, heads, hd) -> the same.

    Either step may be absent. The rotation comes after the norm and never touches text.
    """
    y = x if norm is None else norm(x)
    if rotary is None:
        return y
    return torch.cat((y[:, :text_length], rotate(y[:, text_length:], rotary)), dim=1)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotary embedding over adjacent channel pairs (2i, 2i+1); x (b, n, heads, hd), table (n, hd).

    (Su et al. 2021, arXiv:2104.09864, eq. 34.) A float32 table makes the arithmetic float32; the result has x's type.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    cos, sin = table.cos[:, None], table.sin[:, None]
    return (x * cos + turned * sin).to(x.dtype)


def _split(x: Tensor, text_length: int) -> tuple[Tensor, ...]:
    """Text and video of (b, n, d). The gradient of one split is one pass; two slices' are five."""
    return x.split((text_length, x.shape[1] - text_length), dim=1)


def _join(text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], like: Tensor) -> Tensor:
    """a + b * c of text and of video, one behind the other along the tokens, shaped as `like` (b, n, d).

    Without a graph to record both parts are written straight into the result, which saves a copy of the sequence.
    """
    if torch.is_grad_enabled():
        return torch.cat((torch.addcmul(*text), torch.addcmul(*video)), dim=1)
    out = torch.empty_like(like)
    text_length = text[1].shape[1]
    torch.addcmul(*text, out=out[:, :text_length])
    torch.addcmul(*video, out=out[:, text_length:])
    return out

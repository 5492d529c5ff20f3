"""The operations of a transformer block that may have more than one implementation, in the PyTorch that defines them.

`BlockOps` is the record of them all; `sgm.modules.ops.fused_block` gives the same results with fewer passes.

Text and video tokens share one sequence (b, n, d) whose first `text_length` tokens are text, and one set of norms;
only shift, scale and gate differ between the two ("expert adaptive LayerNorm", CogVideoX, arXiv:2408.06072, 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgm.distributed import model_parallel_world_size
from sgm.errors import SgmError


class AttentionError(SgmError):
    """An implementation of attention does not run here; the message says why."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v without a mask; all tensors (b, heads, n, hd), strided views welcome.

    Every token sees every other: the text's padding takes part as well, as in the original (Vaswani et al. 2017,
    eq. 1; CogVideoX, arXiv:2408.06072, section 2.2).
    """
    return F.scaled_dot_product_attention(query, key, value)


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


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x). A layer of SAT's that is whole and that nobody watches skips what only split ones need.

    That is two identities of the graph a layer, run in Python both ways, and a division of the bias by 1.
    """
    if _is_sat_linear(linear) and model_parallel_world_size() == 1 and not is_watched(linear):
        return F.linear(x, linear.weight, linear.bias)
    return linear(x)


def is_plain_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """torch's or SAT's linear layer itself (no adapter, no quantisation), with a bias, that nobody watches.

    SAT's has torch's weight and bias.
    """
    if type(linear) is _sat_linears()[0]:
        return not linear.gather_output and linear.bias is not None and not is_watched(linear)
    return type(linear) is nn.Linear and linear.bias is not None and not is_watched(linear)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks want to see the module's forward or its gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_sat_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    return type(linear) in _sat_linears()


@cache
def _sat_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    from sat.mpu import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear


Heads = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def residual_norm(
    hidden: Tensor,
    update: Tensor,
    text_gate: Tensor,
    video_gate: Tensor,
    norm: nn.Module,
    text: Modulation,
    video: Modulation,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `norm_modulate` of its result: the end of one sublayer and the start of the next."""
    hidden = gated_residual(hidden, update, text_gate, video_gate, text_length)
    return hidden, norm_modulate(hidden, norm, text, video, text_length)


def split_heads(
    qkv: Tensor,
    head_width: int,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> Heads:
    """Query, key and value (b, n, h, hd), the first two normalised and rotated, of (b, n, 3 h hd).

    The last axis of `qkv` is the thirds q, k, v, each with its heads one after the other. Without gradients the buffer
    may be overwritten: its caller has no further use of it.
    """
    query, key, value = qkv.unflatten(-1, (3, -1, head_width)).unbind(2)
    query = head_norm_rotate(query, query_norm, rotary, text_length)
    key = head_norm_rotate(key, key_norm, rotary, text_length)
    return query, key, value


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2) of linear(x)."""
    x = apply_linear(linear, x)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _GeluBySigmoid.apply(x)
    return F.gelu(x, approximate="tanh")


class _GeluBySigmoid(torch.autograd.Function):
    """The same as x sigmoid(2u), since (1 + tanh u) / 2 = sigmoid(2u): PyTorch's tanh is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # 2u = x (slope + 0.044715 slope x^2)
        gate = torch.addcmul(x.new_tensor(GELU_SLOPE), x, x, value=0.044715 * GELU_SLOPE)
        return gate.mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


class BlockOps(NamedTuple):
    """One implementation of each operation; signatures and results are those of the plain ones."""

    norm_modulate: Callable[..., Tensor] = norm_modulate
    residual_norm: Callable[..., tuple[Tensor, Tensor]] = residual_norm
    gated_residual: Callable[..., Tensor] = gated_residual
    split_heads: Callable[..., Heads] = split_heads
    linear: Callable[[nn.Module, Tensor], Tensor] = apply_linear
    linear_gelu: Callable[[nn.Module, Tensor], Tensor] = linear_gelu
    attention: Attention = attention


PLAIN = BlockOps()

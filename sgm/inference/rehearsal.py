"""Compiling the fused kernels ahead and side by side, not one after the other when each is first needed.

A block and a decoder go once through their own code with tensors that have no values: whatever kernel a real pass
launches is compiled then, in the background, for the types, sizes and strides that it is going to meet. A launch that
comes before its kernel is done waits for that one alone (Triton's asynchronous mode).
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.ops.block_ops import split_modulation
from sgm.modules.transformer.block import dit_block
from sgm.weights.assign import MetaRules, Rules

THREADS = 4  # a third of the work is Python, which the run itself needs, too
FRAMES = 5  # latent frames that show the decoder's first chunk and its later ones

Shape = tuple[int, int, int, int]  # latents of a sample: t, c, h, w


def compile_ahead(rehearsal: Callable[[], None]) -> None:
    """Compile what `rehearsal` launches for tensors without values; returns when it is known, not when it is done."""
    from triton import AsyncCompileMode

    pool = _Compilers(min(THREADS, os.cpu_count() or 1), "kernels")
    # The mode holds for its context alone, and is never left: leaving it would wait for the pool.
    context = contextvars.copy_context()
    context.run(AsyncCompileMode(pool).__enter__)
    context.run(rehearsal)
    pool.shutdown(wait=False)


class _Compilers(ThreadPoolExecutor):
    """Threads that also make what launches a kernel: in Triton 3.6 a C program of its own, a tenth of a second each."""

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]  # all that is asked
        return super().submit(_compile_with_launcher, compile_kernel)


def _compile_with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    from triton.runtime import driver

    kernel = compile_kernel()
    driver.active.launcher_cls(kernel.src, kernel.metadata)  # the one for the kernel's use comes from Triton's cache
    return kernel


@torch.no_grad()
def run_block(engine: SATVideoDiffusionEngine, shape: Shape) -> None:
    """One pass of the first block on the meta device, for a guidance pair of latents of `shape`."""
    network, (frames, _, height, width) = engine.network, shape
    positions, adaln = network.mixins.pos_embed, network.mixins.adaln_layer
    grid = network.patch.grid(frames, height, width)
    kind: dict[str, Any] = {"device": "meta", "dtype": engine.dtype}
    hidden = torch.empty(2, positions.text_length + grid.tokens, network.hidden_size, **kind)
    query_norm, key_norm = adaln.head_norms(0)
    with MetaRules(SHAPES):
        dit_block(
            hidden,
            network.transformer.layers[0],
            query_norm,
            key_norm,
            split_modulation(torch.empty(2, 12 * network.hidden_size, **kind)),
            positions.rotary(grid, hidden),
            positions.text_length,
            ops=engine.kernels.block._replace(attention=_mixed, linear=_product, linear_gelu=_product),
        )


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    b, heads, n, width = query.shape
    return torch.empty(b, n, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    outs = linear.get_parameter("weight").shape[0]
    return torch.empty(*x.shape[:-1], outs, dtype=x.dtype, device=x.device)


@torch.no_grad()
def run_decoder(stage: VideoAutoencoder, shape: Shape, dtype: torch.dtype) -> None:
    """The first chunks of a decoding on the meta device, where `stage` lies, for latents of `shape`."""
    frames, channels, height, width = shape
    # as `Pipeline.decode` hands them over: frame after frame
    z = torch.empty(1, min(frames, FRAMES), channels, height, width, device="meta", dtype=dtype).transpose(1, 2)
    stage.set_channels_last()  # as the one that is loaded
    with MetaRules(SHAPES):
        for _ in stage.decode_chunks(z):
            pass


def _empty(shape: Sequence[int], like: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta", memory_format=layout)


def _new_empty(x: Tensor, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return torch.empty(tuple(shape), dtype=dtype or x.dtype, device="meta")


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else _empty(x.shape, x, memory_format)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(np.broadcast_shapes(a.shape, b.shape), dtype=torch.result_type(a, b), device="meta")


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    names, _, result = equation.partition("->")
    sizes = {n: size for part, x in zip(names.split(","), operands) for n, size in zip(part, x.shape)}
    return _empty([sizes[n] for n in result], operands[0])


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    before = [0] * (x.ndim - len(pad) // 2)
    added = [*before, *(low + high for low, high in zip(pad[-2::-2], pad[::-2]))]
    return _empty([size + more for size, more in zip(x.shape, added)], x)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    axes = x.ndim - 2
    steps, zeros, gaps = ((v,) * axes if isinstance(v, int) else v for v in (stride, padding, dilation))
    sizes = [
        (size + 2 * zero - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, zero, gap in zip(x.shape[2:], weight.shape[2:], steps, zeros, gaps)
    ]
    layout = torch.channels_last if axes == 2 else torch.channels_last_3d
    return _empty([x.shape[0], weight.shape[0], *sizes], x, layout)


# Shape, type and layout of some operations' results, in microseconds.
SHAPES: Rules = {
    Tensor.new_empty: _new_empty,
    Tensor.contiguous: _contiguous,
    Tensor.add: _sum,
    Tensor.__add__: _sum,
    Tensor.zero_: lambda x: x,
    torch.einsum: _einsum,
    F.pad: _pad,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.empty_like: lambda x: _empty(x.shape, x),
}

"""Compiling the fused kernels side by side and ahead, not one after the other when each is first needed.

A block and the decoder go once through their own code with tensors that have no values: whatever kernel a real pass
launches is compiled then, in the background, for the types, sizes and strides that it is going to meet. A launch that
comes before its kernel is done waits for that one alone (Triton's asynchronous mode).
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.ops.modulation import split_modulation
from sgm.modules.transformer.block import dit_block

THREADS = 16  # at most; a kernel is compiled mostly outside of Python
FRAMES = 5  # latent frames that show the decoder's first chunk and its later ones

Shape = tuple[int, int, int, int]  # latents of a sample: t, c, h, w


def compile_ahead(rehearsal: Callable[[], None]) -> None:
    """Compile what `rehearsal` launches for tensors without values; returns when it is known, not when it is done."""
    from triton import AsyncCompileMode

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "kernels")
    # The mode holds for its context alone, and is never left: leaving it would wait for the pool.
    context = contextvars.copy_context()
    context.run(AsyncCompileMode(pool).__enter__)
    context.run(rehearsal)
    pool.shutdown(wait=False)


@torch.no_grad()
def run_block(engine: SATVideoDiffusionEngine, shape: Shape) -> None:
    """One pass of the first block on the meta device, for a guidance pair of latents of `shape`: milliseconds."""
    network, (frames, _, height, width) = engine.network, shape
    positions, adaln = network.mixins.pos_embed, network.mixins.adaln_layer
    grid = network.patch.grid(frames, height, width)
    hidden = torch.empty(2, positions.text_length + grid.tokens, network.hidden_size, device="meta", dtype=engine.dtype)
    dit_block(
        hidden,
        network.transformer.layers[0],
        adaln.query_layernorm_list[0] if adaln.qk_ln else None,
        adaln.key_layernorm_list[0] if adaln.qk_ln else None,
        split_modulation(torch.empty(2, 12 * network.hidden_size, device="meta", dtype=engine.dtype)),
        positions.rotary(grid, hidden),
        positions.text_length,
        # No kernels of ours, and without values some need them, others PyTorch's compiler.
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
    """The first chunks of a decoding on the meta device, for latents of `shape`.

    Takes seconds of Python in a fresh process: PyTorch finds the shapes of convolutions by way of sympy.
    """
    frames, channels, height, width = shape
    # as `TextToVideo.decode` hands them over: frame after frame
    z = torch.empty(1, min(frames, FRAMES), channels, height, width, device="meta", dtype=dtype).transpose(1, 2)
    stage.set_channels_last()  # as it is going to be, once loaded
    with _ShapesOfSums():
        for _ in stage.decode_chunks(z):
            pass


class _ShapesOfSums(TorchFunctionMode):
    """Sums of tensors without values, for whose shapes PyTorch imports its compiler: more seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (Tensor.add, Tensor.__add__) and args[0].is_meta:
            one, other = args
            return torch.empty(
                torch.broadcast_shapes(one.shape, other.shape), dtype=torch.result_type(one, other), device="meta"
            )
        if func is torch.einsum and args[1].is_meta:
            names, _, result = args[0].partition("->")
            sizes = {n: size for part, x in zip(names.split(","), args[1:]) for n, size in zip(part, x.shape)}
            return args[1].new_empty([sizes[n] for n in result])
        return func(*args, **(kwargs or {}))

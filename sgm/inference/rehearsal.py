"""Compiling the fused kernels side by side while weights are read, not one after the other when each is first needed.

Before the weights are there, a block and the decoder go once through their own code with tensors that have no values:
whatever kernel a real pass launches is compiled then, in the background, for the types, sizes and strides that it is
going to meet. A launch that comes before its kernel is done waits for that one alone (Triton's asynchronous mode).
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.ops.modulation import split_modulation
from sgm.modules.transformer.block import dit_block

THREADS = 16  # at most; a kernel is compiled mostly outside of Python
FRAMES = 5  # latent frames that show the decoder's first chunk and its later ones

Shape = tuple[int, int, int, int]  # latents of a sample: t, c, h, w


def rehearse(engine: SATVideoDiffusionEngine, shape: Shape, *, network: bool, decoder: bool) -> None:
    """Start to compile what sampling and decoding latents of `shape` need.

    Args:
        engine: on the meta device, with the kernels that it is going to use.
        network, decoder: which of the two will run.
    """
    from triton import AsyncCompileMode

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "kernels")
    # The mode holds for its context alone, so that this one goes on at once: nothing waits for the pool here.
    context = contextvars.copy_context()
    context.run(AsyncCompileMode(pool).__enter__)
    if network:
        context.run(partial(run_block, engine, shape))
    if decoder:
        context.run(partial(run_decoder, engine, shape))
    pool.shutdown(wait=False)


@torch.no_grad()
def run_block(engine: SATVideoDiffusionEngine, shape: Shape) -> None:
    """One pass of the first block on the meta device, for a guidance pair of latents of `shape`."""
    network, (frames, _, height, width) = engine.network, shape
    positions, adaln = network.mixins.pos_embed, network.mixins.adaln_layer
    grid = network.patch.grid(frames, height, width)
    hidden = torch.empty(2, positions.text_length + grid.tokens, network.hidden_size, device="meta", dtype=engine.dtype)
    dit_block(
        hidden,
        network.transformer.layers[0],
        adaln.query_layernorm_list[0] if adaln.qk_ln else None,
        adaln.key_layernorm_list[0] if adaln.qk_ln else None,
        split_modulation(hidden.new_empty(2, 12 * network.hidden_size)),
        positions.rotary(grid, hidden),
        positions.text_length,
        # No kernels of ours, and without values some need them, others PyTorch's compiler.
        ops=engine.kernels.block._replace(attention=_mixed, linear=_product, linear_gelu=_product),
    )


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    weight = linear.get_parameter("weight")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def run_decoder(engine: SATVideoDiffusionEngine, shape: Shape) -> None:
    """The first chunks of a decoding on the meta device, for latents of `shape`."""
    frames, channels, height, width = shape
    # as `TextToVideo.decode` hands them over: frame after frame
    z = torch.empty(1, min(frames, FRAMES), channels, height, width, device="meta", dtype=engine.dtype).transpose(1, 2)
    engine.autoencoder.set_channels_last()  # as it is going to be, once loaded
    with _ShapesOfSums():
        for _ in engine.autoencoder.decode_chunks(z):
            pass


class _ShapesOfSums(TorchFunctionMode):
    """Sums of tensors without values: PyTorch finds their shapes by a program, for which it imports its compiler."""

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

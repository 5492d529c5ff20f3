"""Compiling the fused kernels side by side while weights are read, not one after the other when each is first needed.

Before the weights are there, network and decoder go once through their own code with tensors that have no values:
whatever kernel a real pass launches is compiled then, in the background, for the types, sizes and strides that it is
going to meet. A launch that comes before its kernel is done waits for that one alone (Triton's asynchronous mode).
"""

from __future__ import annotations

import contextvars
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from sgm.models.diffusion import SATVideoDiffusionEngine

THREADS = 16  # at most; a kernel is compiled mostly outside of Python
FRAMES = 5  # latent frames that show the decoder's first chunk and its later ones


def rehearse(
    engine: SATVideoDiffusionEngine, shape: tuple[int, int, int, int], *, network: bool, decoder: bool
) -> None:
    """Start to compile what sampling and decoding latents of `shape` (t, c, h, w) need.

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
        context.run(partial(run_network, engine, shape))
    if decoder:
        context.run(partial(run_decoder, engine, shape))
    pool.shutdown(wait=False)


@torch.no_grad()
def run_network(engine: SATVideoDiffusionEngine, shape: tuple[int, int, int, int]) -> None:
    """One pass of the network on the meta device, for a guidance pair of latents of `shape` (t, c, h, w)."""
    network = engine.network
    positions, patches = network.mixins.pos_embed, network.mixins.patch_embed
    empty = partial(torch.empty, device="meta", dtype=engine.dtype)
    x = empty(2, shape[0], network.in_channels, *shape[2:])  # two: the guidance pair
    text = empty(2, positions.text_length, patches.text_hidden_size)
    ofs = None if network.ofs_embed_dim is None else empty(1)
    # Attention is no kernel of ours, and some implementations of it need values.
    network.use_ops(engine.kernels.block._replace(attention=_shaped_attention))
    try:
        network(x, torch.empty(2, device="meta"), text, ofs=ofs)
    finally:
        network.use_ops(engine.kernels.block)


def _shaped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.no_grad()
def run_decoder(engine: SATVideoDiffusionEngine, shape: tuple[int, int, int, int]) -> None:
    """The first chunks of a decoding on the meta device, for latents of `shape` (t, c, h, w)."""
    frames, channels, height, width = shape
    z = torch.empty(1, channels, min(frames, FRAMES), height, width, device="meta", dtype=engine.dtype)
    engine.autoencoder.set_channels_last()  # as it is going to be, once loaded
    for _ in engine.autoencoder.decode_chunks(z):
        pass

"""Floating-point operations of the models (a multiply-add is two), from shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.blocks import Upsample3D


def block_flops(width: int, tokens: int, batch: int) -> tuple[float, float]:
    """Matrix products with weights (12 width^2 a token), and the two products of attention, of one block."""
    return 24.0 * batch * tokens * width**2, 4.0 * batch * tokens**2 * width


def network_flops(network: nn.Module, tokens: int, batch: int = 2) -> float:
    """The blocks of a `DiffusionTransformer` on `tokens` tokens; what lies around them is below one percent."""
    return network.num_layers * sum(block_flops(network.hidden_size, tokens, batch))


@torch.no_grad()
def conv_flops(module: nn.Module, run: Callable[[], Any]) -> float:
    """The convolutions of `module` that one call of `run` passes through.

    An upsampling that runs as four sets of 2x2 filters, without calling its convolution, counts as that.
    """
    total = 0.0

    def add(conv: nn.Module, _: Any, result: Tensor) -> None:
        nonlocal total
        total += 2.0 * result.numel() * conv.weight[0].numel()

    def add_folded(block: Upsample3D, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal total
        if inputs[0].dtype == torch.float32:
            total += 2.0 * inputs[0].numel() * block.conv.out_channels * 16

    parts = list(module.modules())
    hooks = [part.register_forward_hook(add) for part in parts if isinstance(part, nn.Conv2d | nn.Conv3d)]
    hooks += [part.register_forward_hook(add_folded) for part in parts if isinstance(part, Upsample3D)]
    run()
    for hook in hooks:
        hook.remove()
    return total

"""Which implementation of the operations a run uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgm.modules.ops import block_ops, vae
from sgm.modules.ops.attention import BACKENDS, attention_by
from sgm.modules.ops.block_ops import BlockOps
from sgm.modules.ops.triton_support import INTERPRETED, has_triton
from sgm.modules.ops.vae import VaeOps

KERNELS = ("auto", "plain", "triton")
ATTENTION = ("default", *BACKENDS)


class KernelError(ValueError):
    """The kernels asked for do not run here; the message says why and what to choose."""


@dataclass(frozen=True)
class Kernels:
    """Operations of the transformer's blocks and of the VAE. `fused`: made for GPUs and channels-last weights."""

    block: BlockOps = block_ops.PLAIN
    vae: VaeOps = vae.PLAIN
    fused: bool = False


def choose_kernels(kernels: str, attention: str, device: torch.device) -> Kernels:
    """The operations for `device`.

    Args:
        kernels: "plain": PyTorch's operations; "triton": fused kernels; "auto": fused on a GPU where Triton is
            installed, plain elsewhere.
        attention: "default": torch chooses; else one of `BACKENDS`, tried first.
    Raises:
        KernelError: "triton" without Triton or without a GPU, or an unknown name.
    """
    for name, value, choices in (("kernels", kernels, KERNELS), ("attention", attention, ATTENTION)):
        if value not in choices:
            raise KernelError(f"accelerate.{name} is {value!r}; choose one of {', '.join(choices)}.")
    on_gpu = device.type == "cuda" or INTERPRETED
    if kernels == "triton" and not (on_gpu and has_triton()):
        missing = "Triton is not installed" if on_gpu else f"the device is {device.type}, which Triton does not serve"
        raise KernelError(f"accelerate.kernels is 'triton', but {missing}; write auto or plain.")
    attend = attention_by(attention)
    if kernels == "plain" or not (on_gpu and has_triton()):
        return Kernels(block_ops.PLAIN._replace(attention=attend))
    return _fused(attend)


def _fused(attend: block_ops.Attention) -> Kernels:
    from sgm.modules.ops import fused_block, fused_vae  # these import Triton

    block = BlockOps(
        norm_modulate=fused_block.norm_modulate,
        residual_norm=fused_block.residual_norm,
        gated_residual=fused_block.gated_residual,
        split_heads=fused_block.split_heads,
        linear_gelu=fused_block.linear_gelu,
        attention=attend,
    )
    coders = VaeOps(
        group_moments=fused_vae.group_moments,
        latent_field=fused_vae.latent_field,
        apply_field=fused_vae.apply_field,
        convolve=fused_vae.convolve,
        add_residual=fused_vae.add_residual,
        place=fused_vae.place,
        join_phases=fused_vae.join_phases,
        folds_bias=True,
    )
    return Kernels(block, coders, fused=True)

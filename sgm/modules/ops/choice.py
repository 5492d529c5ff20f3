"""Which implementation of the operations a run uses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgm.modules.ops import block_ops, cpu_bf16, vae
from sgm.modules.ops.block_ops import AttentionError, BlockOps
from sgm.modules.ops.block_ops import attention as plain_attention
from sgm.modules.ops.triton_support import INTERPRETED, has_triton
from sgm.modules.ops.vae import VaeOps
from sgm.typed import ConfigError

# Preferred implementation, then those that stand in where it does not take the device, dtype or shape at hand.
BACKENDS: dict[str, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
ATTENTIONS = ("default", *BACKENDS, "flash4")
KERNELS = ("auto", "plain", "triton")
CPU_BF16 = (False, True, "auto")


@dataclass(frozen=True)
class Kernels:
    """Operations of the transformer's blocks and of the VAE.

    `fused`: made for GPUs and channels-last weights; `cpu_bf16`: products in bfloat16 on a CPU.
    """

    block: BlockOps = block_ops.PLAIN
    vae: VaeOps = vae.PLAIN
    fused: bool = False
    cpu_bf16: bool = False


def choose_kernels(kernels: str, attention: str, device: torch.device, products: bool | str = False) -> Kernels:
    """The operations for `device`.

    Args:
        kernels: "plain": PyTorch's operations; "triton": fused kernels; "auto": fused on a GPU where Triton is
            installed, plain elsewhere.
        attention: "default": torch chooses; else another of `ATTENTIONS`, tried first.
        products: matrix products and convolutions in bfloat16 on a CPU: True, or "auto": where it has instructions
            for them. Changes nothing on other devices.
    Raises:
        ConfigError: "triton" without Triton or without a GPU, "flash4" where it does not run, or an unknown name.
    """
    for name, value, choices in (
        ("kernels", kernels, KERNELS),
        ("attention", attention, ATTENTIONS),
        ("cpu_bf16", products, CPU_BF16),
    ):
        if value not in choices:
            raise ConfigError(f"accelerate.{name} is {value!r}; choose one of {', '.join(map(str, choices))}.")
    on_gpu = device.type == "cuda" or INTERPRETED
    if kernels == "triton" and not (on_gpu and has_triton()):
        missing = "Triton is not installed" if on_gpu else f"the device is {device.type}, which Triton does not serve"
        raise ConfigError(f"accelerate.kernels is 'triton', but {missing}; write auto or plain.")
    try:
        attend = attention_by(attention, device)
    except AttentionError as error:
        raise ConfigError(f"accelerate.attention is {attention!r}, but {error}; or choose another.") from error
    if kernels != "plain" and on_gpu and has_triton():
        return _fused(attend)
    half = products is True or (products == "auto" and cpu_bf16.has_bf16_products())
    if device.type != "cpu" or not half:
        return Kernels(BlockOps(attention=attend))
    block = BlockOps(linear=cpu_bf16.linear, linear_gelu=cpu_bf16.linear_gelu, attention=cpu_bf16.attention)
    return Kernels(block, vae.PLAIN._replace(convolve=cpu_bf16.convolve), cpu_bf16=True)


def attention_by(name: str, device: torch.device) -> block_ops.Attention:
    """`attention` by torch's own choice ("default"), with one of `BACKENDS` first, or by FlashAttention-4 ("flash4").

    Raises:
        AttentionError: "flash4" without its package, or on another device than a GPU that it was written for.
    """
    if name == "flash4":
        from sgm.modules.ops import flash4  # an operator of its own, which takes time to register

        flash4.demand_flash4(device)
        return flash4.flash4_attention
    return plain_attention if name == "default" else partial(_attention_ordered, BACKENDS[name])


def _attention_ordered(order: list[SDPBackend], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(order, set_priority=True):
        return plain_attention(query, key, value)


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

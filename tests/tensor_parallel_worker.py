"""One process of a tensor-parallel run: forward and backward of small networks, results written to a folder.

Started by tests/unit/test_distributed.py as `python -m tests.tensor_parallel_worker FOLDER` with the environment that
torchrun sets; FOLDER holds the whole state of each variant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.dit_tiny import random_inputs, tiny_network

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "lora": {"rotary": True, "lora": {"r": 3, "lora_alpha": 6, "targets": ["attention", "mlp", "adaln"]}},
}


def build(variant: str, parts: int) -> nn.Module:
    """A two-layer network of width 128 with two heads, each weight in `parts` parts."""
    args = {"model_parallel_size": parts, "checkpoint_activations": variant == "lora"}
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "transformer_args": args}
    return tiny_network(**VARIANTS[variant], **sizes).train()


def run(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of every trainable parameter, for a fixed loss."""
    out = network(**random_inputs())
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def main(folder: Path) -> None:
    from sgm.distributed import ensure_groups, init_distributed, model_parallel_rank, shutdown
    from sgm.weights import assign_state
    from sgm.weights.tensor_parallel import partition_state

    info = init_distributed("cpu")
    ensure_groups(2)
    assert (info.rank, info.world_size, model_parallel_rank()) == (info.rank, 2, info.rank)
    for variant in VARIANTS:
        network = build(variant, 2)
        initial = {f"init {n}": t.clone() for n, t in network.state_dict().items()}
        state = load_file(folder / f"{variant}.safetensors")
        assign_state(network, partition_state(state, info.rank, 2), source=variant)
        out, grads = run(network)
        grads = {f"grad {n}": t.contiguous() for n, t in grads.items()}
        save_file({"out": out, **grads, **initial}, folder / f"{variant}.{info.rank}.safetensors")
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Frozen weights in host memory while an adapter is trained: each block's come to the GPU for its two passes.

With activation checkpointing a block runs once in the forward pass, and again in the backward pass just before it is
differentiated. Each run begins with the arrival of its weights, and they stay until another block begins: by then all
of its gradients are queued, since autograd takes the nodes of later layers first. So the numbers are those of a network
that lies on the GPU as a whole, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from sgm.weights.streaming import TwoBuffers, set_aside


def frozen_parameters(block: Sequence[nn.Module]) -> list[Tensor]:
    """Those that do not learn, each once."""
    return list({id(p): p for part in block for p in part.parameters() if not p.requires_grad}.values())


class FrozenStream:
    """From now on the frozen weights of a network's blocks lie on the host, and come to `device` block by block.

    What learns, and what lies outside the blocks, is to be on `device`. Copies of the network that share its frozen
    parameters (`copy.deepcopy` with these in its memo) use the stream, too.

    Args:
        blocks: for each its modules, the one that is called first, in their order; as trained, they recompute their
            activations. Weights are taken from where they lie.
        pin: see `TwoBuffers`.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], device: torch.device, pin: bool):
        self.device, self.pinned = device, pin
        self.ring = TwoBuffers([frozen_parameters(block) for block in blocks], device, pin)
        self.ring.open()
        self._before = 0
        for k, block in enumerate(blocks):
            block[0].register_forward_pre_hook(lambda *_, k=k: self._use(k))

    def _use(self, k: int) -> None:
        following = next_block(k, self._before, len(self.ring.blocks), torch.is_grad_enabled())
        with _disable_current_modes():  # selective checkpointing would take the copies for part of the layer
            self.ring.use(k, following)
        self._before = k

    @property
    def host_bytes(self) -> int:
        """Of the weights on the host."""
        return sum(block.size for block in self.ring.blocks)

    @property
    def device_bytes(self) -> int:
        """Of the two blocks on the device."""
        return sum(buffer.nbytes for buffer in self.ring.buffers)

    def set_aside(self) -> AbstractContextManager[None]:
        """For who moves the module and sends its weights to other processes (DeepSpeed): here they have theirs."""
        return set_aside((t for block in self.ring.blocks for t in block.tensors), self.device, empty=True)


def next_block(k: int, before: int, count: int, recorded: bool) -> int:
    """Which of `count` blocks will be needed after block k, which comes after `before`.

    A recorded pass turns round at the last block, and its backward pass at the first one; others begin again.
    """
    if k == count - 1:
        return max(k - 1, 0) if recorded else 0
    return k - 1 if 0 < k < before else k + 1

"""What training uses of DeepSpeed's engine, which itself carries no types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sgm.models.diffusion import SATVideoDiffusionEngine


class TrainingEngine(Protocol):
    """DeepSpeed's engine around the diffusion engine.

    Attributes:
        optimizer: a wrapper around `basic_optimizer`, or that one itself (stage 0 in float32).
        global_steps, global_samples, micro_steps, skipped_steps: DeepSpeed's own counters.
    """

    module: SATVideoDiffusionEngine
    optimizer: Any
    basic_optimizer: torch.optim.Optimizer
    dp_world_size: int
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int

    @property
    def device(self) -> torch.device: ...
    def __call__(self, z: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def zero_grad(self) -> None: ...
    def gradient_accumulation_steps(self) -> int: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> float | Tensor | None: ...
    def zero_optimization_stage(self) -> int: ...
    def fp16_enabled(self) -> bool: ...

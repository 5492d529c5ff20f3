"""What training uses of DeepSpeed's engine, and of the wrappers that it puts around an optimizer: DeepSpeed itself
carries no types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.models.diffusion import SATVideoDiffusionEngine


class TrainingEngine(Protocol):
    """DeepSpeed's engine around the diffusion engine.

    Attributes:
        optimizer: a wrapper around `basic_optimizer`, or that one itself (stage 0 in float32).
        global_steps, global_samples, micro_steps, skipped_steps: DeepSpeed's own counters.
    """

    module: SATVideoDiffusionEngine
    optimizer: object
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


@runtime_checkable
class Zero12(Protocol):
    """Wrapper of ZeRO 1 and 2; one item a parameter group in each sequence."""

    bit16_groups: Sequence[Sequence[nn.Parameter]]
    bit16_groups_flat: list[Tensor]
    averaged_gradients: dict[int, list[Tensor]]
    partition_size: Sequence[int]
    dp_process_group: dist.ProcessGroup
    real_dp_process_group: Sequence[dist.ProcessGroup]
    communication_data_type: torch.dtype
    reduce_bucket_size: int
    clip_grad: float
    loss_scale: float
    cpu_offload: bool
    compute_grad_norm: bool
    check_overflow: Callable[..., None]
    reduce_gradients: Callable[..., None]
    scaled_global_norm: Callable[..., Tensor]
    unscale_and_clip_grads: Callable[[list[Tensor], Tensor], None]
    _grad_acc_hooks: list[Any]
    _update_model_bit16_weights: Callable[[int], None]


@runtime_checkable
class Zero3(Protocol):
    """Wrapper of ZeRO 3; `fp16_groups`: weights of each sub-group, whatever their type."""

    fp32_partitioned_groups_flat: Sequence[Tensor]
    fp16_groups: Sequence[Sequence[Any]]
    persistent_parameters: Sequence[Any]

    def _partition_all_parameters(self) -> None: ...
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...

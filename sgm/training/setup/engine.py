"""DeepSpeed's engine: what training uses of it, which itself carries no types, and its start."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgm.config import ConfigError
from sgm.distributed import model_parallel_world_size, prepare_deepspeed, quiet_libraries
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.autoencoding.coders import ContextParallelDecoder3D, ContextParallelEncoder3D
from sgm.training.optimizers.flat_gradients import FlatGradients, fits_one_buffer
from sgm.training.setup.deepspeed import DeepSpeedPlan
from sgm.weights import DTYPES


class TrainingEngine(Protocol):
    """DeepSpeed's engine around the diffusion engine.

    Attributes:
        optimizer: a wrapper around `basic_optimizer`, or that one itself (stage 0 in float32).
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


def start_engine(
    model: nn.Module, groups: list[dict[str, Any]], plan: DeepSpeedPlan, device_type: str
) -> TrainingEngine:
    """`deepspeed.initialize`, over the process groups that exist already.

    The optimizer is built here where it can be, so that no compiler is started on a CPU; the state that some wrappers
    make by a trial step is thrown away.

    Raises:
        ConfigError: DeepSpeed refuses what its section asks for.
    """
    prepare_deepspeed(device_type)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed demands it of a single process too
    _keep_compiler_out()
    own = plan.optimizer.build(groups) if plan.optimizer.target is not None else None
    split = model_parallel_world_size() > 1
    frozen = model.frozen if isinstance(model, SATVideoDiffusionEngine) else None
    with quiet_libraries():
        import deepspeed
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from sat import mpu

        if own is not None:
            _keep_muon_plain()
        if plan.stage == 3:
            _gather_first_stage_whole(model)
        try:
            with frozen.set_aside() if frozen else nullcontext():
                ds_engine: TrainingEngine = deepspeed.initialize(
                    model=model,
                    model_parameters=None if own is not None else groups,
                    optimizer=own,
                    config=copy.deepcopy(plan.config),
                    mpu=mpu if split else None,
                    dist_init_required=False,
                )[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # assertions, compilers that are absent, ...: each says what it lacks
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} does not start with this deepspeed section: {error!r}"
            ) from error
    ds_engine.basic_optimizer.state.clear()
    wrapper = ds_engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and not split:
        # They test each gradient for inf and NaN, a dozen kernels a tensor, then take the norm and test that. The norm
        # tells it all, unless part of it is on the CPU or another process of a model-parallel group.
        if wrapper.compute_grad_norm and not wrapper.cpu_offload:
            wrapper.check_overflow = lambda partition_gradients=True: None  # would set `overflow`
        if fits_one_buffer(wrapper):
            FlatGradients(wrapper).take_over()
    scaler: Any = getattr(wrapper, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # the limit on skipped steps ends such a run, with advice
    return ds_engine


def rehearse_start(plan: DeepSpeedPlan, device: torch.device) -> None:
    """Start DeepSpeed on a stand-in for the model: what it refuses, a dry run says.

    Raises:
        ConfigError: as `start_engine`.
    """
    model = nn.Linear(8, 8, device=device, dtype=DTYPES[plan.dtype])
    start_engine(model, [{"params": list(model.parameters())}], plan, device.type)


def _keep_compiler_out() -> None:
    """PyTorch's optimizers import its compiler (2 s) to have themselves left out of it; nothing here compiles them."""
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None:
            plain.__dynamo_disable = plain


def _keep_muon_plain() -> None:
    """ZeRO loads DeepSpeed's Muon to see that it is not used; to compile its kernels, that imports the compiler."""
    from deepspeed.runtime import compiler

    wrapping, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = wrapping


def _gather_first_stage_whole(model: nn.Module) -> None:
    """ZeRO 3 gathers a module's weights when it is called; the first stage's convolutions read each other's."""
    from deepspeed.utils import set_z3_leaf_modules

    kinds = (ContextParallelEncoder3D, ContextParallelDecoder3D)
    coders = {type(part) for part in model.modules() if isinstance(part, kinds)}
    if coders:  # with a cache something else stands there
        set_z3_leaf_modules(model, list(coders))

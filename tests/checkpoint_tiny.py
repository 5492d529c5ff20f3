"""A toy engine, its state and its configuration, for the checkpoint tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sgm.config import AccelerateArgs, RunConfig
from sgm.training.checkpoints.partitions import ema_state, load_ema_state, load_optimizer_state, optimizer_state
from sgm.training.checkpoints.state import TrainState, capture_rng
from sgm.training.optimizers.ema_adam import FusedEmaAdam
from sgm.training.options import TrainArgs
from sgm.weights import read_checkpoint
from sgm.weights.files import tensors_of
from sgm.weights.release import locate


def configuration(**args: Any) -> RunConfig[TrainArgs]:
    given = {
        "experiment_name": "toy",
        "mode": "pretrain",
        "train_data": ["clips"],
        "seed": 1,
        "train_iters": 10,
        **args,
    }
    sections = ({"scale_factor": 1.0}, None, {"zero_optimization": {"stage": 0}})
    return RunConfig(TrainArgs(**given), *sections, AccelerateArgs(), (), ())


class ToyEngine(nn.Module):
    """The parts and names of the real engine."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.diffusion_model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.model.diffusion_model.register_buffer("table", torch.arange(4.0))
        self.conditioner = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.model.diffusion_model(x) - x).square().mean()


def toy_run(seed: int = 0) -> Any:
    """What `sgm.training.checkpoints.partitions` needs of a DeepSpeed engine, without DeepSpeed: stage 0 in float32."""
    module = ToyEngine(seed)
    optimizer = FusedEmaAdam([p for p in module.parameters() if p.requires_grad], lr=0.01)
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0,
        dp_world_size=1, global_steps=0, global_samples=0, micro_steps=0, skipped_steps=0,
        gradient_accumulation_steps=lambda: 1,
    )  # fmt: skip


def step(run: Any) -> float:
    """One optimizer step on a random batch."""
    loss = run.module(torch.randn(4, 3))
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.global_steps += 1
    return loss.item()


def state_of(run: Any, iteration: int) -> TrainState:
    return TrainState(
        iteration=iteration,
        consumed_samples=4 * iteration,
        sampler={"epoch": 1, "position": iteration, "weights": [0.5, 0.5]},
        schedule={"steps": iteration},
        scaler=None,
        skipped_steps=0,
        optimizer=optimizer_state(run),
        ema=ema_state(run),
        rng=capture_rng(),
    )


def put_back(run: Any, state: TrainState) -> None:
    load_optimizer_state(run, state.optimizer)
    load_ema_state(run, state.ema)


def load_module(path: Path, part: int = 0) -> dict[str, torch.Tensor]:
    """The weights of one tensor-parallel part that an iteration's or a run's folder holds."""
    return tensors_of(read_checkpoint(locate(path)[0][part])["module"])


def leftovers(folder: Path) -> list[str]:
    """Unfinished or displaced files and folders."""
    return sorted(str(p) for p in folder.rglob("*") if p.name.startswith((".partial-", ".replaced-")))

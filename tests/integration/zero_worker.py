"""Run by test_training_zero.py on two ranks, RANK PORT CASE...: a toy model through the cases named "STAGE TYPE [offload] [8bit]
[buckets] [autocast]"; prints JSON. Autocast last: DeepSpeed remembers it for the rest of a process."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.distributed import ensure_groups, init_distributed
from sgm.training.checkpoints.partitions import (
    ema_state,
    ema_weights,
    load_ema_state,
    load_optimizer_state,
    optimizer_state,
)
from sgm.training.optimizers.flat_gradients import FlatGradients
from sgm.training.optimizers.schedule import LearningRate, ScheduleSettings
from sgm.training.optimizers.spec import parameter_groups
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.engine import start_engine
from sgm.training.step import training_step

ACCUMULATION = 2
CLIPPING = 0.1


class Toy(nn.Module):
    """Something with the engine's interface towards the training step; `z` is (b, t, c, h, w)."""

    input_key, latent_input, noised_image_input = "mp4", True, False
    network = SimpleNamespace(patch=SimpleNamespace(t=1))  # latent frames of a token

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.wide, self.norm, self.out = nn.Linear(8, 33), nn.LayerNorm(33), nn.Linear(33, 8)
        self.dtype = dtype
        self.to(dtype)

    def encode_first_stage(self, x):
        return x

    def forward(self, z, batch):
        x = z.flatten(1)
        loss = (self.out(self.norm(self.wide(self.frozen(x)).relu())) - x).float().square().mean() * batch["factor"]
        return loss, {"loss": loss.detach()}


OPTIMIZERS = {
    "": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}},
    "8bit": {"type": "AdamW8bit", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "ema": True}},
}


SETTINGS = {"offload": {"cpu_offload": True}, "buckets": {"reduce_bucket_size": 300}}  # less than all gradients
SETTINGS["robin"] = {"round_robin_gradients": True}


def build(stage: int, precision: str, ranks: int, more: list[str]):
    section = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage, "contiguous_gradients": False},
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": OPTIMIZERS["8bit" if "8bit" in more else ""],
    }
    for name in SETTINGS.keys() & more:
        section["zero_optimization"] |= SETTINGS[name]
    section["torch_autocast"] = {"enabled": "autocast" in more, "dtype": "bfloat16"}
    plan = plan_deepspeed(section, device_type="cpu", data_parallel_size=ranks)
    model = Toy({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    engine = start_engine(model, parameter_groups(model), plan, "cpu")
    settings = ScheduleSettings(plan.optimizer.lr, 100, warmup=0.0, hold_steps=0)
    return engine, LearningRate(settings, engine.basic_optimizer.param_groups)


def batches(rank: int, bad: int | None = None):
    """Micro-batches by number; number `bad` has a NaN loss on the last rank."""
    for k in itertools.count():
        draw = torch.Generator().manual_seed(10 * k + rank)
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        factor = math.nan if k == bad and last else 1.0
        yield {"mp4": torch.randn(2, 2, 1, 2, 2, generator=draw), "factor": factor}


def steps(engine, schedule, source, count: int):
    found = []
    for _ in range(count):
        outcome = training_step(engine, source, CLIPPING)
        if outcome.applied:
            schedule.step()
        found.append([outcome.loss, outcome.grad_norm, outcome.applied])
    return found


def weights(engine) -> list[torch.Tensor]:
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=sharded):
        return [p.detach().clone() for p in engine.module.parameters()]


def averaged_weights(engine) -> list[torch.Tensor]:
    """Through the model: the flat partitions' padding at stage 3 is memory that nobody has written."""
    with ema_weights(engine):
        return weights(engine)


def spoil_padding(engine) -> None:
    """Stage 3: what DeepSpeed itself counts as padding of this rank's masters becomes NaN, which it may be anyway."""
    if engine.zero_optimization_stage() < 3:
        return
    wrapper = engine.optimizer
    for flat, group, padding in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, wrapper.groups_padding):
        ends = itertools.accumulate(p.partition_numel() for p in group)
        for end, size in zip(ends, padding, strict=True):
            flat.data[end - size : end] = math.nan


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def case(rank: int, ranks: int, stage: int, precision: str, more: list[str]) -> dict:
    engine, schedule = build(stage, precision, ranks, more)
    frozen = engine.module.frozen.weight.detach().clone() if stage < 3 else None
    losses = steps(engine, schedule, batches(rank), 3)

    spoil_padding(engine)
    stored = io.BytesIO()
    torch.save([optimizer_state(engine), ema_state(engine), schedule.state_dict()], stored)
    before = weights(engine)
    averaged = averaged_weights(engine)
    swapped_back = same(before, weights(engine))

    source = batches(rank, bad=ACCUMULATION * 3 + 1)  # the second micro-batch of the fourth step
    for _ in range(ACCUMULATION * 3):
        next(source)
    skipped = steps(engine, schedule, source, 1)
    unharmed = same(before, weights(engine)) and schedule.steps == 3
    losses_after = steps(engine, schedule, source, 2)

    again, schedule_again = build(stage, precision, ranks, more)
    stored.seek(0)
    moments, ema, rate = torch.load(stored, weights_only=True)
    load_optimizer_state(again, moments)
    load_ema_state(again, ema)
    schedule_again.load_state_dict(rate)
    restored = same(before, weights(again))
    source = batches(rank)
    for _ in range(ACCUMULATION * 4):
        next(source)
    resumed = steps(again, schedule_again, source, 2)
    return {
        "losses": losses,
        "skipped": [not math.isfinite(skipped[0][0]), skipped[0][2]],
        "unharmed": unharmed,
        "restored": restored,
        "finite": all(m.isfinite().all() for m in moments["masters"]),
        "resumed_equal": resumed == losses_after and same(weights(again), weights(engine)),
        "ema_differs": not same(before, averaged),
        "ema_equal_after_resume": same(averaged_weights(again), averaged_weights(engine)),
        "swapped_back": swapped_back,
        "one_buffer": isinstance(getattr(_reducing(engine), "__self__", None), FlatGradients),
        "frozen_kept": frozen is None or torch.equal(frozen, engine.module.frozen.weight),
    }


def _reducing(engine):
    return getattr(engine.optimizer, "reduce_gradients", None)


def main() -> None:
    torch.set_num_threads(1)
    rank, port, *cases = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
    info = init_distributed("cpu")
    ensure_groups(1)
    results = {}
    for name in cases:
        stage, precision, *more = name.split()
        results[name] = case(info.rank, info.world_size, int(stage), precision, more)
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()

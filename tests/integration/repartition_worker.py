"""Run by test_repartition.py, once a process: RANK PORTS FOLDER CHAIN... Each chain is "TYPE [offload] [8bit] [robin]
RANKSxSTAGE ...": at each link so many of the processes load what the link before saved, look at it through the model,
train on, and save. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm import distributed
from sgm.training.checkpoints.partitions import (
    ema_state,
    layout_differences,
    load_ema_state,
    load_optimizer_state,
    masters,
    optimizer_state,
    refresh_weights,
    repartitioned,
)
from sgm.training.optimizers.adam8bit import decode
from tests.integration.zero_worker import averaged_weights, batches, build, steps, weights

STEPS = 2


def seen_through_model(engine: Any) -> dict[str, Any]:
    """Weights, averages and both moments as whole parameters: DeepSpeed itself spreads each over the model and back."""
    found: dict[str, Any] = {"weights": weights(engine), "averages": averaged_weights(engine)}
    states = [engine.basic_optimizer.state[m] for m in masters(engine)]
    kept = [m.detach().clone() for m in masters(engine)]
    for name in ("exp_avg", "exp_avg_sq", "m", "v"):
        if f"{name}_codes" not in states[0] and name not in states[0]:
            continue
        for master, state in zip(masters(engine), states):
            value = state[name] if name in state else decode(state[f"{name}_codes"], state[f"{name}_tops"])
            master.data.copy_(value.view(-1)[: master.numel()].view_as(master))
        refresh_weights(engine)
        found[name] = weights(engine)
    for master, value in zip(masters(engine), kept):
        master.data.copy_(value)
    refresh_weights(engine)
    found["steps"] = [int(state["step"]) for state in states][:1]
    found["updates"] = [state["updates"] for state in states][:1]
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return [n for n in a if len(a[n]) != len(b[n]) or not all(map(same, a[n], b[n]))] + sorted(a.keys() ^ b.keys())


def link(folder: Path, before: Path | None, ranks: int, stage: int, precision: str, more: list[str]) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engine, schedule = build(stage, precision, ranks, more)
    found: dict[str, Any] = {}
    if before is not None:
        read: list[str] = []

        def stored():
            for file in sorted(before.glob("rank*.pt")):
                read.append(file.name)
                yield SimpleNamespace(**torch.load(file, weights_only=True))

        found["cut up anew"] = bool(layout_differences(engine, next(stored()).optimizer))
        read.clear()
        optimizer, ema = repartitioned(engine, stored())
        load_optimizer_state(engine, next(stored()).optimizer | optimizer)
        load_ema_state(engine, ema)
        found |= {
            "differ": differing(torch.load(before / "seen.pt", weights_only=True), seen_through_model(engine)),
            "read": len(read) - 1,
        }
        schedule.steps = int(engine.global_steps)
        found["boundary"] = engine.micro_steps % engine.gradient_accumulation_steps() == 0
    found["losses"] = [loss for loss, _, _ in steps(engine, schedule, batches(rank), STEPS)]
    folder.mkdir(exist_ok=True)
    torch.save({"optimizer": optimizer_state(engine), "ema": ema_state(engine)}, folder / f"rank{rank}.pt")
    seen = seen_through_model(engine)
    if rank == 0:
        torch.save(seen, folder / "seen.pt")
    return found


def count_from_zero() -> None:
    """ZeRO 3 numbers modules and parameters by counters of the process, which must agree over the ranks."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = Init.param_id = 0


def main() -> None:
    torch.set_num_threads(1)
    rank, ports, folder = int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
    chains = [chain.split() for chain in sys.argv[4:]]
    results: dict[str, list[Any]] = {chain: [] for chain in sys.argv[4:]}
    shapes = [[tuple(map(int, w.split("x"))) for w in chain if "x" in w] for chain in chains]
    for k, port in enumerate(ports):
        ranks = shapes[0][k][0]  # that of all chains
        here = rank < ranks  # who is not does the same alone: what DeepSpeed leaves in a process must agree over ranks
        own = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port} if here else {"WORLD_SIZE": "1"}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", **own}
        distributed.init_distributed("cpu")
        distributed.ensure_groups(1)
        count_from_zero()
        for number, chain in enumerate(chains):
            names = [word for word in chain if "x" not in word]
            place = folder / (f"{number}-{k}" if here else f"alone-{rank}")
            before = folder / f"{number}-{k - 1}" if k and here else None
            found = link(place, before, ranks if here else 1, shapes[number][k][1], names[0], names[1:])
            if here:
                results[" ".join(chain)].append(found)
        torch.distributed.barrier()
        distributed.shutdown()
        (folder / f"done-{k}-{rank}").touch()
        while not all((folder / f"done-{k}-{other}").exists() for other in range(3)):
            time.sleep(0.02)
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()

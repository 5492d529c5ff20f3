"""Run by test_parallel_training.py, once a process: RANK PORTS FOLDER. One to eight processes run train_video.py on the
same clips, in all ways in which they share them; who has no part in a run waits. Prints JSON: each run's exit code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_video
from sgm.distributed import shutdown

# Group of processes by name, and its runs: name, how many share a clip, and further settings.
STEADY = "args.lr_decay_style=constant"
# So large an epsilon makes Adam's first step a hundred times the gradient.
ONE_STEP = (
    "args.train_iters=1", STEADY, "deepspeed.gradient_clipping=0",
    "deepspeed.optimizer.params={lr: 1.0e+6, eps: 1.0e+4, betas: [0.9, 0.95], weight_decay: 0}",
)  # fmt: skip
LOOK = ("args.log_image=true", "args.eval_interval=1", "args.eval_iters=1")  # with a cache it writes latents


def stage(number: int) -> str:
    return f"deepspeed.zero_optimization.stage={number}"


def mode(name: str) -> str:
    return f"args.checkpoint_activations={name}"


def until(iteration: int) -> tuple[str, ...]:
    return f"args.train_iters={iteration}", STEADY


# Processes, and their runs: name, how many share a clip, and further settings. Runs of one name go on with one another.
GROUPS: list[tuple[int, list[tuple[str, int, tuple[str, ...]]]]] = [
    (1, [("lora", 1, ONE_STEP), ("full", 1, (*ONE_STEP, *LOOK)), ("unbroken", 1, until(5)), ("resumed", 1, until(2))]),
    (2, [
        ("lora by 2", 2, (*ONE_STEP, mode("true"), "args.stream_frozen=true")),
        ("full by 2", 2, (*ONE_STEP, stage(1), mode("selective"))),
        ("prior of 2", 1, (*ONE_STEP, stage(2))),
        ("resumed", 2, (*until(3), stage(1))),
    ]),
    (3, [("full by 3", 3, (*ONE_STEP, *LOOK, stage(2), mode("true"))), ("resumed", 3, (*until(4), stage(2)))]),
    (8, [
        ("full by 8", 8, (*ONE_STEP, stage(2))),
        ("prior of 2 by 4", 4, (*ONE_STEP, stage(2), mode("true"))),
        ("prior of 2 by 2, split in 2", 2, (*ONE_STEP, stage(2), "args.model_parallel_size=2")),
        ("lora of 8", 1, ONE_STEP),
        ("lora of 8, ZeRO 2", 1, (*ONE_STEP, stage(2))),
    ]),
    (1, [("resumed", 1, until(5))]),
]  # fmt: skip


RUNS = [(world, *run) for world, of_world in GROUPS for run in of_world]


def command(folder: Path, name: str, size: int, settings: tuple[str, ...]) -> list[str]:
    named = folder / f"{name.split(maxsplit=1)[0]}.yaml"
    config = named if named.exists() else folder / "full.yaml"
    given = [f"args.save={folder / name}", f"args.sequence_parallel_size={size}", *settings]
    if (folder / name).exists():
        given.append(f"args.resume={next((folder / name).iterdir())}")
    return [str(config), *(word for value in given for word in ("--set", value))]


def main(rank: int, ports: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for number, ((world, name, size, settings), port) in enumerate(zip(RUNS, ports, strict=True)):
        if rank < world:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_PORT": port}
            found[f"{number} {name}"] = train_video.main(command(folder, name, size, settings))
            shutdown()
        (folder / f"done-{number}-{rank}").touch()
        while not all((folder / f"done-{number}-{other}").exists() for other in range(8)):
            time.sleep(0.02)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]))

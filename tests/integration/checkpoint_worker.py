"""Run by test_checkpoint_ranks.py, once a process: RANK PORTS FOLDER. On two ranks `zero` and `parts`, on the first one
alone `sat`; each prints what it found as JSON.

A real tiny network, with LoRA or without, is trained by DeepSpeed, saved, and continued in a second engine.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm import distributed
from sgm.training.checkpoints import load as ckpt_load
from sgm.training.checkpoints import weights as ckpt_weights
from sgm.training.checkpoints.load import find_resume, load_state
from sgm.training.checkpoints.partitions import load_ema_state, load_optimizer_state
from sgm.training.checkpoints.save import save_checkpoint
from sgm.training.checkpoints.state import CheckpointError, restore_rng
from sgm.training.optimizers.ema_adam import FusedEmaAdam
from sgm.training.optimizers.spec import parameter_groups
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.engine import start_engine
from sgm.util import instantiate_from_config
from sgm.weights.release import read_transformer
from tests.checkpoint_tiny import configuration, leftovers, load_module, state_of
from tests.dit_tiny import merged_state
from tests.training_tiny import network_section

CONFIG = configuration()
PREFIX = "model.diffusion_model."


class Host(nn.Module):
    """The network where the engine has it; its loss is a fixed function of what it predicts for random latents."""

    def __init__(self, lora: int | None, parts: int = 1):
        super().__init__()
        torch.manual_seed(0)
        section = network_section(lora)
        section["params"]["transformer_args"]["model_parallel_size"] = parts
        self.model = nn.Module()
        self.model.diffusion_model = instantiate_from_config(section, dtype="fp32")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():  # zero-initialised layers would hide errors
            if not parameter.any() and "pos_embed" not in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
            if lora:
                parameter.requires_grad_("matrix_" in name)

    @property
    def network(self) -> nn.Module:
        return self.model.diffusion_model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = torch.linspace(-1, 1, 12 * 32).view(1, 12, 32).expand(len(x), -1, -1)
        out = self.network(x, timesteps=torch.full((len(x),), 500), context=context)
        return (out - 0.5 * x).square().mean()


def latents(seed: int | None = None) -> torch.Tensor:
    """(1, 2, 16, 2, 4), from the global generator or a seed."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    return torch.randn(1, 2, 16, 2, 4, generator=generator)


def start(stage: int, lora: int | None) -> Any:
    section = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "contiguous_gradients": False, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-2}},
    }
    ranks = distributed.data_parallel_world_size()
    plan = plan_deepspeed(section, device_type="cpu", data_parallel_size=ranks)
    host = Host(lora)
    engine = start_engine(host, parameter_groups(host), plan, "cpu")
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = 1e-2
    return engine


def steps(engine: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = engine(latents())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    spread = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=spread):
        return {n: t.detach().clone() for n, t in engine.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- ZeRO --------------------------------------------------------------------------------------------------------


def zero_case(folder: Path, stage: int, lora: int | None) -> dict[str, Any]:
    engine = start(stage, lora)
    torch.manual_seed(100 + torch.distributed.get_rank())
    steps(engine, 2)
    before = whole_state(engine)
    options = {"lora_only": True, "full_merged": True} if lora else {}
    path = save_checkpoint(folder, engine, state_of(engine, 2), config=CONFIG, keep_last=1, **options)
    untouched = same(before, whole_state(engine))
    expected = steps(engine, 2)

    again = start(stage, lora)
    torch.manual_seed(0)
    state = load_state(path)
    load_optimizer_state(again, state.optimizer)
    load_ema_state(again, state.ema)
    restore_rng(state.rng)
    saved = {n: t for n, t in before.items() if not lora or "matrix_" in n}
    averaged = load_module(folder / "2-ema")
    return {
        "untouched": untouched,
        "weights": same(load_module(path), saved),
        "averaged differ": averaged.keys() == saved.keys() and not same(averaged, saved),
        "restored": same(whole_state(again), before),
        "losses": steps(again, 2) == expected,
        "end": same(whole_state(again), whole_state(engine)),
        "tidy": not leftovers(folder),
        **(lora_facts(folder, before, engine) if lora else {}),
    }


def lora_facts(folder: Path, before: dict[str, torch.Tensor], engine: Any) -> dict[str, Any]:
    """The merged network computes what the adapted one does; the adapter's own file holds its matrices and facts."""
    adapted, plain = Host(4), Host(None)
    adapted.load_state_dict(before)
    plain.load_state_dict(load_module(folder / "merged"))
    with torch.no_grad():
        gap = (adapted(latents(3)) - plain(latents(3))).abs().item()
        base = Host(None)(latents(3)).item()
    checkpoint = read_transformer(folder / "2" / "lora.safetensors")
    stored = {PREFIX + n: t for n, t in checkpoint.network.items()}
    content = torch.load(folder / "2" / "mp_rank_00_model_states.pt", weights_only=True)
    values = sum(t.nbytes for n, t in before.items() if "matrix_" in n)
    size = (folder / "2" / "mp_rank_00_model_states.pt").stat().st_size
    return {
        "merged equals adapted": gap < 1e-6 * abs(base),
        "merged differs from base": abs(plain(latents(3)).item() - base) > 1e-5 * abs(base),
        "adapter file": same(stored, {n: t for n, t in before.items() if "matrix_" in n}),
        "facts": [checkpoint.lora["rank"], checkpoint.lora["alpha"], checkpoint.lora["targets"], content["lora"]["rank"],
                  content["lora"]["targets"]],
        "small": size < values + 20_000,
    }  # fmt: skip


def failing_disks(folder: Path) -> dict[str, Any]:
    """One rank's disk fills up in the middle of gathering (ZeRO 3), and while writing its own state."""
    engine = start(3, 4)
    steps(engine, 1)
    save_checkpoint(folder, engine, state_of(engine, 1), config=CONFIG, lora_only=True)
    told = []
    for rank, place in ((0, "mp_rank_00"), (1, "rank_00001")):
        replace = os.replace

        def full(source, target, rank=rank, place=place, replace=replace):
            if torch.distributed.get_rank() == rank and place in str(target):
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        os.replace = full
        if rank == 0:  # already when the first of many parameters is written
            ckpt_weights.Deferred.on_cpu, whole = _no_space, ckpt_weights.Deferred.on_cpu
        try:
            save_checkpoint(folder, engine, state_of(engine, 2), config=CONFIG, lora_only=True)
        except CheckpointError as error:
            told.append(str(error))
        os.replace = replace
        if rank == 0:
            ckpt_weights.Deferred.on_cpu = whole
    intact = load_state(folder / "1").iteration == 1 and not (folder / "2").exists() and not leftovers(folder)
    torch.distributed.barrier()
    path = save_checkpoint(folder, engine, state_of(engine, 3), config=CONFIG, lora_only=True)
    return {"told": told, "intact": intact, "next": load_state(path).iteration}


def _no_space(self: Any) -> torch.Tensor:
    self.make()
    raise OSError(errno.ENOSPC, "No space left on device")


def searching(folder: Path) -> dict[str, Any]:
    """Rank 0 looks and tells the others."""
    if torch.distributed.get_rank() != 0:
        ckpt_load._newest = None  # calling it would fail
    found = find_resume(folder.parent, "toy", CONFIG)
    try:
        find_resume(folder, None, configuration(seed=2))
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    return {"found": found.name, "refused": refused}


def zero(folder: Path) -> dict[str, Any]:
    distributed.ensure_groups(1)
    results = {}
    for stage, lora in ((0, None), (2, 4), (3, None), (3, 4)):
        name = f"{stage} {'lora' if lora else 'full'}"
        results[name] = zero_case(folder / name, stage, lora)
    results["failing"] = failing_disks(folder / "failing")
    results["searching"] = searching(_toy_run(folder))
    return results


def _toy_run(folder: Path) -> Path:
    run = folder / "toy-01-01-00-00"
    engine = start(2, 4)
    steps(engine, 1)
    save_checkpoint(run, engine, state_of(engine, 1), config=CONFIG, lora_only=True)
    return run


# --- tensor parallelism ------------------------------------------------------------------------------------------


def parts(folder: Path) -> dict[str, Any]:
    """Two parts of one network: each writes its own file; adapter and merged weights come out whole."""
    from sgm.weights import assign_state
    from sgm.weights.tensor_parallel import partition_state

    whole = torch.load(folder / "whole.pt", weights_only=True)
    distributed.ensure_groups(2)
    rank = distributed.model_parallel_rank()
    host = Host(4, parts=2)
    assign_state(host.network, partition_state(whole, rank, 2), source="whole")
    optimizer = FusedEmaAdam([p for p in host.parameters() if p.requires_grad], lr=0.01)
    engine = SimpleNamespace(
        module=host, optimizer=optimizer, basic_optimizer=optimizer, zero_optimization_stage=lambda: 0, dp_world_size=1,
        global_steps=0, global_samples=0, micro_steps=0, skipped_steps=0,
    )  # fmt: skip
    run = folder / "run"
    path = save_checkpoint(run, engine, state_of(engine, 1), config=CONFIG, lora_only=True, full_merged=True)
    full = save_checkpoint(run, engine, state_of(engine, 2), config=CONFIG)
    merged = read_transformer(run / "merged").network
    expected = merged_state(whole)
    try:
        load_state(full)
        loads = True
    except CheckpointError:
        loads = False
    return {
        "files": sorted(p.name for p in path.iterdir()),
        "own part": same(load_module(full, rank), {PREFIX + n: t for n, t in partition_state(whole, rank, 2).items()}),
        "whole again": same(read_transformer(full).network, whole),
        "adapter": same(read_transformer(path / "lora.safetensors").network, _matrices(whole)),
        "adapter parts": same(read_transformer(path).network, _matrices(whole)),
        "merged": max((merged[n] - expected[n]).abs().max().item() for n in expected) < 1e-6,
        "model_config": json.loads((run / "model_config.json").read_text())["model_parallel_size"],
        "loads": loads,
    }


def _matrices(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if "matrix_" in n}


# --- SAT's own loader --------------------------------------------------------------------------------------------


def sat(folder: Path) -> dict[str, Any]:
    """`sat.training.model_io.load_checkpoint` on full, adapter-only, merged and averaged checkpoints."""
    from sat.training.model_io import load_checkpoint

    distributed.ensure_groups(1)
    engine = start(2, 4)
    steps(engine, 1)
    saved = whole_state(engine)
    for kind, options in (("full", {"full_merged": True}), ("adapter", {"lora_only": True})):
        save_checkpoint(folder / kind, engine, state_of(engine, 7), config=CONFIG, **options)

    def read(place: Path, lora: int | None, mode: str = "inference", force: bool = False) -> tuple[int, Host]:
        host = Host(lora)
        for parameter in host.parameters():
            parameter.data.zero_()
        args = Namespace(mode=mode, force_inference=force, force_train=force, no_load_rng=True, load=str(place))
        return load_checkpoint(host, args), host

    results: dict[str, Any] = {}
    for mode in ("inference", "finetune", "pretrain"):
        iteration, host = read(folder / "full", 4, mode)
        results[mode] = [iteration, same(host.state_dict(), saved)]
    iteration, host = read(folder / "adapter", 4, force=True)
    results["adapter"] = [iteration, same(_matrices(host.state_dict()), _matrices(saved))]
    iteration, host = read(folder / "full" / "merged", None)
    results["merged"] = [iteration, same(host.state_dict(), load_module(folder / "full" / "merged"))]
    (folder / "averaged").mkdir()
    (folder / "full" / "7-ema").rename(folder / "averaged" / "7")
    (folder / "averaged" / "latest").write_text("7")
    iteration, host = read(folder / "averaged", 4)
    results["averaged"] = [iteration, not same(host.state_dict(), saved) and host.state_dict().keys() == saved.keys()]
    library = load_file(folder / "adapter" / "7" / "lora.safetensors")
    results["library"] = [7, same(library, _matrices(saved))]
    return results


def main() -> None:
    torch.set_num_threads(1)
    rank, ports, folder = sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3])
    results = {}
    for work, port in zip((zero, parts), ports, strict=True):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
        distributed.init_distributed("cpu")
        results[work.__name__] = work(folder)
        torch.distributed.barrier()
        distributed.shutdown()
    if rank == "0":
        os.environ["WORLD_SIZE"] = "1"
        distributed.init_distributed("cpu")
        results["sat"] = sat(folder)
        distributed.shutdown()
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()

"""Checkpoints of a training run: SAT's layout for the weights, and beside it what an exact continuation needs.

By default the weights file holds the transformer alone, as the published files do (with the position table): text
encoder and VAE never change in training, and at 2B they would add 10 GB to every 3.4 GB checkpoint. `save_frozen`
writes the whole engine, as the original does; both kinds are read by SAT's `load_checkpoint` and by this project.
Weights files hold tensors and plain values only, so that `torch.load`'s safe default reads them; the random state,
which the original puts into them, lies in `resume/`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sgm import distributed
from sgm.config import RunConfig
from sgm.files import SaveError, remove, require_space
from sgm.training.checkpoints.folder import (
    MERGED,
    RESUME,
    RunRecord,
    announce,
    files_in,
    named_checkpoint,
    newest_of_experiment,
    prune,
    publish,
    settle,
    staging_folder,
)
from sgm.training.checkpoints.partitions import ema_weights
from sgm.training.checkpoints.same_run import resume_hash
from sgm.training.checkpoints.state import CheckpointError, TrainState, capture_rng, restore_rng
from sgm.training.checkpoints.weights import (
    Tensors,
    as_metadata,
    checkpoint_tensors,
    lora_facts,
    merged_tensors,
    write_together,
)
from sgm.weights import WeightsError, read_checkpoint
from sgm.weights.files import tensors_of
from sgm.weights.release import locate
from sgm.weights.save import save_pt, save_safetensors, size_of

__all__ = [
    "CheckpointError",
    "TrainState",
    "capture_rng",
    "find_resume",
    "load_module",
    "load_state",
    "restore_rng",
    "resume_hash",
    "save_checkpoint",
]

T = TypeVar("T")


# --- saving ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    engine: Any,
    state: TrainState,
    *,
    config: RunConfig[Any],
    lora_only: bool = False,
    keep_last: int | None = None,
    full_merged: bool = False,
    save_frozen: bool = False,
) -> Path:
    """Write the checkpoint of `state.iteration` into a run's folder; collective over all processes.

    It appears complete or not at all (see `checkpoints.folder`), and earlier ones stay as they are until it has.

    Args:
        folder: the run's folder, seen by every process.
        engine: DeepSpeed engine around a `SATVideoDiffusionEngine`.
        state: this rank's state; its tensors are written as they are now.
        lora_only: the adapter's matrices alone, also as `lora.safetensors`.
        keep_last: afterwards delete all but so many complete checkpoints; None keeps all.
        full_merged: also write `merged/`, the network with its adapter folded in.
        save_frozen: text encoder and VAE, too.
    Returns:
        The iteration's folder.
    Raises:
        CheckpointError: on every rank alike. Earlier checkpoints are intact then.
    """
    job = _Job.of(Path(folder), engine, state, config, lora_only)
    with job.together():
        if job.rank == 0:
            settle(job.run)
            for name in ("main", f"main/{RESUME}"):
                (job.staging / name).mkdir(parents=True)
    with job.together():
        if not job.staging.is_dir():
            raise CheckpointError(f"{job.run} is not the same folder on all machines; args.save must be a shared one.")
        tensors = checkpoint_tensors(job.module, lora_only=lora_only, save_frozen=save_frozen)
        merged = merged_tensors(job.module) if full_merged else None
        needed = job.size(tensors, merged, state)
    total = sum(_gather(needed))
    with job.together():
        if job.rank == 0:
            require_space(job.run, total)
    with job.together():
        job.write_weights("main", tensors, state)
    if lora_only:
        job.write_adapter(tensors)
    if merged is not None:
        with job.together():
            job.write_weights(MERGED, merged, state, with_lora=False)
    if state.ema is not None:
        with job.together(), ema_weights(engine):
            job.write_weights("ema", tensors, state)
    with job.together():
        save_pt(job.staging / "main" / RESUME / _resume_name(job.rank), state.as_dict())
    with job.together():
        if job.rank == 0:
            job.finish(keep_last)
    return job.run / str(state.iteration)


@dataclass(frozen=True)
class _Job:
    """One save, as seen by one process."""

    run: Path
    module: nn.Module
    iteration: int
    config_hash: str
    lora: dict[str, Any] | None
    lora_only: bool
    rank: int
    world_size: int
    zero_stage: int

    @classmethod
    def of(cls, run: Path, engine: Any, state: TrainState, config: RunConfig[Any], lora_only: bool) -> _Job:
        module = getattr(engine, "module", engine)
        rank, world_size = _place()
        stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
        facts = lora_facts(module, getattr(config.args, "load", None))
        return cls(run, module, state.iteration, resume_hash(config), facts, lora_only, rank, world_size, int(stage))

    @property
    def staging(self) -> Path:
        return staging_folder(self.run, self.iteration)

    @property
    def writes(self) -> bool:
        """Does this process write its tensor-parallel part's weights?"""
        return distributed.data_parallel_rank() == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that has succeeded only if it has on every rank.

        Raises:
            CheckpointError: on every rank, with what the first one to fail said; what was staged is deleted.
        """
        failure: Exception | None = None
        try:
            yield
        except (SaveError, CheckpointError, WeightsError, OSError) as error:
            failure = error
        advice = " (args.keep_last and args.save say how many checkpoints are kept, and where.)"
        reports = _gather(f"{failure}{advice if isinstance(failure, SaveError) else ''}" if failure else None)
        told = [f"{'' if self.world_size == 1 else f'rank {r}: '}{text}" for r, text in enumerate(reports) if text]
        if told:
            if self.rank == 0:
                with suppress(OSError):  # the next save tries again
                    remove(self.staging)
            _gather(None)  # nobody goes on before that
            raise CheckpointError(told[0]) from failure

    def size(self, tensors: Tensors, merged: Tensors | None, state: TrainState) -> int:
        """Bytes that this process is going to write, but for small files."""
        weights = size_of(dict(tensors)) * (2 if state.ema is not None else 1) + size_of(dict(merged or {}))
        adapter = size_of(dict(tensors)) if self.lora_only else 0
        return (weights + adapter if self.writes else 0) + size_of(state.as_dict())

    def write_weights(self, part: str, tensors: Tensors, state: TrainState, with_lora: bool = True) -> None:
        """`part`/mp_rank_XX_model_states.pt of this process's tensor-parallel part."""
        path = self.staging / part / f"mp_rank_{distributed.model_parallel_rank():02d}_model_states.pt"
        facts: dict[str, Any] = {
            "iteration": state.iteration,
            "client_lr_scheduler": state.schedule,
            "global_steps": state.iteration,
            "global_samples": state.consumed_samples,
            "skipped_steps": state.skipped_steps,
            "dp_world_size": distributed.data_parallel_world_size(),
            "mp_world_size": distributed.model_parallel_world_size(),
            "config_hash": self.config_hash,
        }
        if with_lora and self.lora:
            facts["lora"] = self.lora

        def write(whole: Tensors) -> None:
            path.parent.mkdir(exist_ok=True)
            save_pt(path, {"module": OrderedDict(whole), **facts})

        write_together(tensors, write if self.writes else None, collective=self.zero_stage == 3)

    def write_adapter(self, tensors: Tensors) -> None:
        """lora.safetensors: the whole adapter, put together from the tensor-parallel parts."""
        own: dict[str, Tensor] = {}
        with self.together():
            collect = (lambda whole: own.update({n: t.on_cpu() for n, t in whole.items()})) if self.writes else None
            write_together(tensors, collect, collective=self.zero_stage == 3)
        parts = [own]
        if distributed.model_parallel_world_size() > 1:
            found = _gather((distributed.model_parallel_rank(), own))
            parts = [part for _, part in sorted((p for p in found if p[1]), key=lambda p: p[0])]
        with self.together():
            if self.rank == 0:
                from sgm.weights.tensor_parallel import merge_partitions

                facts = {"format": "pt", "iteration": str(self.iteration), **as_metadata(self.lora or {})}
                save_safetensors(self.staging / "main" / "lora.safetensors", merge_partitions(parts), facts)

    def finish(self, keep_last: int | None) -> None:
        """All files are there: record them, let the checkpoint take its place, delete old ones."""
        main = self.staging / "main"
        RunRecord(
            iteration=self.iteration,
            saved_at=time.time(),
            config_hash=self.config_hash,
            world_size=self.world_size,
            model_parallel_size=distributed.model_parallel_world_size(),
            zero_stage=self.zero_stage,
            lora_only=self.lora_only,
            files=files_in(main),
        ).write(main)
        publish(self.run, self.staging, self.iteration)
        announce(self.run, self.iteration, type(self.module).__name__, distributed.model_parallel_world_size())
        if keep_last is not None:
            prune(self.run, keep_last, self.iteration)


def _resume_name(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


# --- loading -----------------------------------------------------------------------------------------------------


def find_resume(
    save_root: str | Path,
    experiment_name: str | None,
    config_hash: str | None,
    explain: Callable[[Path], list[str]] | None = None,
) -> Path | None:
    """The iteration folder to go on from, found by rank 0 and told to all.

    Args:
        save_root: folder of runs; or, without `experiment_name`, one run's or one iteration's folder.
        experiment_name: look at the runs `save_root/experiment_name-*`; the one saved last wins.
        config_hash: what `resume_hash` gives for this run; None takes a checkpoint of any.
        explain: in what a run's folder differs from this run, for the error; see `sgm.training.checkpoints.same_run`.
    Returns:
        None where a search finds nothing. Incomplete checkpoints are named in the log and passed over.
    Raises:
        CheckpointError: the folder that was named holds no complete checkpoint of this configuration.
    """
    root = Path(save_root).expanduser()

    def look() -> tuple[str | None, str | None]:
        try:
            if experiment_name is None:
                return str(named_checkpoint(root, config_hash, explain)), None
            found = newest_of_experiment(root, experiment_name, config_hash)
            return (str(found) if found else None), None
        except (CheckpointError, OSError) as error:
            return None, str(error)

    found, problem = distributed.from_first(look)
    if problem:
        raise CheckpointError(problem)
    return Path(found) if found else None


def load_state(
    path: str | Path, rank: int | None = None, world: int | None = None, zero_stage: int | None = None
) -> TrainState:
    """This rank's training state from an iteration folder; tensors lie in the mapped file.

    Args:
        rank, world: default to those of the running process group.
        zero_stage: checked if given.
    Raises:
        CheckpointError: incomplete, damaged or unsafe; or of another number of processes, parts or ZeRO stage.
    """
    path = Path(path)
    here = _place()
    rank = here[0] if rank is None else rank
    world = here[1] if world is None else world
    record = RunRecord.read(path)
    now: dict[str, int | None] = {
        "world_size": world,
        "model_parallel_size": distributed.model_parallel_world_size(),
        "zero_stage": zero_stage,
    }
    other = [n for n, value in now.items() if value is not None and value != getattr(record, n)]
    if other:
        listed = ", ".join(f"{name} {getattr(record, name)} (now {now[name]})" for name in other)
        raise CheckpointError(
            f"{path} was saved with {listed}, and its optimizer state is cut up accordingly: resume with the same "
            f"set-up, or start a new run from its weights (args.load: {path})."
        )
    file = path / RESUME / _resume_name(rank)
    try:
        content: Mapping[str, Any] = read_checkpoint(file)
    except WeightsError as error:
        raise CheckpointError(f"the training state cannot be used: {error}") from error
    state = TrainState.from_dict(content, file)
    if state.iteration != record.iteration:
        raise CheckpointError(f"{file} is of iteration {state.iteration}, not {record.iteration}: files were mixed up.")
    return state


def load_module(path: str | Path, mp_rank: int | None = None) -> dict[str, Tensor]:
    """The weights that a checkpoint holds for one tensor-parallel part, under the engine's names, mapped from the file.

    Args:
        path: iteration folder, run folder (then what `latest` names), or file.
        mp_rank: which part; default: this process's.
    Raises:
        WeightsError: absent, damaged or unsafe.
        CheckpointError: it has no such part.
    """
    files, _ = locate(path)
    part = distributed.model_parallel_rank() if mp_rank is None else mp_rank
    if part >= len(files):
        raise CheckpointError(f"{path} has {len(files)} tensor-parallel parts; part {part} was asked for.")
    content = read_checkpoint(files[part])
    module = content.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{files[part]} is no SAT checkpoint: it has no entry 'module'.")
    return tensors_of(module)


# --- processes ---------------------------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not _many():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gather(value: T) -> list[T]:
    """`value` of every rank, in order, on every rank."""
    if not _many():
        return [value]
    held: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, value)
    return held

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm import distributed
from sgm.config import RunConfig
from sgm.distributed import gather, own_rank
from sgm.files import SaveError, advising, remove, require_space, write_failed, write_text
from sgm.training.checkpoints.folder import (
    MERGED,
    RESUME,
    RunRecord,
    announce,
    files_in,
    prune,
    publish,
    recover,
    staging_folder,
    state_file,
)
from sgm.training.checkpoints.load import CONFIG_FILE, SECTIONS, identity
from sgm.training.checkpoints.partitions import ema_weights
from sgm.training.checkpoints.state import CheckpointError, TrainState
from sgm.training.checkpoints.weights import (
    EARLIER_ONES,
    FEW_STEPS,
    Tensors,
    as_metadata,
    checkpoint_tensors,
    lora_facts,
    merged_tensors,
    write_together,
)
from sgm.training.setup.engine import TrainingEngine
from sgm.weights import WeightsError
from sgm.weights.save import require_finite, save_pt, save_safetensors, size_of
from sgm.weights.tensor_parallel import merge_partitions


def save_checkpoint(
    folder: str | Path,
    engine: TrainingEngine,
    state: TrainState,
    *,
    config: RunConfig[Any],
    lora_only: bool = False,
    clips_per_step: int = 0,
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
        clips_per_step: of all processes and micro-batches; 0 where that is not known.
        keep_last: afterwards delete all but so many complete checkpoints; None keeps all.
        full_merged: also write `merged/`, the network with its adapter folded in.
        save_frozen: text encoder and VAE, too.
    Returns:
        The iteration's folder.
    Raises:
        CheckpointError: on every rank alike; also where weights or state hold NaN or infinity. Earlier checkpoints are
            intact then.
    """
    facts = lora_facts(engine.module, config.args.load)
    job = _Save(Path(folder), engine, state, config, facts, lora_only, *own_rank())
    with job.together():
        if job.rank == 0:
            if not job.run.is_dir():  # deleted, or its disk is gone: then what it lies in is gone, too
                job.run.mkdir()
                write_text(job.run / CONFIG_FILE, config.as_yaml())
            recover(job.run)
            for name in ("main", f"main/{RESUME}"):
                (job.staging / name).mkdir(parents=True)
    with job.together():
        if not job.staging.is_dir():
            raise CheckpointError(f"{job.run} is not the same folder on all machines; args.save must be a shared one.")
        tensors = checkpoint_tensors(engine.module, lora_only=lora_only, save_frozen=save_frozen)
        merged = merged_tensors(engine.module) if full_merged else None
        require_finite(state.as_dict(), "the training state", EARLIER_ONES)
        needed = job.size(tensors, merged)
    total = sum(gather(needed))
    with job.together():
        if job.rank == 0:
            require_space(job.run, total)
    with job.together():
        job.write_weights("main", tensors)
    if lora_only:
        job.write_adapter(tensors)
    if merged is not None:
        with job.together():
            job.write_weights(MERGED, merged, with_lora=False)
    if state.ema is not None:
        with job.together(), ema_weights(engine):
            job.write_weights("ema", tensors)
    with job.together():
        save_pt(state_file(job.staging / "main", job.rank), state.as_dict())
    with job.together():
        if job.rank == 0:
            job.finish(keep_last, clips_per_step, identity(config))
    return job.run / str(state.iteration)


@dataclass(frozen=True)
class _Save:
    """One save, as seen by one process."""

    run: Path
    engine: TrainingEngine
    state: TrainState
    config: RunConfig[Any]
    lora: dict[str, Any]
    lora_only: bool
    rank: int
    world_size: int

    @property
    def staging(self) -> Path:
        return staging_folder(self.run, self.state.iteration)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return int(self.engine.zero_optimization_stage())

    @property
    def writes(self) -> bool:
        """Does this process write its tensor-parallel part's weights?"""
        return distributed.replica_rank() == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that has succeeded only if it has on every rank.

        Raises:
            CheckpointError: on every rank, with what the first one to fail said; what was staged is deleted.
        """
        failure: Exception | None = None
        try:
            with advising("(args.keep_last and args.save say how many checkpoints are kept, and where.)"):
                yield
        except (SaveError, CheckpointError, WeightsError) as error:
            failure = error
        except OSError as error:
            failure = write_failed(Path(error.filename or self.run), error)
        reports = gather(str(failure) if failure else None)
        failures = [f"{'' if self.world_size == 1 else f'rank {r}: '}{text}" for r, text in enumerate(reports) if text]
        if failures:
            if self.rank == 0:
                with suppress(OSError):  # the next save tries again
                    remove(self.staging)
            gather(None)  # nobody goes on before that
            raise CheckpointError(failures[0]) from failure

    def size(self, tensors: Tensors, merged: Tensors | None) -> int:
        """Bytes that this process is going to write, but for small files."""
        weights = size_of(dict(tensors)) * (2 if self.state.ema is not None else 1) + size_of(dict(merged or {}))
        adapter = size_of(dict(tensors)) if self.lora_only else 0
        return (weights + adapter if self.writes else 0) + size_of(self.state.as_dict())

    def write_weights(self, part: str, tensors: Tensors, with_lora: bool = True) -> None:
        """`part`/mp_rank_XX_model_states.pt of this process's tensor-parallel part."""
        state = self.state
        path = self.staging / part / f"mp_rank_{distributed.model_parallel_rank():02d}_model_states.pt"
        facts: dict[str, Any] = {
            "iteration": state.iteration,
            "client_lr_scheduler": state.schedule,
            "global_steps": state.iteration,
            "global_samples": state.consumed_samples,
            "skipped_steps": state.skipped_steps,
            "dp_world_size": distributed.replica_count(),
            "mp_world_size": distributed.model_parallel_world_size(),
            "config_hash": self.config.hash(SECTIONS),
        }
        if said := {name: fact for name, fact in self.lora.items() if with_lora or name == FEW_STEPS}:
            facts["lora"] = said

        def write(whole: Tensors) -> None:
            path.parent.mkdir(exist_ok=True)
            save_pt(path, {"module": OrderedDict(whole), **facts})

        write_together(tensors, write if self.writes else None, collective=self.stage == 3)

    def write_adapter(self, tensors: Tensors) -> None:
        """lora.safetensors: the whole adapter, put together from the tensor-parallel parts."""
        own: dict[str, Tensor] = {}
        with self.together():
            collect = (lambda whole: own.update({n: t.on_cpu() for n, t in whole.items()})) if self.writes else None
            write_together(tensors, collect, collective=self.stage == 3)
        parts = [own]
        if distributed.model_parallel_world_size() > 1:
            found = gather((distributed.model_parallel_rank(), own))
            parts = [part for _, part in sorted((p for p in found if p[1]), key=lambda p: p[0])]
        with self.together():
            if self.rank == 0:
                facts = {"format": "pt", "iteration": str(self.state.iteration), **as_metadata(self.lora)}
                save_safetensors(self.staging / "main" / "lora.safetensors", merge_partitions(parts), facts)

    def finish(self, keep_last: int | None, clips_per_step: int, keys: dict[str, Any]) -> None:
        """All files are there: record them, let the checkpoint take its place, delete old ones."""
        main = self.staging / "main"
        RunRecord(
            iteration=self.state.iteration,
            saved_at=time.time(),
            config_hash=self.config.hash(SECTIONS),
            world_size=self.world_size,
            model_parallel_size=distributed.model_parallel_world_size(),
            zero_stage=self.stage,
            lora_only=self.lora_only,
            files=files_in(main),
            clips_per_step=clips_per_step,
            identity=keys,
            sequence_parallel_size=distributed.clip_world_size(),
        ).write(main)
        iteration, parts = self.state.iteration, distributed.model_parallel_world_size()
        publish(self.run, self.staging, iteration)
        announce(self.run, iteration, type(self.engine.module).__name__, parts)
        if keep_last is not None:
            prune(self.run, keep_last, iteration)

"""Finding the checkpoint to go on from, and reading a rank's training state from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sgm import distributed
from sgm.training.checkpoints.folder import RunRecord, named_checkpoint, newest_of_experiment, state_file
from sgm.training.checkpoints.ranks import own_rank
from sgm.training.checkpoints.state import CheckpointError, TrainState
from sgm.weights import WeightsError, read_checkpoint


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


def load_state(path: Path, zero_stage: int | None = None) -> TrainState:
    """This rank's training state from an iteration folder; tensors lie in the mapped file.

    Args:
        zero_stage: checked if given.
    Raises:
        CheckpointError: incomplete, damaged or unsafe; or of another number of processes, parts or ZeRO stage.
    """
    rank, world = own_rank()
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
    file = state_file(path, rank)
    try:
        content: Mapping[str, Any] = read_checkpoint(file)
    except WeightsError as error:
        raise CheckpointError(f"the training state cannot be used: {error}") from error
    state = TrainState.from_dict(content, file)
    if state.iteration != record.iteration:
        raise CheckpointError(f"{file} is of iteration {state.iteration}, not {record.iteration}: files were mixed up.")
    return state

"""Process groups, ranks and random state: one place that talks to torch.distributed, DeepSpeed and SAT's `mpu`.

Importing this module costs nothing beyond torch; DeepSpeed and SAT are imported by the functions that need them.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from sgm.cli import flush_output
from sgm.errors import SgmError

T = TypeVar("T")

# After so long a collective of training counts as hung; it has to outlast a checkpoint written to a slow drive.
# DEEPSPEED_TIMEOUT (minutes) overrides it. What takes longer, before training, is waited for with `wait_for_all`.
COLLECTIVE_LIMIT = timedelta(hours=1)


@dataclass(frozen=True)
class ClipGroup:
    """Processes that train on the same clip, each on a share of it: neighbours among those that hold the same weights.

    Attributes:
        size: how many. group: of them; None where this process is alone. first: its first one's rank in the run.
    """

    size: int = 1
    group: torch.distributed.ProcessGroup | None = None
    first: int = 0


# Of the process groups that there are: how clips are shared, and numbers for `wait_for_all`.
_present = SimpleNamespace(clip=ClipGroup(), meetings=itertools.count())


class DistributedError(SgmError):
    """The launch environment, or a request for process groups, is not consistent. The message says in what."""


@dataclass(frozen=True)
class DistInfo:
    """Where this process stands: `rank` of `world_size`, `local_rank` on its node, and the device it should use."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def init_distributed(device_type: str | None = None) -> DistInfo:
    """Make the default process group, once, from what torchrun or the DeepSpeed launcher put into the environment.

    One process needs no launcher: it gets a group of its own on an in-memory store, so there is no address to agree on
    or to find taken. Several go through `deepspeed.init_distributed`, which sets up DeepSpeed's communication as well.

    Args:
        device_type: "cuda" or "cpu"; None takes CUDA where there is one.
    Raises:
        DistributedError: RANK, WORLD_SIZE, LOCAL_RANK or MASTER_* are missing or do not fit each other.
    """
    kind = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise DistributedError(f"device_type {kind!r} is not supported; choose 'cuda' or 'cpu'.")
    rank, world_size, local_rank = _launch_environment()
    if torch.distributed.is_initialized():
        return DistInfo(*own_rank(), local_rank, _own_device(kind, local_rank))
    device = _own_device(kind, local_rank)
    backend = "nccl" if kind == "cuda" else "gloo"
    if world_size == 1:
        store, hook = torch.distributed.HashStore(), sys.excepthook
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        sys.excepthook = hook  # PyTorch's puts "[rank0]:" before each line of a traceback
        atexit.register(shutdown)  # else NCCL warns at the end of whatever program this is
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise DistributedError(
                f"{' and '.join(missing)} not set for a run of several processes; start with torchrun or the DeepSpeed "
                "launcher, which set them."
            )
        with quiet_libraries():
            prepare_deepspeed(kind)
            import deepspeed

            limit = {} if "DEEPSPEED_TIMEOUT" in os.environ else {"timeout": COLLECTIVE_LIMIT}
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, **limit)
    return DistInfo(rank, world_size, local_rank, device)


def prepare_deepspeed(device_type: str) -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which on a CPU needs a C++ compiler.

    Call it before anything of DeepSpeed is initialised; on CUDA it does nothing.
    """
    if device_type == "cpu":
        with quiet_libraries():
            import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ensure_groups(model_parallel_size: int = 1) -> None:
    """Make SAT's data- and model-parallel groups (and the process group below them) unless they exist.

    Raises:
        DistributedError: the number of processes is no multiple of `model_parallel_size`, or groups of another size
            exist already; SAT cannot change the size within a process.
    """
    if not torch.distributed.is_initialized():
        init_distributed()
    world_size = torch.distributed.get_world_size()
    if model_parallel_size < 1 or world_size % model_parallel_size:
        raise DistributedError(
            f"model_parallel_size {model_parallel_size} does not divide the {world_size} processes of this run; "
            f"start a multiple of {model_parallel_size} processes "
            f"(NPROC={model_parallel_size} bash finetune.sh) or lower it."
        )
    with quiet_libraries():
        from sat import mpu

        if not mpu.model_parallel_is_initialized():
            mpu.initialize_model_parallel(model_parallel_size)
    if mpu.get_model_parallel_world_size() != model_parallel_size:
        raise DistributedError(
            f"model_parallel_size {model_parallel_size} was asked for, but groups of "
            f"{mpu.get_model_parallel_world_size()} exist already in this process; use one size per run."
        )


def shutdown() -> None:
    """Drop SAT's groups and the process group. Does nothing where there are none."""
    share_clips(ClipGroup())
    _present.meetings = itertools.count()
    initialize = _sat_groups()
    if initialize is not None:
        initialize.destroy_model_parallel()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # DeepSpeed keeps groups of its own, which only its own call forgets: a later run here would use them.
        deepspeed_comm = sys.modules.get("deepspeed.comm")
        if deepspeed_comm is not None and deepspeed_comm.is_initialized():
            deepspeed_comm.destroy_process_group()
        else:
            torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with `code`: one of several ranks at once, since an orderly end of NCCL waits for the others."""
    flush_output()
    if own_rank()[1] > 1:
        os._exit(code)
    sys.exit(code)


def share_clips(group: ClipGroup) -> None:
    """From here on the processes of `group` have the same data: in number, order and random draws they are one."""
    _present.clip = group


def data_parallel_rank() -> int:
    """Rank among those that hold different data, each of them one process or several that share a clip; 0 where
    nothing is initialised.
    """
    return replica_rank() // clip_world_size()


def data_parallel_world_size() -> int:
    """How many hold different data; 1 where nothing is initialised."""
    return replica_count() // clip_world_size()


def clip_rank() -> int:
    """Which share of a clip this process has; 0 where it has all of it."""
    return replica_rank() % clip_world_size()


def clip_world_size() -> int:
    """Processes that share a clip."""
    clip: ClipGroup = _present.clip
    return clip.size


def replica_rank() -> int:
    """Rank among the processes that hold the same weights, over which gradients are averaged and ZeRO cuts its state;
    0 where nothing is initialised.
    """
    groups = _sat_groups()
    return groups.get_data_parallel_rank() if groups is not None else own_rank()[0]


def replica_count() -> int:
    """Number of processes that hold the same weights; 1 where nothing is initialised."""
    groups = _sat_groups()
    return groups.get_data_parallel_world_size() if groups is not None else own_rank()[1]


def model_parallel_rank() -> int:
    """Which part of each split weight this process holds; 0 where nothing is split."""
    groups = _sat_groups()
    return groups.get_model_parallel_rank() if groups is not None else 0


def model_parallel_world_size() -> int:
    """Into how many parts the weights are split; 1 where nothing is initialised."""
    groups = _sat_groups()
    return groups.get_model_parallel_world_size() if groups is not None else 1


def wait_for_all() -> None:
    """Return when every rank has come here, however long that takes.

    Not a barrier: that has a limit, within which a rank that looks through all clips or fills the last share of a cache
    need not arrive, and it would not hear a signal. A rank that dies is noticed by the launcher.
    """
    _, ranks = own_rank()
    if ranks == 1:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"sgm/meeting/{next(_present.meetings)}"
    if store.add(key, 1) == ranks:
        store.set(f"{key}/all", "here")
    while not store.check([f"{key}/all"]):
        time.sleep(0.05)


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, however long it takes, on every rank; without process groups what this process makes."""
    if not torch.distributed.is_initialized():
        return make()
    held = [make() if torch.distributed.get_rank() == 0 else None]
    wait_for_all()
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(held)
    return held[0]  # type: ignore[return-value]


def own_rank() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where nothing is initialised."""
    ready = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)


def gather(value: T) -> list[T]:
    """`value` of every rank, in order, on every rank."""
    held = [value] * own_rank()[1]
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(held, value)
    return held


def broadcast_in_model_parallel(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` by that of the first process of the model-parallel group, and return it.

    A tensor on a group of one comes back untouched.
    """
    groups = _sat_groups()
    if groups is None or groups.get_model_parallel_world_size() == 1:
        return tensor
    return _overwrite(tensor, groups.get_model_parallel_src_rank(), groups.get_model_parallel_group())


def same_for_clip(tensor: Tensor) -> Tensor:
    """Overwrite `tensor` by that of the first of all processes that compute the same clip, and return it.

    Parts of one model, and shares of one clip, must see the same noise and timesteps.
    """
    tensor = broadcast_in_model_parallel(tensor)
    clip: ClipGroup = _present.clip
    return tensor if clip.group is None else _overwrite(tensor, clip.first, clip.group)


def _overwrite(tensor: Tensor, source: int, group: torch.distributed.ProcessGroup) -> Tensor:
    sent = tensor.detach().contiguous()
    torch.distributed.broadcast(sent, source, group=group)
    with torch.no_grad():
        return tensor.copy_(sent)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Put back the state of every random generator (Python, NumPy, torch, CUDA) and the cuDNN switches afterwards.

    Code of libraries that seeds, draws or switches cuDNN on the way can then be called without a trace.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = switches


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back what SAT and DeepSpeed log below ERROR (SAT to stderr, DeepSpeed to stdout) inside the block.

    A filter, not a level: both set the level of their loggers when they are imported.
    """
    loggers = [logging.getLogger(name) for name in ("sat", "DeepSpeed")]
    for logger in loggers:
        logger.addFilter(_errors_only)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_errors_only)


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _launch_environment() -> tuple[int, int, int]:
    """(rank, world_size, local_rank) from the environment; (0, 1, 0) where no launcher set them."""
    try:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise DistributedError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}.") from error
    if world_size > 1 and not {"RANK", "LOCAL_RANK"} <= set(os.environ):
        raise DistributedError(
            f"WORLD_SIZE is {world_size} but RANK or LOCAL_RANK is not set; start with torchrun or the DeepSpeed "
            "launcher, or unset WORLD_SIZE to run one process."
        )
    if not 0 <= rank < world_size:
        raise DistributedError(f"RANK {rank} is outside 0..{world_size - 1} (WORLD_SIZE {world_size}).")
    return rank, world_size, local_rank


def _own_device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise DistributedError(f"LOCAL_RANK {local_rank} asks for GPU {local_rank}, but this machine shows {count}.")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _sat_groups() -> ModuleType | None:
    """SAT's module of groups if SAT was imported and its groups exist, else None. Never imports SAT by itself."""
    groups = sys.modules.get("sat.mpu.initialize")
    return groups if groups is not None and groups.model_parallel_is_initialized() else None

"""What one rank needs to go on exactly where it was: one explicit record, as tensors and plain types."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm.errors import SgmError


class CheckpointError(SgmError):
    """A checkpoint cannot be written or used; the message says which and what to do. Raised alike on every rank."""


@dataclass
class TrainState:
    """This rank's state after `iteration`. Values are tensors and plain types, so that reading them runs no code.

    Attributes:
        iteration: optimizer steps taken or skipped.
        consumed_samples: clips used so far by all ranks together.
        scaler: loss scale and its counters; None where the loss is not scaled.
        skipped_steps: steps without an update (NaN, overflow) among `iteration`.
        optimizer: this rank's partition of masters and moments.
        ema: this rank's partition of the averaged weights; None where there are none.
        rng: this rank's random generators, from `capture_rng`.
    """

    iteration: int
    consumed_samples: int
    sampler: Mapping[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    skipped_steps: int
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None
    rng: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; tensors are not copied."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: object) -> TrainState:
        """The record from what a file held.

        Raises:
            CheckpointError: fields are missing, unknown, or no mapping where one is needed.
        """
        names = {f.name for f in fields(cls)}
        if content.keys() != names:
            odd = ", ".join(sorted(map(str, content.keys() ^ names)))
            raise CheckpointError(f"{source} is no training state of this version: the entries {odd} differ.")
        mappings = [n for n in ("sampler", "schedule", "optimizer", "rng") if not isinstance(content[n], Mapping)]
        counts = [n for n in ("iteration", "consumed_samples", "skipped_steps") if not isinstance(content[n], int)]
        if mappings or counts:
            raise CheckpointError(f"{source} is no training state: {', '.join(mappings + counts)} of the wrong type.")
        return cls(**content)


# --- random generators -------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> dict[str, Any]:
    """State of this rank's generators: Python, NumPy, torch on the CPU and on the current GPU, and SAT's tracker."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    if kind != "MT19937":
        raise CheckpointError(f"NumPy's global generator is {kind}; only its default MT19937 can be stored.")
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    tracker = _rng_tracker()
    if tracker is not None and tracker.get_states():
        state["tracker"] = {name: value.clone() for name, value in tracker.get_states().items()}
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what `capture_rng` gave.

    Raises:
        CheckpointError: the state is damaged, or of a GPU while this run has none.
    """
    if "cuda" in state and not torch.cuda.is_available():
        raise CheckpointError("the stored random state is of a run on a GPU; this one has no GPU to continue it on.")
    try:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
        torch.set_rng_state(state["torch"].clone())
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].clone())
        tracked = {name: value.clone() for name, value in state.get("tracker", {}).items()}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"the stored random state is damaged: {error!r}") from error
    tracker = _rng_tracker()
    if tracker is not None and (tracked or tracker.get_states()):
        tracker.set_states(tracked)
    elif tracked:
        raise CheckpointError("the stored random state has a tensor-parallel part, but this run has no tracker for it.")


def _rng_tracker() -> Any:
    """DeepSpeed's tracker of tensor-parallel generators, which SAT's dropout uses; None where it was not imported."""
    module = sys.modules.get("deepspeed.runtime.activation_checkpointing.checkpointing")
    return module.get_cuda_rng_tracker() if module is not None else None

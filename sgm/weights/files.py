"""Safe, memory-mapped reading of one weight file (`.pt` zip archives, legacy `.pt`, `.safetensors`)."""

from __future__ import annotations

import _codecs
import hashlib
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgm.weights.checksums import (
    AGAIN,
    DamagedError,
    WeightsError,
    WeightsNotFoundError,
    check,
    read_json,
    reading,
    verifying,
)

_BLOCK = 1 << 16  # bytes of which a file's identity is made, at so many places
_LOOKS, _PAUSE = 20, 0.2  # how often files are looked up that go away, seconds in between

T = TypeVar("T")


def while_files_change(read: Callable[[], T]) -> T:
    """What `read` gives, once more where its files are deleted meanwhile, as a training run does with earlier ones.

    Raises:
        WeightsNotFoundError: that of the first time, where nothing else is found afterwards.
    """
    gone: list[FileNotFoundError] = []
    while len(gone) < _LOOKS and (len(gone) < 2 or str(gone[-1]) != str(gone[-2])):
        if gone:
            time.sleep(_PAUSE)
        try:
            return read()
        except FileNotFoundError as error:
            gone.append(error)
    if isinstance(gone[0], WeightsNotFoundError):
        raise gone[0]
    raise _absent(gone[0].filename) from gone[0]


def _absent(path: str | Path) -> WeightsNotFoundError:
    return WeightsNotFoundError(
        f"no weight file at {path}. Check the path. If a training run has deleted it meanwhile (args.keep_last), name "
        "the run's folder in place of an iteration's, or copy the checkpoint first."
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it and without copying tensors that can be memory-mapped.

    Args:
        path: a `.safetensors` file, or a `.pt`/`.bin`/`.ckpt`/`.pth` file written by `torch.save`.
    Returns:
        The stored mapping. Tensors lie on the CPU, mapped from the file where its format allows (zip-format `.pt`
        and safetensors); they keep the file's dtype.
    Raises:
        WeightsNotFoundError: no such file.
        WeightsError: damaged (by its checksums, too; within `verifying` at that block's end), not a checkpoint, not a
            mapping, or it holds pickled objects other than tensors, plain Python values and NumPy arrays
            (random-generator states of old checkpoints).
    """
    path = Path(path)
    if not path.exists():
        raise _absent(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, a weight file (.pt or .safetensors) is needed here.")
    try:
        with verifying() as submit:
            check(path, submit)
            content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (FileNotFoundError, DamagedError) as error:  # the latter in PyTorch's words for the former
        if path.exists():
            raise
        raise _absent(path) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors.")
    return dict(content)


def shards_of(index: Path) -> tuple[dict[str, str], list[Path]]:
    """(tensor name -> file name, the files, there or not) of an index of shards.

    Raises:
        WeightsError: no such index, or one that names files elsewhere.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise WeightsError(f"{index} is no index of weight shards: no weight_map; {AGAIN}.")
    names = sorted(set(placed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{index} names the shard {outside[0]!r}, which lies outside its folder; not read.")
    return placed, [index.parent / name for name in names]


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a mapping that are tensors."""
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with reading(path), safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise DamagedError(path, error) from error


def _read_pickle(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        # the object that torch's restricted unpickler would not make
        named = re.search(r"GLOBAL `?([\w.]+)|(?:function|type|class) `?([\w.]+\.[\w.]+)", str(error))
        if named is None:
            raise DamagedError(path, "it is not a file that torch.save wrote with tensors alone") from error
        refused = named[1] or named[2]
        raise WeightsError(
            f"{path} was not loaded: it contains the pickled object {refused!r}, and unpickling such an object can run "
            "code. Only tensors, plain Python values and NumPy arrays are read. If you trust the file, re-save its "
            "weights alone (torch.save(state_dict) or safetensors) and use that file."
        ) from error
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged byte stream can make an unpickler raise anything
        raise DamagedError(path, error) from error


def _numpy_globals() -> list[Any]:
    """What the NumPy random state in older checkpoints needs: array reconstruction under NumPy 1's and 2's names."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct, scalar

    named = [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    named += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    dtypes = [type(np.dtype(name)) for name in ("uint8", "uint32", "uint64", "int32", "int64", "float32", "float64")]
    return [*named, np.ndarray, np.dtype, *dtypes, _codecs.encode]


def weights_fingerprint(path: str | Path) -> str:
    """A short identity of a weight file: SHA-256 over its size and 64 evenly spaced blocks, first 16 hex digits.

    Reading a few MiB in place of several GiB makes it cheap enough for every run; it tells files apart, it is no
    proof of integrity.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for k in range(64):
                file.seek(max(0, (size - _BLOCK) * k // 63))
                digest.update(file.read(_BLOCK))
    except FileNotFoundError as error:
        raise _absent(path) from error
    return digest.hexdigest()[:16]

"""Writing weights, each file whole or not at all, without a second copy of them in memory; and that they are finite."""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sgm.files import SaveError, atomic_write, replacing
from sgm.weights.checksums import CRC, crc32
from sgm.weights.files import WeightsError


@dataclass(frozen=True)
class Deferred:
    """A tensor that comes into being when its turn to be written comes: `make()` has `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Deferred:
        """An existing tensor, on any device; it is copied to the CPU only while it is being written."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def on_cpu(self) -> Tensor:
        """The values, contiguous, in a storage of just their size.

        Raises:
            SaveError: `make` gave another shape or type than promised.
        """
        made = self.make().detach()
        if tuple(made.shape) != self.shape or made.dtype != self.dtype:
            raise SaveError(f"a tensor announced as {self.dtype} {self.shape} came as {made.dtype} {tuple(made.shape)}")
        made = made.cpu().contiguous()
        return made if made.untyped_storage().nbytes() == self.nbytes else made.clone()


# --- safetensors -------------------------------------------------------------------------------------------------

_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a `.safetensors` file, one tensor in memory at a time.

    Layout (safetensors format, version 0.3): header length as 8 bytes little-endian, JSON header padded with blanks
    to a multiple of 8, then the values in the header's order. The metadata begin with `crc32`: CRC-32 of the header
    (with zeros in this place) and of each tensor, 8 hex digits each; see `sgm.weights.checksums`.

    Raises:
        SaveError: it cannot be written, or a tensor's type has no name in the format.
    """
    values = {name: deferred(value) for name, value in tensors.items()}
    blank = "0" * 8 * (len(values) + 1)
    header: dict[str, Any] = {"__metadata__": {CRC: blank, **(metadata or {})}}
    end = 0
    for name, value in values.items():
        if value.dtype not in _SAFETENSORS_NAMES:
            raise SaveError(f"{path}: {name} is {value.dtype}, which safetensors files are not written in here")
        begin, end = end, end + value.nbytes
        kind = _SAFETENSORS_NAMES[value.dtype]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crcs = [crc32(text)]
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values.values():
            content = value.on_cpu().reshape(-1).view(torch.uint8).numpy().data
            crcs.append(crc32(content))
            file.write(content)
        file.seek(8)
        file.write(text.replace(blank.encode(), "".join(f"{crc:08x}" for crc in crcs).encode(), 1))
    return Path(path)


def deferred(value: Tensor | Deferred) -> Deferred:
    """A tensor (mapped from a file, as a rule) as a `Deferred`; one that is deferred already stays as it is."""
    return value if isinstance(value, Deferred) else Deferred.of(value)


# --- .pt ---------------------------------------------------------------------------------------------------------

_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip


def save_pt(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write what `torch.save` would, readable by `torch.load(weights_only=True)`, one tensor in memory at a time.

    Each tensor gets a record of just its own values, whatever larger buffer it is a view of; the same tensor under
    several names is written once. `Deferred` tensors are made in the order in which they stand in `content`.

    Args:
        content: nested dicts, lists and tuples of tensors, `Deferred` and plain values (None, bool, int, float, str).
    Raises:
        SaveError: it cannot be written, or `content` holds something else (named with its place).
    """
    check_plain(content)
    records: list[Deferred] = []
    structure = _structure(content, records)

    def write(file: BinaryIO) -> None:
        with torch.serialization._open_zipfile_writer(file) as archive:  # takes the arguments of this torch version
            archive.write_record("data.pkl", structure, len(structure))
            archive.write_record(".format_version", "1", 1)
            archive.write_record("byteorder", sys.byteorder, len(sys.byteorder))
            for k, record in enumerate(records):
                archive.write_record(f"data/{k}", record.on_cpu().untyped_storage(), record.nbytes)

    return atomic_write(path, write)


@dataclass(frozen=True)
class _Storage:
    """Stands for record `data/{key}` while the structure is pickled."""

    key: int
    dtype: torch.dtype
    count: int


def _structure(content: Mapping[str, Any], records: list[Deferred]) -> bytes:
    """The pickled structure in torch's terms, tensors replaced by references to `records`, which is filled."""
    known: dict[Any, _Storage] = {}

    def reference(value: Tensor | Deferred) -> _Storage:
        identity = _identity(value)
        if identity not in known:
            records.append(deferred(value))
            known[identity] = _Storage(len(records) - 1, value.dtype, math.prod(value.shape))
        return known[identity]

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, _Storage):
                return ("storage", _STORAGES[value.dtype], str(value.key), "cpu", value.count)
            return None

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Tensor | Deferred):
                return NotImplemented
            shape = tuple(value.shape)
            row_major = torch.empty(shape, device="meta").stride()
            arguments: tuple[object, ...] = (reference(value), 0, shape, row_major, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def _identity(value: Tensor | Deferred) -> Any:
    if isinstance(value, Deferred) or not value.numel() or value.is_meta:
        return id(value)
    return value.data_ptr(), value.device, value.dtype, tuple(value.shape), value.stride()


def check_plain(content: Any) -> None:
    """Does `content` consist of tensors and plain values alone?

    Raises:
        SaveError: names the place and the type of the first other thing.
    """
    for place, value in leaves(content, ""):
        kind = getattr(value, "dtype", None)
        if isinstance(value, Tensor | Deferred):
            if kind not in _STORAGES:
                raise SaveError(f"{place} is a tensor of {kind}, which is not stored here; convert it first")
        elif value is not None and type(value) not in (bool, int, float, str):
            raise SaveError(
                f"{place} is a {type(value).__module__}.{type(value).__qualname__}; only tensors, None, bool, int, "
                "float, str and dicts, lists and tuples of them are stored, since reading others can run code"
            )


def size_of(content: Any) -> int:
    """Bytes of all tensors in a nested structure."""
    sizes = {_identity(v): deferred(v).nbytes for _, v in leaves(content, "") if isinstance(v, Tensor | Deferred)}
    return sum(sizes.values())


def leaves(content: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Whatever is no dict, list or tuple in a nested structure, each with its place ("['masters'][3]")."""
    if type(content) in (dict, OrderedDict):
        for key, value in content.items():
            if type(key) not in (str, int):
                raise SaveError(f"{place}: key {key!r} is a {type(key).__name__}; keys must be text or whole numbers")
            yield from leaves(value, f"{place}[{key!r}]")
    elif type(content) in (list, tuple):
        for k, value in enumerate(content):
            yield from leaves(value, f"{place}[{k}]")
    else:
        yield place, content


_COPY_AGAIN = (
    "The training that wrote it had gone wrong, or it is damaged: take an earlier checkpoint or copy it again."
)


def require_finite(content: Any, source: object, what_to_do: str = _COPY_AGAIN) -> None:
    """Refuse NaN and infinity in every tensor of a nested structure.

    Raises:
        WeightsError: names the first that holds some, and `source`; `what_to_do` ends the message.
    """
    for place, value in leaves(content, ""):
        if isinstance(value, Tensor) and not is_finite(value):
            bad = value.numel() - int(torch.isfinite(value).sum())
            name = place.replace("['", ".").replace("']", "").lstrip(".")
            raise WeightsError(
                f"{source}: {name} is not finite, {bad} of {value.numel()} values are NaN or infinite in "
                f"{str(value.dtype).removeprefix('torch.')}. {what_to_do}"
            )


def is_finite(tensor: Tensor) -> bool:
    """No value is NaN or infinite. One pass without a temporary: on a CPU 50 times as fast as `isfinite().all()`."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    extremes = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(extremes.min) & torch.isfinite(extremes.max))

"""Tensors that are made when their turn to be written comes: slices, stacks, casts and sums of `Deferred`.

A conversion is a mapping of names to `Deferred`; nothing is read before it is written, so memory holds one tensor at a
time beside the mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sgm.errors import SgmError
from sgm.weights.assign import compare_keys, some_of
from sgm.weights.save import Deferred, deferred, is_finite


class ConvertError(SgmError):
    """A conversion is not possible as asked; the message says what is wrong, where, and what to do."""


def all_deferred(state: Mapping[str, Tensor] | Mapping[str, Deferred]) -> dict[str, Deferred]:
    return {name: deferred(value) for name, value in state.items()}


def made(plan: Mapping[str, Deferred]) -> dict[str, Tensor]:
    """Every tensor of a plan, now; for small ones."""
    return {name: source.on_cpu() for name, source in plan.items()}


def row_parts(source: Deferred, parts: int, takes: Sequence[int]) -> Deferred:
    """Of `parts` equal blocks of rows those numbered `takes`, stacked in that order."""
    if parts == 1:
        return source
    size = source.shape[0] // parts

    def make() -> Tensor:
        blocks = source.make().split(size)
        return blocks[takes[0]] if len(takes) == 1 else torch.cat([blocks[k] for k in takes])

    return Deferred((size * len(takes), *source.shape[1:]), source.dtype, make)


def stacked(pieces: Sequence[Deferred]) -> Deferred:
    """Row blocks of one shape and type, one under the other."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    rows = sum(piece.shape[0] for piece in pieces)
    return Deferred((rows, *first.shape[1:]), first.dtype, lambda: torch.cat([piece.make() for piece in pieces]))


def reshaped(source: Deferred, shape: Sequence[int]) -> Deferred:
    """The same values in another shape."""
    return Deferred(tuple(shape), source.dtype, lambda: source.make().reshape(tuple(shape)))


def cast(name: str, source: Deferred, dtype: torch.dtype | None) -> Deferred:
    """Floating-point values in `dtype` (None: as they are); a value that does not fit its range is an error.

    Raises:
        ConvertError: when the tensor is made for a type of smaller range: values became, or were, infinite or nan.
    """
    if dtype is None or dtype == source.dtype or not source.dtype.is_floating_point:
        return source
    narrower = torch.finfo(dtype).max < torch.finfo(source.dtype).max

    def make() -> Tensor:
        value = source.make()
        result = value.to(dtype)
        if narrower and not is_finite(result):
            raise ConvertError(_overflow(name, value, dtype))
        return result

    return Deferred(source.shape, dtype, make)


def _overflow(name: str, value: Tensor, dtype: torch.dtype) -> str:
    if not is_finite(value):
        return f"{name} holds inf or nan in the input file already; the file is damaged or its training diverged."
    largest = value.abs().max().item()
    return (
        f"{name} does not fit into {dtype}: its largest value is {largest:g}, the limit {torch.finfo(dtype).max:g}. "
        "Convert to bf16 or fp32 (--bf16, --fp32)."
    )


def changed(source: Deferred, change: Callable[[Tensor], Tensor]) -> Deferred:
    """`change(source)` (same shape), as float32."""
    return Deferred(source.shape, torch.float32, lambda: change(source.make()))


def summed_bytes(plan: Mapping[str, Deferred]) -> int:
    return sum(source.nbytes for source in plan.values())


def demand_shapes(
    state: Mapping[str, Tensor | Deferred], wanted: Mapping[str, tuple[int, ...]], source: str, should_be: str
) -> None:
    """Demand every wanted tensor in its shape, and no other.

    Raises:
        ConvertError: "`source` is not `should_be`", with the first five that are missing, unknown or misshapen.
    """
    report = compare_keys(wanted, state)
    problems = [f"missing {name}" for name in report.missing] + [f"unknown {name}" for name in report.unexpected]
    if report:
        raise ConvertError(f"{source} is not {should_be}: {some_of([*problems, *report.shapes], 5, '; ')}.")


def types_of(tensors: Iterable[Tensor | Deferred]) -> list[str]:
    """The types that occur, by their names, sorted."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})

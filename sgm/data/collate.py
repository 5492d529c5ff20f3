"""Clips put together into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import default_collate

from sgm.errors import SgmError


class CollateError(SgmError):
    """Clips that cannot share a batch."""


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack clips: `mp4` (b, f, 3, h, w) or `moments` (b, t, 2c, h, w), `num_frames` and `fps` (b,), texts as lists.

    Raises:
        CollateError: clips of different sizes; names them.
    """
    kind = "mp4" if "mp4" in items[0] else "moments"
    names = [item.get("path", f"clip {i}") for i, item in enumerate(items)]
    require_one_shape([tuple(item[kind].shape) for item in items], names, "" if kind == "mp4" else "encoded ")
    if len(items) > 1:
        return default_collate(list(items))
    (item,) = items  # its frames as they lie: a copy would be as large again
    rest = default_collate([{name: value for name, value in item.items() if name != kind}])
    return {name: item[kind][None] if name == kind else rest[name] for name in item}


def require_one_shape(shapes: Sequence[tuple[int, ...]], names: Sequence[str], frames: str = "") -> None:
    """Whether clips (frames, ..., h, w) fit into one batch; `frames` is said before that word.

    Raises:
        CollateError: they do not; names all.
    """
    if len(set(shapes)) <= 1:
        return
    listed = ", ".join(
        f"{name} has {shape[0]} {frames}frames of {shape[-2]}x{shape[-1]}"
        for name, shape in zip(names, shapes, strict=True)
    )
    raise CollateError(
        f"clips of unequal size cannot share a batch: {listed}; use a batch size of 1 (gradient accumulation makes "
        "up for it), or give all clips one length: videos long enough for max_num_frames, or a smaller one"
    )

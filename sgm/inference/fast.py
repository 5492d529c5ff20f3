"""Fast mode: what the `accelerate:` section says of approximations, made into what a sampling run takes."""

from __future__ import annotations

from sgm.config import AccelerateArgs
from sgm.inference.fit import SamplingError
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.modules.diffusionmodules.shortcuts import Shortcuts


def shortcuts_of(fast: AccelerateArgs) -> Shortcuts | None:
    """The shortcuts that the section asks for; None where it asks for none."""
    start, end = fast.guidance_interval
    if not fast.reuse_error and (start, end) == (0, 1):
        return None
    return Shortcuts(fast.reuse_error, fast.reuse_keep_first, fast.reuse_keep_last, start, end)


def check_shortcuts(shortcuts: Shortcuts | None, sampler: VideoDDIMSampler, steps: int) -> None:
    """Refuse shortcuts that could never be taken.

    Raises:
        SamplingError: says why.
    """
    if shortcuts is None:
        return
    kept = shortcuts.keep_first + shortcuts.keep_last
    if shortcuts.error and kept >= steps:
        raise SamplingError(
            f"accelerate.reuse_error never skips one of reuse_keep_first + reuse_keep_last = {kept} steps, and the run "
            f"has {steps}: lower these or set accelerate.reuse_error=0"
        )
    if (shortcuts.start, shortcuts.end) != (0, 1) and isinstance(sampler.guider, IdentityGuider):
        raise SamplingError("accelerate.guidance_interval needs a guider, and the sampler has none: leave it out")

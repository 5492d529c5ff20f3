"""Fast mode: what the `accelerate:` section says of approximations, made into what a sampling run takes."""

from __future__ import annotations

import math

from sgm.config import AccelerateArgs
from sgm.inference.fit import SamplingError
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.modules.diffusionmodules.shortcuts import GuidanceRule, Shortcuts
from sgm.modules.ops.step_cache import SkipRule


def shortcuts_of(accelerate: AccelerateArgs) -> Shortcuts | None:
    """The shortcuts that the section asks for; None where it asks for none."""
    start, end = accelerate.guidance_interval
    kept = accelerate.guidance_keep_first if accelerate.reuses_guidance else 0
    guidance = GuidanceRule(start, end, accelerate.guidance_every, accelerate.guidance_least, kept)
    skip = _skip_rule(accelerate) if accelerate.step_cache else None
    return None if skip is None and guidance == GuidanceRule() else Shortcuts(skip, guidance)


def _skip_rule(accelerate: AccelerateArgs) -> SkipRule:
    threshold = accelerate.step_cache_threshold
    return SkipRule(
        math.inf if threshold is None else threshold,
        accelerate.step_cache_keep_first,
        accelerate.step_cache_keep_last,
        accelerate.step_cache_max_skips,
        accelerate.step_cache_order,
    )


def check_shortcuts(shortcuts: Shortcuts | None, sampler: VideoDDIMSampler, steps: int) -> None:
    """Refuse shortcuts that could never be taken.

    Raises:
        SamplingError: lists the contradictions.
    """
    if shortcuts is None:
        return
    problems = []
    kept = shortcuts.skip.keep_first + shortcuts.skip.keep_last if shortcuts.skip else 0
    if shortcuts.skip and kept >= steps:
        problems.append(
            f"step_cache never skips one of step_cache_keep_first + step_cache_keep_last = {kept} steps, and the run "
            f"has {steps}: lower these or set accelerate.step_cache=false"
        )
    if shortcuts.guidance.keep_first >= steps:
        problems.append(
            f"accelerate.guidance_keep_first={shortcuts.guidance.keep_first} keeps every step's guidance, and the run "
            f"has {steps}: lower it or leave out guidance_every and guidance_least"
        )
    if shortcuts.guidance != GuidanceRule() and isinstance(sampler.guider, IdentityGuider):
        problems.append("guidance_interval, guidance_every and guidance_least need a guider, and the sampler has none")
    if problems:
        raise SamplingError("\n  - ".join(["the accelerate section does not fit the run:", *problems]))

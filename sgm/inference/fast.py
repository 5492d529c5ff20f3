"""Fast mode: what the `accelerate:` section says of approximations, made into what a sampling run takes."""

from __future__ import annotations

import math

from sgm.config import AccelerateArgs
from sgm.inference.fit import SamplingError
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.modules.diffusionmodules.shortcuts import GuidanceRule, ReuseRule, Shortcuts, SkipRule


def shortcuts_of(accelerate: AccelerateArgs) -> Shortcuts | None:
    """The shortcuts that the section asks for; None where it asks for none."""
    start, end = accelerate.guidance_interval
    kept = accelerate.guidance_keep_first if accelerate.reuses_guidance else 0
    guidance = GuidanceRule(start, end, accelerate.guidance_every, accelerate.guidance_least, kept)
    skip = _skip_rule(accelerate) if accelerate.step_cache else None
    reuse = _reuse_rule(accelerate) if accelerate.reuse_error else None
    shortcuts = Shortcuts(skip, guidance, reuse)
    return None if shortcuts == Shortcuts() else shortcuts


def _reuse_rule(accelerate: AccelerateArgs) -> ReuseRule:
    return ReuseRule(accelerate.reuse_error, accelerate.reuse_keep_first, accelerate.reuse_keep_last)


def _skip_rule(accelerate: AccelerateArgs) -> SkipRule:
    threshold = accelerate.step_cache_threshold
    return SkipRule(
        math.inf if threshold is None else threshold,
        accelerate.step_cache_keep_first,
        accelerate.step_cache_keep_last,
        accelerate.step_cache_max_skips,
    )


def check_shortcuts(shortcuts: Shortcuts | None, sampler: VideoDDIMSampler, steps: int) -> None:
    """Refuse shortcuts that could never be taken.

    Raises:
        SamplingError: lists the contradictions.
    """
    if shortcuts is None:
        return
    problems = []
    for name, rule, off in (
        ("step_cache", shortcuts.skip, "step_cache=false"),
        ("reuse", shortcuts.reuse, "reuse_error=0"),
    ):
        kept = rule.keep_first + rule.keep_last if rule else 0
        if kept >= steps:
            problems.append(
                f"{off.split('=')[0]} never skips one of {name}_keep_first + {name}_keep_last = {kept} steps, and the "
                f"run has {steps}: lower these or set accelerate.{off}"
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

"""The `args.distill:` section of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from sgm.modules.diffusionmodules.few_steps import SAMPLERS
from sgm.typed import ConfigError, PathText, option

SEGMENT, ALL = "segment", "all"


@dataclass(frozen=True)
class DistillArgs:
    """What a few-step student is to be, and how it learns."""

    prompts: list[PathText] = option([], "text files with a prompt a line; none: the captions of args.train_data")
    steps: int = option(4, "passes of the network that the student needs", at_least=1)
    sampler: str = option(
        "renoise",
        "between two passes: renoise (fresh noise on the estimate) or ddim (deterministic)",
        choices=tuple(SAMPLERS),
    )
    levels: str = option(
        SEGMENT,
        "noise levels at which student and teacher are compared: segment: those of the student's step (trajectory "
        "distribution matching), all (distribution matching)",
        choices=(SEGMENT, ALL),
    )
    guidance_scale: list[float] = option(
        [], "of the teacher, one for all or one for each of the student's steps, noisiest first; none: what the "
        "configuration's guider has at each noise level"
    )  # fmt: skip
    critic_rate: float = option(3.0, "the critic's learning rate, in parts of the student's")

    def __post_init__(self) -> None:
        problems = []
        if not self.critic_rate > 0:
            problems.append(f"args.distill.critic_rate is {self.critic_rate}; it must be above 0")
        if len(self.guidance_scale) not in (0, 1, self.steps):
            problems.append(
                f"args.distill.guidance_scale is {self.guidance_scale}; it needs one number, or one for each of the "
                f"{self.steps} steps"
            )
        if problems:
            raise ConfigError("; ".join(problems))

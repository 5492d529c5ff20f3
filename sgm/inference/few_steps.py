"""Adapters that were distilled for a few steps: their headers say how they are sampled, and runs heed it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sgm.config import RunConfig
from sgm.inference.options import SampleArgs
from sgm.modules.diffusionmodules.few_steps import FewSteps, FewStepsError
from sgm.util import instantiate_from_config
from sgm.weights.files import WeightsNotFoundError
from sgm.weights.release import Adapter, read_parts

ENTRY = "few_steps"  # of a header


def with_few_steps(config: RunConfig[SampleArgs]) -> tuple[RunConfig[SampleArgs], list[str]]:
    """`config` with the sampler that an adapter of `args.lora` was distilled for, and what is to be said of it.

    Steps and a guidance scale that `args` give, by flag or YAML, count all the same; a warning says that they fight it.
    An adapter that is not there says nothing: who loads it complains.

    Raises:
        WeightsError: an adapter cannot be read.
        FewStepsError: two that were distilled in different ways, or a header that cannot be read.
    """
    own = config.model.get("sampler_config")
    stated = {text: found for text in config.args.lora if (found := _stated(Adapter.parse(text).path))}
    if not stated or own is None or config.args.decode_latents:
        return config, []
    if len(set(stated.values())) > 1:
        raise FewStepsError(f"{' and '.join(stated)} were distilled in different ways; name one of them in args.lora")
    name, few_steps = next(iter(stated.items()))
    section = few_steps.sampler_config(own)
    notes = [*_notes(name, few_steps, section, config.args)]
    if config.args.guidance_scale is not None and "guider_config" in own.get("params", {}):
        section["params"]["guider_config"] = own["params"]["guider_config"]
    return replace(config, model=config.model | {"sampler_config": section}), notes


def _stated(path: str) -> FewSteps | None:
    try:
        lora = read_parts(path)[0].lora
    except WeightsNotFoundError:
        return None
    return FewSteps.parse(lora[ENTRY]) if ENTRY in lora else None


def _notes(name: str, few_steps: FewSteps, section: dict[str, Any], args: SampleArgs) -> list[str]:
    """What is done for an adapter, and what a run asks for against it."""
    said = f"{name} was distilled for {few_steps.steps} steps ({few_steps.sampler})"
    notes = [f"note: {said}{'' if few_steps.guidance else ', without guidance'}: so it is sampled"]
    if args.num_steps not in (None, few_steps.steps):
        notes.append(f"warning: {said}; this run takes {args.num_steps} (args.num_steps, --steps)")
    if args.guidance_scale is not None and not few_steps.guidance:
        notes.append(f"warning: {said} without guidance; this run guides (args.guidance_scale, --guidance-scale)")
    if args.negative_prompt and args.guidance_scale is None and not few_steps.guidance:
        notes.append(f"warning: {said} without guidance: args.negative_prompt has no effect")
    timesteps = instantiate_from_config(section).schedule().timesteps
    if timesteps != few_steps.timesteps:
        notes.append(
            f"warning: {said} at timesteps {list(few_steps.timesteps)}; this configuration's discretization_config "
            f"gives {list(timesteps)}"
        )
    return notes

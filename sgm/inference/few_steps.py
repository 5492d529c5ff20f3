"""Weights that were distilled for a few steps: their headers say how they are sampled, and runs heed it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sgm.config import AccelerateArgs, RunConfig
from sgm.inference.adapters import FEW_STEPS, adapter_files, read_adapter
from sgm.inference.options import SampleArgs
from sgm.modules.diffusionmodules.few_steps import FewSteps, FewStepsError
from sgm.util import instantiate_from_config
from sgm.weights.checksums import small_parts_alone
from sgm.weights.files import WeightsNotFoundError
from sgm.weights.release import Adapter, read_parts


def with_few_steps(config: RunConfig[SampleArgs]) -> tuple[RunConfig[SampleArgs], list[str]]:
    """`config` with the sampler that an adapter or the transformer was distilled for, and what is to be said of it.

    Steps and a guidance scale that `args` give, by flag or YAML, count all the same; a warning says that they fight it.
    Weights that are not there say nothing: who loads them complains.

    Raises:
        WeightsError: a file cannot be read.
        FewStepsError: two that were distilled in different ways, a header that cannot be read or whose steps the
            configuration cannot take, a student that is none, or fast mode beside one.
    """
    own = config.model.get("sampler_config")
    stated = {} if own is None or config.args.decode_latents else _stated(config.args)
    if not stated or own is None:
        return config, []
    if len(set(stated.values())) > 1:
        raise FewStepsError(
            f"{' and '.join(stated)} were distilled in different ways; name one of them in args.load and args.lora"
        )
    name, few_steps = next(iter(stated.items()))
    _refuse_shortcuts(name, few_steps, config.accelerate)
    section = few_steps.sampler_config(own)
    notes = [*_notes(name, few_steps, section, config.args)]
    if config.args.guidance_scale is not None and "guider_config" in (own.get("params") or {}):
        section["params"]["guider_config"] = own["params"]["guider_config"]
    return replace(config, model=config.model | {"sampler_config": section}), notes


def _stated(args: SampleArgs) -> dict[str, FewSteps]:
    """What adapters and transformer say, by the name that the run has for each."""
    files = {text: Adapter.parse(text).path for text in args.lora} | ({args.load: args.load} if args.load else {})
    found = {}
    for text, path in files.items():
        try:
            with small_parts_alone():
                facts = (read_parts(path)[0] if path == args.load else read_adapter(path)).lora
        except WeightsNotFoundError:
            continue
        if FEW_STEPS in facts:
            found[text] = FewSteps.parse(facts[FEW_STEPS])
        elif args.few_steps and args.student and adapter_files(args.student) == adapter_files(path):
            raise FewStepsError(
                f"args.few_steps is true, but {path} (args.student) was not distilled: its file does not say how it is "
                "sampled. `bash finetune.sh CONFIG.yaml configs/distill.yaml --set args.distill.prompts=FILE` makes a "
                "student; as an adapter like others it is named by --lora, without few_steps"
            )
    return found


def _refuse_shortcuts(name: str, few_steps: FewSteps, accelerate: AccelerateArgs) -> None:
    on = [option for option in accelerate.approximate() if option != "fp8"]
    if on:
        raise FewStepsError(
            f"accelerate: {', '.join(on)} spare a part of many steps that are alike, and {name} was distilled "
            f"for {few_steps.steps} steps ({few_steps.sampler}) that all count: leave out these switches (of "
            "configs/fast.yaml), or the student"
        )


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
    try:
        timesteps = instantiate_from_config(section).schedule().timesteps
    except ValueError as error:
        raise FewStepsError(f"{said}, which this configuration cannot take: {error}") from error
    if timesteps != few_steps.timesteps:
        notes.append(
            f"warning: {said} at timesteps {list(few_steps.timesteps)}; this configuration's discretization_config "
            f"gives {list(timesteps)}"
        )
    return notes

"""Whether a model and a run can be distilled."""

from __future__ import annotations

from sgm.config import ConfigError
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.training.distill.objective import guidance_tables
from sgm.training.options import TrainArgs


def check_distill(args: TrainArgs, zero_stage: int, engine: SATVideoDiffusionEngine) -> None:
    """Whether `args.distill` goes with the rest of a configuration.

    Raises:
        ConfigError: the network cannot be run several times within a step, or parts say too little.
    """
    if not args.distill:
        return
    if zero_stage == 3:
        raise ConfigError(
            "args.distill does not go with deepspeed.zero_optimization.stage: 3; use 0, 1 or 2: "
            "--set deepspeed.zero_optimization.stage=2"
        )
    if engine.noised_image_input:
        raise ConfigError(
            "args.distill: models that start from a picture are not distilled here; take a text-to-video one"
        )
    if not engine.has_sampler:
        raise ConfigError("args.distill needs model.sampler_config: the teacher is the model sampled as it says")
    if not (isinstance(engine.denoiser, DiscreteDenoiser) and isinstance(engine.denoiser.scaling, VideoScaling)):
        raise ConfigError(
            "args.distill needs model.denoiser_config DiscreteDenoiser with VideoScaling, as in "
            "configs/cogvideox_2b_infer.yaml"
        )
    try:
        engine.sampler.schedule(args.distill.steps)
    except ValueError as error:
        raise ConfigError(f"args.distill.steps is {args.distill.steps}: {error}") from error
    guidance_tables(engine.sampler, len(engine.denoiser.sigmas), args.distill)

"""The models of a worker: what they are, and clips from them. One of them is loaded at a time, and stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sgm import StepReport, TextToVideo, Video
from sgm.config import RunConfig, load_run_config
from sgm.inference.adapters import with_adapters
from sgm.inference.few_steps import with_few_steps
from sgm.inference.options import SampleArgs
from sgm.inference.setup import checked
from sgm.modules.diffusionmodules.few_steps import FewStepsError
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.places import CONFIGS
from sgm.serve.jobs import FAST, FEW_STEPS, FULL, ClipRequest, ModelFacts
from sgm.weights.checksums import WeightsError

OVERLAYS = {FULL: [], FAST: [CONFIGS / "fast.yaml"], FEW_STEPS: [CONFIGS / "few_steps.yaml"]}


class Models:
    """Models by name.

    Args:
        specifications: name -> files of its configuration, `KEY=VALUE` overrides, and values of `args:`.
        adapters: name -> path, or name in the hub, of what a request's `lora` may name.
        device: in place of the configurations'.
    Attributes:
        adapters: name -> path, as records have it.
    Raises:
        SgmError: a configuration that cannot run.
    """

    def __init__(
        self,
        specifications: Mapping[str, Mapping[str, Any]],
        adapters: Mapping[str, str],
        device: str | None = None,
    ):
        self._specifications, self._device = specifications, device
        self._models = {name: self._built(name) for name in specifications}
        self._current: str | None = None
        self.adapters = {name: self._found(path) for name, path in adapters.items()}

    def _found(self, adapter: str) -> str:
        """Its path, as records name it; one of the hub is fetched. Raises SgmError: it is not there."""
        config = next(iter(self._models.values())).config
        asked = checked(replace(config, args=replace(config.args, lora=[adapter])))
        return os.path.abspath(asked.args.lora[-1])

    def _built(self, name: str) -> TextToVideo:
        """From its configuration; its weights are read when they are needed."""
        asked = self._specifications[name]
        split = (text.partition("=") for text in asked["overrides"])
        overrides = {key: yaml.safe_load(value) for key, _, value in split}
        overrides |= {f"args.{n}": v for n, v in asked["flags"].items() if n not in ("placement", "device")}
        flags = {"placement": asked["flags"].get("placement"), "device": self._device or asked["flags"].get("device")}
        plain = load_run_config([Path(file) for file in asked["files"]], SampleArgs, overrides=asked["overrides"])
        # The overlays of modes must not change what is decided at loading.
        overrides.setdefault("accelerate.kernels", plain.accelerate.kernels)
        return TextToVideo.from_config(*asked["files"], overrides=overrides, **flags)

    def facts(self) -> dict[str, ModelFacts]:
        return {name: _facts(name, model) for name, model in self._models.items()}

    def notes(self) -> list[str]:
        """What is to be said of the configurations."""
        models = self._models.values()
        return [text for m in models for text in (*(f"note: {note}" for note in m.config.notes), *m.pipeline.notes)]

    def generate(self, request: ClipRequest, folder: Path, on_step: Callable[[StepReport], None]) -> Video:
        """The clip that is asked for; `folder` has the file that it begins with. What `on_step` raises comes out.

        Raises:
            SgmError: what is asked for cannot be.
        """
        model = self._loaded(request.model)
        strides, patch = model.pipeline.engine.strides, model.pipeline.engine.network.patch.t
        adapters = [f"{self.adapters[name]}:{scale}" for name, _, scale in (t.partition(":") for t in request.lora)]
        return model(
            request.prompt,
            seed=request.seed,
            steps=request.steps,
            negative_prompt=request.negative_prompt or None,
            guidance_scale=request.guidance_scale,
            size=request.size,
            num_frames=sampled_frames(strides.latent_frames(request.num_frames), patch),
            image=folder / request.image if request.image else None,
            video=folder / request.video if request.video else None,
            strength=request.strength,
            lora=[*model.config.args.lora, *adapters] if adapters else None,
            refine=request.refine or None,
            configs=OVERLAYS[request.mode],
            on_step=on_step,
        )

    def _loaded(self, name: str) -> TextToVideo:
        """The model, and no other one in memory."""
        if self._current not in (None, name):
            self._models[str(self._current)] = self._built(str(self._current))
            gc.collect()
            torch.cuda.empty_cache()
        self._current = name
        return self._models[name]


def _facts(name: str, model: TextToVideo) -> ModelFacts:
    pipeline = model.pipeline
    strides, args = pipeline.engine.strides, model.config.args
    student = os.path.abspath(args.student) if args.student and _has_student(model.config) else None
    return ModelFacts(
        name=name,
        fps=args.sampling_fps,
        size=pipeline.visual.size(),
        size_step=strides.size_step,
        num_frames=strides.pixel_frames(pipeline.visual.length.decoded),
        frame_step=2 * strides.time,  # clips have an odd number of latent frames
        steps=pipeline.num_steps,
        start="image" if pipeline.engine.noised_image_input else "video",
        modes=(FULL,) if args.few_steps else (FULL, FAST, FEW_STEPS) if student else (FULL, FAST),
        student=student,
    )


def _has_student(config: RunConfig[SampleArgs]) -> bool:
    """Whether `few_steps` can be asked for."""
    asked = with_adapters(replace(config, args=replace(config.args, few_steps=True)))
    try:
        return with_few_steps(asked)[0] is not asked
    except (FewStepsError, WeightsError):
        return False

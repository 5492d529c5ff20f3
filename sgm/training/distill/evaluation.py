"""Evaluation of a distillation: its loss on fixed prompts and noise, and clips that the student makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sgm.data.loader import clip_count
from sgm.inference.stages import EncodedPrompt
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.distill.engine import DistillationEngine
from sgm.training.distill.prompts import COND, TEXT, together
from sgm.training.evaluate import Evaluation, Files, ValidationStages


@dataclass
class PromptEvaluation(Evaluation):
    """`datasets`: prompts. Sampled are the first `samples` of them, or as many as `prompts` has, if that is more."""

    samples: int = 2

    def _clips(self) -> Iterator[dict[str, Any]]:
        for k in range(self.batches):
            first = self._number(k) * self.batch_size
            yield together([self._clip(first + i) for i in range(self.batch_size)])

    def _log(self, engine: SATVideoDiffusionEngine, batch: dict[str, Any], device: torch.device, files: Files) -> None:
        if not self.log_video or not isinstance(engine, DistillationEngine):
            files.text(batch[TEXT])
            return
        count = min(max(self.samples, len(self.prompts)), sum(map(clip_count, self.datasets)))
        chosen = together([self._clip(k) for k in range(count)])
        files.text(chosen[TEXT])
        conditions = [{name: value[k : k + 1] for name, value in chosen[COND].items()} for k in range(count)]
        prompts = [EncodedPrompt(cond, engine.unconditional) for cond in conditions]
        self._sample(ValidationStages(engine, device, engine.shape), prompts, files)

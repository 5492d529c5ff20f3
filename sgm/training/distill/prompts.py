"""Prompts of a distillation: read, embedded once, and handed out in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from sgm.config import ConfigError
from sgm.data.clips import CaptionError, caption_of
from sgm.data.sampler import ClipSampler
from sgm.data.sources import list_clips
from sgm.files import read_lines
from sgm.models.diffusion import Cond, SATVideoDiffusionEngine
from sgm.training.distill.engine import COND
from sgm.training.memory import free_memory, gib
from sgm.training.options import TrainArgs

TEXT = "txt"
TOGETHER = 16  # prompts that the text encoder reads at a time


def read_prompts(args: TrainArgs) -> list[list[str]]:
    """The prompts of each file of `args.distill.prompts`, or else the captions of each folder of `args.train_data`.

    Raises:
        ConfigError: nothing in one of them, or a clip without caption. (`check_places` has looked for them.)
    """
    if args.distill is not None and args.distill.prompts:
        files = [Path(path).expanduser() for path in args.distill.prompts]
        return [_some(read_lines(file, ConfigError), file) for file in files]
    return [_captions(Path(folder).expanduser()) for folder in args.train_data]


def _captions(folder: Path) -> list[str]:
    texts = []
    for clip in list_clips(folder):
        try:
            texts.append(caption_of(clip).text.strip())
        except CaptionError as error:
            raise ConfigError(
                f"args.train_data: {error}; add the caption, or name files in args.distill.prompts"
            ) from error
    return _some(texts, folder)


def _some(texts: list[str], source: Path) -> list[str]:
    found = [text for text in texts if text]
    if not found:
        raise ConfigError(f"{source} holds no prompt: write one prompt a line")
    return found


class PromptSet(Dataset):
    """Prompts with their conditions: `conditions` (n, ...) each, on the CPU."""

    def __init__(self, texts: Sequence[str], conditions: Cond):
        self.texts, self.conditions = texts, conditions

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {TEXT: self.texts[index], COND: {name: value[index] for name, value in self.conditions.items()}}


def embed(engine: SATVideoDiffusionEngine, texts: Sequence[str]) -> tuple[PromptSet, Cond]:
    """Prompts with their conditions, and the condition (1, ...) of none, on the CPU and in the engine's type.

    Raises:
        ConfigError: there is no memory for so many; said after the first batch.
    """
    found: Cond = {}
    nothing: Cond = {}
    for start in range(0, len(texts), TOGETHER):
        cond, uncond = engine.condition_batch({TEXT: list(texts[start : start + TOGETHER])})
        found = found or _room_for(len(texts), cond)
        for name, value in cond.items():
            found[name][start : start + TOGETHER] = value
        nothing = {name: value[:1].cpu() for name, value in uncond.items()}
    return PromptSet(texts, found), nothing


def _room_for(count: int, some: Cond) -> Cond:
    """Memory for the conditions of `count` prompts, like these of a few."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine; each has all prompts
    each = processes * sum(value[0].nbytes for value in some.values())
    free = free_memory(torch.device("cpu"))
    if free is not None and count * each > free:
        raise ConfigError(
            f"the embeddings of {count} prompts take {gib(count * each)} of memory ({gib(each)} a prompt, in "
            f"{processes} process{'es' * (processes > 1)}), {gib(free)} are free: take fewer "
            f"(`head -n {int(free * 0.8) // each} FILE > FEWER`) and name that file in args.distill.prompts"
        )
    return {name: value.new_empty(count, *value.shape[1:], device="cpu") for name, value in some.items()}


def together(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The batch of some prompts: `txt`, a list, and their conditions (b, ...)."""
    conditions: Cond = {name: torch.stack([item[COND][name] for item in items]) for name in items[0][COND]}
    return {TEXT: [item[TEXT] for item in items], COND: conditions}


class PromptBatches:
    """Endless batches of one rank, for `sgm.data.loader.create_loader`; they are in memory, nobody reads ahead."""

    def __init__(self, dataset: Dataset, sampler: ClipSampler, batch_size: int, workers: int, ahead: int, pin: bool):
        self.dataset, self.sampler, self.batch_size, self.pin = dataset, sampler, batch_size, pin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        numbers = iter(self.sampler)
        while True:
            batch = together([self.dataset[k] for k in islice(numbers, self.batch_size)])
            if self.pin:
                batch[COND] = {name: value.pin_memory() for name, value in batch[COND].items()}
            yield batch

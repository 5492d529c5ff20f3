"""Training, evaluation and the cache where weights lie on a GPU, whose place `meta` takes here: what is computed from
tensors of it and of the CPU together fails, as it would there, and what is fetched from it is zero.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgm.cache.dataset import EMBEDDING, FIRST_FRAME, MOMENTS
from sgm.cache.fill import DecodedClip, Encoder, FillSettings
from sgm.cache.stand_ins import cached_model_section
from sgm.data.images import HeldPicture
from sgm.inference.prompts import Prompt
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.training.evaluate import Evaluation
from sgm.training.step import engine_inputs
from sgm.util import instantiate_from_config
from tests.family_tiny import kind_section
from tests.training_tiny import HEIGHT, WIDTH

GPU = torch.device("meta")
SIZES = {"5b_i2v": (1, HEIGHT, WIDTH), "1.5_5b_i2v": (1, 48, 64)}  # latent frames and pixels of a clip


class AsOnAGpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if name == "_local_scalar_dense" and tensors[0].is_meta:
            return 0.0
        if name == "_to_copy" and tensors[0].is_meta and torch.device(kwargs.get("device") or GPU) != GPU:
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "copy_" and tensors[1].is_meta and not tensors[0].is_meta:
            return tensors[0].zero_()
        assert name == "copy_" or len({x.is_meta for x in tensors if x.ndim}) < 2, f"{name}: tensors of two devices"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def meta_can_be_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(FrozenT5Embedder, "encode", lambda _, texts: torch.zeros(len(texts), 12, 32, device=GPU))


class Seen:
    """Takes what an evaluation, or the cache, would write."""

    def __init__(self) -> None:
        self.written: list[tuple[Any, ...]] = []

    def text(self, captions: list[str]) -> None: ...

    def latents(self, number: int, latents: Tensor) -> None:
        self.written.append((number, latents.device.type))

    def clip(self, kind: str, number: int, frames: Any) -> None:
        self.written.append((kind, number, frames.shape[1:]))

    def put(self, key: str, moments: Tensor) -> None:
        self.written.append((key, moments.device.type))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_a_step_and_an_evaluation_of_a_model_on_a_gpu(kind, cached):
    section = kind_section(Path("none"), kind)
    del section["first_stage_config"]["params"]["ckpt_path"]
    engine = SATVideoDiffusionEngine(**cached_model_section(section) if cached else section, dtype="bf16").eval()
    engine.to(GPU)
    t, height, width = SIZES[kind]
    batch: dict[str, Any] = {"txt": ["a fox"], engine.input_key: torch.zeros(1, 4 * t - 3, 3, height, width)}
    if cached:
        batch = {"txt": ["a fox"], MOMENTS: torch.zeros(1, t, 32, height // 8, width // 8)}
        batch |= {EMBEDDING: torch.zeros(1, 12, 32), FIRST_FRAME: torch.zeros(1, 3, height, width, dtype=torch.uint8)}
    held = HeldPicture.holding(Image.new("RGB", (width, height)))
    prompts = [] if cached else [Prompt(0, "a dog", picture=held)]
    seen = Seen()
    with torch.no_grad(), AsOnAGpu():
        assert engine(*engine_inputs(engine, batch, GPU))[0].is_meta
        Evaluation([], 1, 1, 0, None, cached, True, 8, prompts)._log(engine, batch, GPU, seen)
    decoded = [("inputs", 0), ("reconstructions", 0), ("samples", 0), ("samples", 1)]
    assert seen.written == ([(0, "cpu")] if cached else [(*which, (height, width, 3)) for which in decoded])


def test_clips_are_encoded_on_a_gpu():
    section, seen = kind_section(Path("none"), "5b_i2v"), Seen()
    del section["first_stage_config"]["params"]["ckpt_path"]
    encode = Encoder(section, "bf16", FillSettings(GPU))
    encode._stage = instantiate_from_config(section["first_stage_config"]).to(GPU, torch.bfloat16)
    with AsOnAGpu():
        encode([DecodedClip(key, key, torch.zeros(5, 3, 16, 16, dtype=torch.uint8)) for key in "ab"], seen)
        encode.finish(seen)
    assert seen.written == [("a", "cpu"), ("b", "cpu")]


def test_tensors_of_two_devices_are_found():
    with AsOnAGpu(), pytest.raises(AssertionError, match="two devices"):
        torch.sub(torch.zeros(2, dtype=torch.uint8, device=GPU), 127.5, out=torch.empty(2))

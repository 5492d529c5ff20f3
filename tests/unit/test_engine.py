"""The engine on a small network: what sampling keeps, what it demands."""

from __future__ import annotations

import pytest
import torch

from sgm.config import merge_yaml
from sgm.models.diffusion import SATVideoDiffusionEngine


@pytest.fixture(scope="module")
def engine() -> SATVideoDiffusionEngine:
    model = merge_yaml(["configs/demo_infer.yaml"], ["model.network_config.params.num_layers=1"])["model"]
    for part in ("conditioner_config", "first_stage_config", "loss_fn_config"):
        model.pop(part)
    model["sampler_config"]["params"] |= {"num_steps": 3, "verbose": False}
    torch.manual_seed(0)
    return SATVideoDiffusionEngine(**model).eval()


def conditions() -> tuple[dict, dict]:
    text = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    return {"crossattn": text}, {"crossattn": torch.zeros_like(text)}


def test_sample_keeps_the_prefix(engine):
    prefix = torch.full((1, 1, 16, 4, 6), 0.5)
    out = engine.sample(*conditions(), noise=torch.randn(1, 3, 16, 4, 6), prefix=prefix)
    assert torch.equal(out[:, :1], prefix) and not torch.equal(out[:, 1:2], prefix)


def test_sample_needs_a_start(engine):
    with pytest.raises(ValueError, match="shape"):
        engine.sample(*conditions())


def test_absent_parts_are_named(engine):
    with pytest.raises(ValueError, match="first_stage_model"):
        engine.decode_first_stage(torch.zeros(1, 16, 1, 2, 2))

"""The engine on a small network: what sampling keeps, what it demands."""

from __future__ import annotations

import pytest
import torch

from sgm.models.diffusion import SATVideoDiffusionEngine
from tests.sampling_tiny import model_section


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> SATVideoDiffusionEngine:
    model = model_section(tmp_path_factory.mktemp("none"))
    for part in ("conditioner_config", "first_stage_config", "loss_fn_config"):
        model.pop(part)
    model["network_config"]["params"]["num_frames"] = 9
    torch.manual_seed(0)
    engine = SATVideoDiffusionEngine(**model).eval()
    for parameter in engine.network.parameters():  # zero-initialised gates would hide what the network does
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return engine


def conditions() -> tuple[dict, dict]:
    text = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))
    return {"crossattn": text}, {"crossattn": torch.zeros_like(text)}


def test_sample_keeps_the_prefix_and_shows_it_clean_at_every_step(engine):
    prefix = torch.full((1, 1, 16, 2, 4), 0.5)
    seen = []
    hook = engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, :1].clone()))
    noise = torch.randn(1, 3, 16, 2, 4, generator=torch.Generator().manual_seed(2))
    out = engine.sample(*conditions(), noise=noise, prefix=prefix)
    hook.remove()
    assert torch.equal(out[:, :1], prefix) and not torch.equal(out[:, 1:2], prefix)
    assert len(seen) == 4 and all(torch.equal(x, prefix.expand_as(x)) for x in seen)  # VideoScaling: c_in = 1
    torch.manual_seed(0)
    with_prefix = engine.sample(*conditions(), noise=noise, prefix=prefix, noise_sampler=torch.zeros_like)
    without = engine.sample(*conditions(), noise=noise, noise_sampler=torch.zeros_like)
    assert not torch.equal(with_prefix[:, 1:], without[:, 1:])  # the rest answers to it


def test_sample_needs_a_start(engine):
    with pytest.raises(ValueError, match="shape"):
        engine.sample(*conditions())


def test_absent_parts_are_named(engine):
    with pytest.raises(ValueError, match="first_stage_config"):
        engine.encode_image(torch.zeros(1, 3, 1, 16, 16), frames=1)

"""Classifier-free guidance: batch order, scales, what may differ between the halves."""

from __future__ import annotations

import math

import pytest
import torch

from sgm.modules.diffusionmodules.guiders import DynamicCFG, IdentityGuider, VanillaCFG, guide, join_conditions
from sgm.util import TargetError, instantiate_from_config

SIGMA = torch.zeros(1)


def halves(uncond: float, cond: float) -> torch.Tensor:
    return torch.tensor([[uncond], [cond]])


def test_unconditional_half_comes_first():
    x, sigma, joined = VanillaCFG(6).prepare_inputs(
        torch.tensor([[5.0]]),
        torch.tensor([0.3]),
        {"crossattn": torch.ones(1, 2, 2)},
        {"crossattn": torch.zeros(1, 2, 2)},
    )
    assert x.tolist() == [[5.0], [5.0]] and sigma.tolist() == pytest.approx([0.3, 0.3])
    assert joined["crossattn"][:, 0, 0].tolist() == [0, 1]


def test_guide_is_linear_between_the_halves():
    assert guide(halves(2.0, 3.0), 0.0).item() == 2.0
    assert guide(halves(2.0, 3.0), 1.0).item() == 3.0
    assert guide(halves(2.0, 3.0), 6.0).item() == 8.0


def test_vanilla_scale_may_be_replaced_for_a_call():
    guider = VanillaCFG(6.0)
    assert guider(halves(0, 1), SIGMA).item() == 6.0
    assert guider(halves(0, 1), SIGMA, scale=2.5).item() == 2.5
    assert guider(halves(0, 1), SIGMA, scale=torch.tensor(1.5)).item() == 1.5


def test_conditions_beyond_the_batched_ones_must_agree():
    tag = torch.arange(3)
    joined = join_conditions({"vector": torch.ones(1, 2), "tag": tag}, {"vector": torch.zeros(1, 2), "tag": tag + 0})
    assert joined["tag"] is tag and joined["vector"].shape == (2, 2)
    with pytest.raises(ValueError, match="'tag' differs"):
        join_conditions({"tag": 1}, {"tag": 2})
    with pytest.raises(ValueError, match="'tag' differs"):
        join_conditions({"tag": tag}, {"tag": tag[:2]})
    with pytest.raises(ValueError, match="they must match"):
        join_conditions({"crossattn": tag}, {})


@pytest.mark.parametrize(("k", "expected"), [(0, 1.0), (50, 7.0), (-949, 2.291487174551452), (31, 1.123397939968981)])
def test_dynamic_scale(k, expected):
    assert DynamicCFG(scale=6, exp=5, num_steps=50).scale_at(k) == pytest.approx(expected, abs=1e-9)


def test_dynamic_scale_stays_in_its_swing():
    guider = DynamicCFG(scale=6, exp=5, num_steps=50)
    scales = [guider.scale_at(50 - t) for t in range(1000)]
    assert min(scales) >= 1 and max(scales) <= 7 and max(scales) - min(scales) > 5.9


def test_dynamic_refuses_what_it_cannot_compute():
    for values, fault in (
        ({"exp": 2.5, "num_steps": 50}, "exp: expected a whole number"),
        ({"exp": 5, "num_steps": 0}, "num_steps: must be at least 1"),
    ):
        with pytest.raises(TargetError, match=fault):
            instantiate_from_config({"target": f"{DynamicCFG.__module__}.DynamicCFG", "params": {"scale": 6, **values}})
    with pytest.raises(ValueError, match="step_index"):
        DynamicCFG(scale=6, exp=5, num_steps=50)(halves(0, 1), SIGMA)


def test_dynamic_ignores_the_calls_scale_and_says_so():
    guider = DynamicCFG(scale=6, exp=5, num_steps=50)
    with pytest.warns(UserWarning, match="ignores scale=3"):
        given = guider(halves(0, 1), SIGMA, step_index=50, scale=3)
    assert given.item() == pytest.approx(7.0)


def test_integral_float_exponent_is_fine():
    assert DynamicCFG(6, 5.0, 50).scale_at(-949) == DynamicCFG(6, 5, 50).scale_at(-949)
    assert math.isfinite(DynamicCFG(6, 4, 50).scale_at(-949))


def test_identity_guider_keeps_the_batch():
    guider = IdentityGuider()
    x, sigma, cond = guider.prepare_inputs(torch.ones(1, 2), SIGMA, {"crossattn": 1}, {"crossattn": 2})
    assert x.shape == (1, 2) and cond == {"crossattn": 1}
    assert torch.equal(guider(x, sigma, step_index=3), x)
    assert torch.equal(guider(x, sigma, scale=1), x)
    with pytest.raises(ValueError, match="scale=6 needs a guider"):
        guider(x, sigma, scale=6)

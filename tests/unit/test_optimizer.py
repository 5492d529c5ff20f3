"""FusedEmaAdam, parameter groups, and the `optimizer:` section."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from sgm.training.optimizers.ema_adam import FusedEmaAdam, ema_decay
from sgm.training.optimizers.spec import OptimizerSpec, parameter_groups
from sgm.typed import ConfigError
from sgm.util import get_obj_from_str
from tests.conftest import REPO

SETTINGS = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4}


def reference(gradients: torch.Tensor, start: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, shadow) after each step, in float64 from the formula."""
    p, shadow = start.double(), start.double()
    m = v = torch.zeros_like(p)
    lr, (b1, b2), eps, decay = SETTINGS["lr"], SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    found = []
    for k, g in enumerate(gradients.double(), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + eps) + decay * p
        p = p - lr * update
        d = min(0.9999, (1 + k) / (10 + k))
        shadow = d * shadow + (1 - d) * p
        found.append((p, shadow))
    return found


def test_update_and_average_follow_the_formula():
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(6, 40, generator=generator)
    start = torch.randn(40, generator=generator)
    parameter = nn.Parameter(start.clone())
    optimizer = FusedEmaAdam([parameter], **SETTINGS)
    for gradient, (expected, shadow) in zip(gradients, reference(gradients, start)):
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(
            optimizer.state[parameter]["shadow"].double(), shadow, rtol=0, atol=1e-6, check_dtype=False
        )


def test_decay_grows_to_its_limit():
    assert [ema_decay(k) for k in (1, 2, 5)] == pytest.approx([2 / 11, 3 / 12, 6 / 15])
    assert ema_decay(10**7) == 0.9999


def test_parameters_without_a_gradient_are_left_alone():
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedEmaAdam([moved, still], **SETTINGS)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(moved, torch.ones(3)) and torch.equal(still, torch.ones(3))
    assert "shadow" not in optimizer.state.get(still, {})


def test_counts_each_parameter_for_itself():
    """A parameter that joins later starts its own count (the original counts the last one of a group only)."""
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = FusedEmaAdam([early, late], **SETTINGS)
    early.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[early]["updates"] == 2 and optimizer.state[late]["updates"] == 1


@pytest.mark.parametrize("switch", [{"bias_correction": False}, {"adam_w_mode": False}, {"amsgrad": True}])
def test_switches_that_are_not_available_are_refused(switch):
    with pytest.raises(ConfigError, match="torch.optim.Adam"):
        FusedEmaAdam([nn.Parameter(torch.ones(1))], **switch)


def test_the_originals_name_leads_here():
    assert get_obj_from_str("sat.ops.FusedEmaAdam") is FusedEmaAdam


def test_biases_and_norms_have_no_weight_decay():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Conv2d(1, 2, 3, bias=False))
    model[2].weight.requires_grad_(False)
    model[0].tied = model[0].weight  # a second name is no second parameter
    decayed, plain = parameter_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in plain["params"]] == [id(p) for p in (model[0].bias, *model[1].parameters())]
    assert plain["weight_decay"] == 0.0 and "weight_decay" not in decayed
    assert decayed["lr_scale"] == 1.0


def test_a_parameter_may_bring_its_own_rate():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.lr_scale = 16.0
    assert [(g["lr_scale"], len(g["params"])) for g in parameter_groups(model)] == [(1.0, 1), (16.0, 1)]


# --- the section --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, params, expected",
    [
        ("sat.ops.FusedEmaAdam", {"betas": [0.9, 0.95], "eps": 1e-8}, FusedEmaAdam),
        ("AdamW", {"betas": [0.9, 0.95]}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),  # DeepSpeed's Adam decays as AdamW does
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("torch.optim.RAdam", {}, torch.optim.RAdam),
        ("sgm.training.optimizers.ema_adam.FusedEmaAdam", {"ema_decay": 0.99}, FusedEmaAdam),
    ],
)
def test_optimizers_by_name(kind, params, expected):
    spec = OptimizerSpec.parse({"type": kind, "params": {"lr": 1e-3, **params}})
    built = spec.build([{"params": [nn.Parameter(torch.ones(2))], "lr": 0.0}])
    assert type(built) is expected and built.param_groups[0]["lr"] == 0.0 and spec.lr == 1e-3


@pytest.mark.parametrize(
    "section, message",
    [
        ({"params": {"lr": 1}}, "needs `type`"),
        ({"type": "AdamW", "params": {}}, "params.lr"),
        ({"type": "AdamW", "params": {"lr": -1}}, "params.lr"),
        ({"type": "AdamW", "params": {"lr": 1, "weight_dekay": 0}}, "weight_decay"),
        ({"type": "AdamZ", "params": {"lr": 1}}, "no optimizer"),
        ({"type": "torch.nn.Linear", "params": {"lr": 1}}, "no optimizer"),
        ({"type": "os.system", "params": {"lr": 1}}, "not allowed"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerSpec.parse(section)


def test_a_step_does_without_pytorchs_compiler():
    """Which takes seconds to import, and which nothing here needs."""
    code = (
        "import sys, torch\n"
        "from sgm.training.optimizers.ema_adam import FusedEmaAdam\n"
        "from sgm.training.setup.engine import _keep_compiler_out\n"
        "_keep_compiler_out()\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "p.grad = torch.ones(3)\n"
        "FusedEmaAdam([p]).step()\n"
        "assert p.max() < 1 and 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

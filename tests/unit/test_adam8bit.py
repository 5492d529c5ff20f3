"""Moments in 8 bits: the code, the optimizer's path beside AdamW's, its state."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from sgm.training.optimizers import adam8bit
from sgm.training.optimizers.adam8bit import BLOCK, STEP, AdamW8bit, decode, empty_codes, encode
from sgm.training.optimizers.ema_adam import FusedEmaAdam
from sgm.training.optimizers.spec import OptimizerSpec
from sgm.typed import ConfigError

CPU = torch.device("cpu")


def through(values: torch.Tensor, signed: bool, call: int = 5) -> torch.Tensor:
    """`values` (blocks, 256) coded and read back."""
    codes, tops = empty_codes(values.numel(), signed, CPU)
    encode(values.clone(), codes, tops, call)
    return decode(codes, tops)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_keep_values_within_a_step_of_the_grid(signed):
    generator = torch.Generator().manual_seed(0)
    values = torch.exp(torch.randn(40, BLOCK, generator=generator))  # a range of about 10^3 in each block
    values *= torch.logspace(-12, 6, 40)[:, None]
    if signed:
        values *= torch.randn(40, BLOCK, generator=generator).sign()
    found = through(values, signed)
    assert torch.all(found.sign() == values.sign())
    assert torch.all((found / values).log().abs() <= torch.tensor(STEP).log() * 1.001)


def test_zeros_stay_zeros_and_divisors_never_become_zero():
    values = torch.zeros(2, BLOCK)
    assert torch.equal(through(values, True), values) and torch.equal(through(values, False), values)
    values[0, 0], values[0, 1], values[1] = 1.0, 1e-20, 1e-35
    found = through(values, False)
    assert found[0, 0] == pytest.approx(1.0, rel=STEP - 1) and 0 < found[0, 1] < 1e-9 and not found[0, 2:].any()
    assert torch.all(found[1] > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_on_the_grid_stays_whatever_its_block_does(signed):
    values = torch.full((1, BLOCK), 2.0 ** (3 / 8))
    for largest in (4.0, 2.0**1.5, 64.0, 2.0):
        values[0, 0] = largest
        values = through(values, signed, call=int(largest * 10))
        assert values[0, 1:] == pytest.approx(2.0 ** (3 / 8), rel=1e-5)


def test_rounding_keeps_the_mean_of_small_changes():
    """A decay of 0.1 % a step is far below half the grid's 9 %, and still 1000 steps make it e^-1."""
    codes, tops = empty_codes(16 * BLOCK, False, CPU)
    encode(torch.linspace(1, 2, 16 * BLOCK).view(16, BLOCK), codes, tops, 0)
    start = decode(codes, tops).mean()
    for step in range(1, 1001):
        encode(decode(codes, tops) * 0.999, codes, tops, 4 * step)
    assert (decode(codes, tops).mean() / start).item() == pytest.approx(0.999**1000, rel=0.03)


def small_task():
    """A regression that is learnt to the noise, by a network with a few parameters of odd sizes."""
    torch.manual_seed(1)
    x = torch.randn(512, 24)
    y = torch.tanh(x @ torch.randn(24, 7)) + 0.05 * torch.randn(512, 7)
    model = nn.Sequential(nn.Linear(24, 67), nn.GELU(), nn.LayerNorm(67), nn.Linear(67, 7))
    return model, x, y


def train(model, optimizer, x, y, steps: int, first: int = 0) -> float:
    for k in range(first, first + steps):
        rows = torch.arange(k * 64, k * 64 + 64) % len(x)
        optimizer.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
    return float((model(x) - y).square().mean().detach())


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_learns_as_adamw_does(beta2, monkeypatch):
    monkeypatch.setitem(adam8bit.SLICE_VALUES, "cpu", 2 * BLOCK)  # several slices a parameter
    settings = {"lr": 3e-3, "betas": (0.9, beta2), "weight_decay": 1e-2}
    ends = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        model, x, y = small_task()
        start = float((model(x) - y).square().mean().detach())
        ends.append(train(model, kind(model.parameters(), **settings), x, y, 200))
    assert ends[0] < start / 8 and ends[1] < ends[0] * 1.05


def test_first_step_is_adamws_exactly():
    moved = []
    for kind in (torch.optim.AdamW, AdamW8bit):
        model, x, y = small_task()
        train(model, kind(model.parameters(), lr=1e-2, weight_decay=0.0), x, y, 1)
        moved.append(model)
    for a, b in zip(*(m.parameters() for m in moved)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_goes_on_bit_for_bit_from_stored_tensors():
    model, x, y = small_task()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, ema=True)
    train(model, optimizer, x, y, 5)
    again, _, _ = small_task()
    again.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = AdamW8bit(again.parameters(), lr=1e-2, ema=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, x, y, 5, first=5), train(again, resumed, x, y, 5, first=5)
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b) and torch.equal(optimizer.state[a]["shadow"], resumed.state[b]["shadow"])


def test_state_is_as_small_as_the_estimate_says():
    p = nn.Parameter(torch.ones(100 * BLOCK))
    p.grad = torch.ones_like(p)
    spec = OptimizerSpec.parse({"type": "AdamW8bit", "params": {"lr": 1e-3}})
    optimizer = spec.build([{"params": [p]}])
    optimizer.step()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if torch.is_tensor(v))
    assert held == spec.moment_bytes * p.numel() and spec.moment_bytes < 2.1 and not spec.keeps_ema


def test_without_an_average_fused_ema_adam_is_adamw():
    section = {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-2, "ema": False}}
    spec = OptimizerSpec.parse(section)
    model, x, y = small_task()
    optimizer = spec.build([{"params": list(model.parameters())}])
    train(model, optimizer, x, y, 3)
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    assert spec.moment_bytes == 8 and not spec.keeps_ema
    usual = OptimizerSpec.parse({"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-2}})
    assert usual.moment_bytes == 8 and usual.keeps_ema and usual.target is FusedEmaAdam


def test_wrong_settings_are_refused():
    for params in ({"betas": [0.9, 1.0]}, {"eps": 0.0}, {"ema_decay": 2.0}):
        spec = OptimizerSpec.parse({"type": "AdamW8bit", "params": {"lr": 1e-3, **params}})
        with pytest.raises(ConfigError, match="refuses its params"):
            spec.build([{"params": [nn.Parameter(torch.ones(2))]}])

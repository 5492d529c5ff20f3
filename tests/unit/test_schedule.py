"""Learning rate by step: the original's recorded values, edges, and the optimizer's groups."""

from __future__ import annotations

import pytest

from sgm.training.optimizers.schedule import LearningRate, ScheduleSettings, learning_rate
from sgm.typed import ConfigError

LR = 2e-4
# The original's rates (base 2e-4, 1000 iterations, warm-up 1 %), by optimizer step from 0.
FINETUNE_LINEAR = {0: 1e-5, 9: 1e-5, 50: 1e-5, 99: 1e-5, 100: 1.818e-4, 101: 1.816e-4, 500: 1.018e-4, 999: 2e-6}
PRETRAIN_LINEAR = {0: 2e-5, 4: 1e-4, 9: 2e-4, 10: 1.998e-4, 50: 1.918e-4, 100: 1.818e-4, 999: 2e-6}
FINETUNE_COSINE = {0: 1e-5, 99: 1e-5, 100: 1.963471224668639e-4, 500: 1.1254435124909368e-4, 999: 2.0044409567084156e-5}


@pytest.mark.parametrize(
    "settings, recorded",
    [
        (ScheduleSettings(LR, 1000), FINETUNE_LINEAR),
        (ScheduleSettings(LR, 1000, hold_steps=0), PRETRAIN_LINEAR),
        (ScheduleSettings(LR, 1000, style="cosine", decay_ratio=0.1), FINETUNE_COSINE),
    ],
)
def test_rates_are_the_originals(settings, recorded):
    for step, expected in recorded.items():
        assert learning_rate(settings, step) == pytest.approx(expected, rel=1e-9), step


def test_no_warmup_starts_at_once():
    """The original divides by zero here."""
    assert learning_rate(ScheduleSettings(LR, 100, warmup=0.0), 0) == pytest.approx(0.05 * LR)
    assert learning_rate(ScheduleSettings(LR, 100, warmup=0.0, hold_steps=0), 0) == pytest.approx(LR * 0.99)


def test_long_warmup_is_not_shortened_by_the_held_start():
    settings = ScheduleSettings(LR, 10_000, warmup=0.1)  # 1000 steps of warm-up
    assert learning_rate(settings, 9) == pytest.approx(LR * 10 / 1000)  # below 5 %
    assert learning_rate(settings, 99) == pytest.approx(0.05 * LR)
    assert learning_rate(settings, 499) == pytest.approx(LR / 2)


@pytest.mark.parametrize("style", ["constant", "exponential", "None"])
def test_constant_styles(style):
    settings = ScheduleSettings(LR, 50, style=style, warmup=0.0, hold_steps=0)
    assert {learning_rate(settings, k) for k in range(60)} == {LR}


def test_linear_never_goes_below_zero():
    settings = ScheduleSettings(LR, 10, warmup=0.0, hold_steps=0)
    assert learning_rate(settings, 500) == 0.0


@pytest.mark.parametrize(
    "change", [{"style": "sine"}, {"warmup": -0.1}, {"warmup": 2.0}, {"decay_ratio": 0.0}, {"base_lr": float("nan")}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError):
        ScheduleSettings(**{"base_lr": LR, "total_steps": 10, **change})


def test_groups_get_the_rate_times_their_scale_and_resume_exactly():
    groups = [{"lr": 0.0}, {"lr": 0.0, "lr_scale": 16.0}]
    schedule = LearningRate(ScheduleSettings(LR, 1000), groups)
    assert groups[0]["lr"] == pytest.approx(1e-5) and groups[1]["lr"] == pytest.approx(16e-5)
    for _ in range(100):
        schedule.step()
    assert groups[0]["lr"] == pytest.approx(1.818e-4)

    later = [{"lr": 0.0}]
    other = LearningRate(ScheduleSettings(LR, 1000), later)
    other.load_state_dict(schedule.state_dict())
    assert later[0]["lr"] == groups[0]["lr"]
    schedule.step(), other.step()
    assert later[0]["lr"] == groups[0]["lr"]


def test_a_longer_run_decays_to_its_new_end_and_warms_up_once():
    first = LearningRate(ScheduleSettings(LR, 1000, warmup=0.1, hold_steps=0), [{}])
    first.steps = 400
    longer = LearningRate(ScheduleSettings(LR, 8000, warmup=0.1, hold_steps=0), [{}])
    longer.load_state_dict(first.state_dict())
    assert longer.current == pytest.approx(LR * (8000 - (401 - 100)) / 8000)  # step 401 lies beyond the warm-up of 100
    again = LearningRate(ScheduleSettings(LR, 8000, warmup=0.1, hold_steps=0), [{}])
    again.load_state_dict(longer.state_dict())
    assert again.current == longer.current
    again.steps = 8099
    assert again.current == 0.0

"""Fast mode: what is left out and what is put in its place, against loops written by hand; off means the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.config import AccelerateArgs, ConfigError
from sgm.inference.fit import SamplingError, check_shortcuts, shortcuts_of
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.guiders import IdentityGuider, VanillaCFG
from sgm.modules.diffusionmodules.sampling import LinearStep, VPSDEDPMPP2MSampler, dpmpp_sde_step, extrapolate_2m
from sgm.modules.diffusionmodules.shortcuts import KeptAnswer, ShortcutRun, backlog, error_weight
from tests.sampling_tiny import model_section

STEPS = 8
SHAPE = (1, 3, 16, 2, 4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> SATVideoDiffusionEngine:
    model = model_section(tmp_path_factory.mktemp("none"))
    for part in ("conditioner_config", "first_stage_config", "loss_fn_config"):
        model.pop(part)
    model["network_config"]["params"] |= {"num_frames": 9, "num_layers": 3}
    model["sampler_config"]["params"]["num_steps"] = STEPS
    torch.manual_seed(0)
    engine = SATVideoDiffusionEngine(**model).eval().requires_grad_(False)
    for parameter in engine.network.parameters():  # zero-initialised gates would hide what the network does
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return engine


class Noise:
    """The same draws for every run."""

    def __init__(self, seed: int = 3):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)


def sample(engine: SATVideoDiffusionEngine, seed: int = 2, **switches: Any) -> tuple[Tensor, ShortcutRun | None]:
    shortcuts = shortcuts_of(AccelerateArgs(**switches))
    run = ShortcutRun(shortcuts) if shortcuts else None
    return sample_with(engine, run, seed), run


def sample_with(engine: SATVideoDiffusionEngine, run: ShortcutRun | None, seed: int = 2, samples: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(samples, 12, 32, generator=draw)
    noise = torch.randn(samples, *SHAPE[1:], generator=draw)
    cond, uncond = {"crossattn": text}, {"crossattn": torch.zeros_like(text)}
    return engine.sample(cond, uncond, noise=noise, noise_sampler=Noise(), shortcuts=run)


def network_batches(engine: SATVideoDiffusionEngine, run: Any) -> list[int]:
    """Batch sizes of the network's calls while `run()` runs."""
    seen: list[int] = []
    hook = engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    run()
    hook.remove()
    return seen


# --- off -----------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_for_by_default():
    assert shortcuts_of(AccelerateArgs()) is None and AccelerateArgs().approximate() == {}
    assert AccelerateArgs(reuse_keep_last=2).approximate() == {}  # of a switch that is off
    assert AccelerateArgs(reuse_error=0.2).approximate() == {
        "reuse_error": 0.2, "reuse_keep_first": 3, "reuse_keep_last": 1
    }  # fmt: skip
    changed = {"guidance_interval": [0.0, 0.5], "fp8": True}
    assert AccelerateArgs(**changed).approximate() == changed


def advanced(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Any, noise: Noise) -> Tensor:
    """The sampler's update, with its discarded draw."""
    if step.is_last:
        return denoised
    drawn = noise(x)
    if previous is not None:
        drawn = noise(x)
    estimate = extrapolate_2m(denoised, previous, step.a_prev, step.a, step.a_next)
    return dpmpp_sde_step(x, estimate, drawn, step.a, step.a_next)


# --- reuse by measured errors ----------------------------------------------------------------------------------------


def test_an_error_that_nothing_meets_makes_every_call_that_counts(engine):
    exact, _ = sample(engine)
    got, run = sample(engine, reuse_error=1e-12)
    # the fourth step's guidance multiplies by 0: its second branch is never asked
    assert run.calls.whole == run.calls.usual == 2 * STEPS - 1
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_the_larger_the_error_the_fewer_the_calls(engine):
    made, apart = [], []
    exact, _ = sample(engine)
    for error in (1e-12, 2.0, 8.0, 1e9):
        got, run = sample(engine, reuse_error=error)
        made.append(run.calls.whole)
        apart.append(float((got - exact).square().mean()))
    assert made == sorted(made, reverse=True) and made[0] > made[1] > made[2] > made[-1]
    assert apart == sorted(apart) and apart[0] < 1e-8 < apart[1]
    # the first three steps and the last one, both branches where guidance acts there
    guided = [abs(scale - 1) > 0.1 for scale in engine.sampler.guidance_scales()]
    assert made[-1] == sum(1 + (guided[k] or k == 1) for k in (0, 1, 2, STEPS - 1))


def test_each_sample_decides_for_itself(engine):
    """A run of a sample whose answers change more asks more; what was asked of another run plays no part."""
    asked = {}
    run = ShortcutRun(shortcuts_of(AccelerateArgs(reuse_error=3.0)))
    for seed in (2, 5, 8, 2):
        first = sample_with(engine, run, seed=seed)
        counted = asked.setdefault(seed, (run.calls.whole, first))
        assert counted[0] == run.calls.whole and torch.equal(counted[1], first)


def linear_case(steps: int = 12) -> tuple[VPSDEDPMPP2MSampler, Any]:
    """A sampler with a scale that changes, and a denoiser whose answers are straight lines over the steps."""
    sampler = VPSDEDPMPP2MSampler(
        {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"},
        num_steps=steps,
        guider_config={
            "target": "sgm.modules.diffusionmodules.guiders.DynamicCFG",
            "params": {"scale": 6, "exp": 5, "num_steps": steps},
        },
    )
    signal = sampler.schedule().signal

    def denoise(x: Tensor, a: Tensor, cond: Any, idx: Tensor) -> Tensor:
        step = min(range(steps), key=lambda k: abs(signal[k] - float(a[0])))
        noise = math.sqrt(1 - signal[step] ** 2) / max(signal[step], 1e-9) if step else 0.0
        branch = cond["crossattn"].view(-1, 1, 1, 1, 1)  # 1 is the conditional one
        return (1 + 0.1 * step - (1 - branch) * (0.3 + 0.05 * step) * noise).expand_as(x)

    return sampler, denoise


def test_what_was_missing_is_made_good_at_the_next_answer():
    sampler, denoise = linear_case()
    cond, uncond = {"crossattn": torch.ones(1, 1)}, {"crossattn": torch.zeros(1, 1)}
    x = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []

    def counted(x: Tensor, *arguments: Any, **extras: Any) -> Tensor:
        asked.append(x.shape[0])
        return denoise(x, *arguments, **extras)

    def path(denoiser: Any) -> tuple[list[Tensor], list[int]]:
        samples, whole = [], []
        sampler(denoiser, x, cond, uncond, noise_sampler=Noise(), callback=lambda k, n, after, _: (
            samples.append(after.clone()), whole.append(sum(asked)), asked.clear()))  # fmt: skip
        return samples, whole

    expected, _ = path(denoise)
    run = ShortcutRun(shortcuts_of(AccelerateArgs(reuse_error=0.5)))
    got, whole = path(run.around(counted, 1, sampler.guidance_scales(), sampler.linear_steps()))
    assert sum(whole) == run.calls.whole < run.calls.usual
    apart = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
    after_pairs = [error for error, calls in zip(apart, whole, strict=True) if calls == 2]
    assert max(after_pairs) < 1e-4 and max(apart) > 1e-2


def test_linear_steps_are_the_samplers_updates():
    sampler, _ = linear_case()
    draw = torch.Generator().manual_seed(1)
    for step, factors in zip(sampler.schedule().steps(), sampler.linear_steps(), strict=True):
        x, denoised, previous = (torch.randn(3, generator=draw, dtype=torch.float64) for _ in range(3))
        after = sampler.update(x, denoised, previous if step.index else None, step, torch.zeros_like)
        expected = factors.x * x + factors.estimate * denoised + factors.previous * previous * bool(step.index)
        torch.testing.assert_close(after, expected)
        assert factors.signal == step.a


def test_a_kept_answer_errs_with_the_root_of_the_steps():
    kept = KeptAnswer()
    assert kept.expected_error(3) == math.inf and kept.renew(torch.zeros(4), 2) is None
    assert kept.renew(torch.full((4,), 3.0), 6).tolist() == [3.0] * 4  # a mean square of 9 in 4 steps
    assert kept.expected_error(7) == pytest.approx(1.5) and kept.expected_error(10) == pytest.approx(3.0)


def test_backlog_of_a_sum():
    """With x' = x + D, one skipped step of two lacks half of the change."""
    steps = [LinearStep(0.5, 1.0, 1.0, 0.0)] * 5
    assert backlog(steps, 1, 2, [1.0] * 5) == (0.0, 0.0)
    assert backlog(steps, 1, 3, [1.0] * 5) == (0.5, 0.5)
    assert backlog(steps, 0, 3, [0.0, 1.0, 4.0, 0.0, 0.0]) == pytest.approx((1 / 3 + 8 / 3, 8 / 3))


def test_errors_weigh_more_at_both_ends():
    weights = [error_weight(signal, left) for signal, left in ((0.0, 50), (0.06, 42), (0.2, 31), (0.5, 17), (0.95, 2))]
    assert weights[0] > weights[1] > weights[2] == weights[3] == 1.0 < weights[4] < error_weight(0.97, 1)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_interval_equals_a_loop_by_hand(engine):
    """Steps 2 to 5 of 8 (their middles lie in the interval) are guided, where the scale is not 1, as at step 3."""
    batches = network_batches(engine, lambda: sample(engine, guidance_interval=[0.25, 0.75]))
    assert batches == [1, 1, 2, 1, 2, 2, 1, 1]
    got, run = sample(engine, guidance_interval=[0.25, 0.75])
    assert (run.calls.whole, run.calls.usual) == (11, 15)
    sampler, draw = engine.sampler, torch.Generator().manual_seed(2)
    text, x, noise = torch.randn(1, 12, 32, generator=draw), torch.randn(SHAPE, generator=draw), Noise()
    previous = None
    for step, scale in zip(sampler.schedule().steps(), sampler.guidance_scales(), strict=True):
        signal, idx = torch.full((1,), step.a), torch.full((1,), float(step.timestep))
        denoised = engine.denoiser(engine.model, x, signal, {"crossattn": text}, idx=idx)
        if 2 <= step.index <= 5:
            uncond = engine.denoiser(engine.model, x, signal, {"crossattn": torch.zeros_like(text)}, idx=idx)
            denoised = uncond + scale * (denoised - uncond)
        x, previous = advanced(x, denoised, previous, step, noise), denoised
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_reused_difference_under_constant_guidance():
    """With a denoiser whose branches differ by a constant in predicted noise, reuse is exact."""
    sampler = VPSDEDPMPP2MSampler(
        {
            "target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization",
            "params": {"shift_scale": 3.0},
        },
        num_steps=6,
        guider_config={"target": "sgm.modules.diffusionmodules.guiders.VanillaCFG", "params": {"scale": 4.0}},
    )

    def denoise(x, signal, cond, idx):
        a = signal.view(-1, 1, 1, 1, 1)
        noise = (1 - a**2).sqrt() / a.clamp(min=1e-2)
        return 0.5 * torch.tanh(x) + 0.01 * noise * cond["crossattn"].view(-1, 1, 1, 1, 1)

    cond, uncond = {"crossattn": torch.ones(2, 1)}, {"crossattn": torch.zeros(2, 1)}
    x = torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    run = ShortcutRun(shortcuts_of(AccelerateArgs(reuse_error=1e-4, reuse_keep_last=0)))
    exact = sampler(denoise, x, cond, uncond, noise_sampler=Noise())
    around = run.around(denoise, 2, sampler.guidance_scales(), sampler.linear_steps())
    fast = sampler(around, x, cond, uncond, noise_sampler=Noise())
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)
    # both branches at the first three steps, of which the first one, pure noise, leaves no such difference
    assert (run.calls.whole, run.calls.usual) == (9, 12)
    assert sampler.guidance_scales() == (4.0,) * 6 and sampler.guidance_scales(scale=2.0) == (2.0,) * 6


def test_an_interval_with_measured_errors_and_a_run_without_guidance(engine):
    def batches(error: float) -> list[int]:
        interval = [0.25, 0.75]
        return network_batches(engine, lambda: sample(engine, guidance_interval=interval, reuse_error=error))

    assert batches(1e-12) == [1, 1, 2, 1, 2, 2, 1, 1] and sum(batches(8.0)) < 12
    text = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))
    plain = {"noise": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), "scale": 1.0}
    exact = engine.sample({"crossattn": text}, noise_sampler=Noise(), **plain)
    run = ShortcutRun(shortcuts_of(AccelerateArgs(guidance_interval=[0.2, 0.9])))
    assert torch.equal(engine.sample({"crossattn": text}, noise_sampler=Noise(), shortcuts=run, **plain), exact)
    assert run.calls.whole == run.calls.usual == STEPS


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [[0.5], [0.7, 0.3], [-0.1, 1.0], [0.0, 1.5], [0.4, 0.4]])
def test_intervals_that_cannot_be(interval):
    with pytest.raises(ConfigError, match="guidance_interval"):
        AccelerateArgs(guidance_interval=interval)


def test_shortcuts_that_could_never_be_taken(engine):
    reuse = shortcuts_of(AccelerateArgs(reuse_error=0.2))
    check_shortcuts(reuse, engine.sampler, 5)
    with pytest.raises(SamplingError, match=r"reuse_keep_last = 4 steps, and the run has 4"):
        check_shortcuts(reuse, engine.sampler, 4)
    unguided = VPSDEDPMPP2MSampler(
        {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}, num_steps=6
    )
    with pytest.raises(SamplingError, match="needs a guider"):
        check_shortcuts(shortcuts_of(AccelerateArgs(guidance_interval=[0.0, 0.5])), unguided, 6)
    assert IdentityGuider().scale_at(3) == 1 and VanillaCFG(5.0).scale_at(3) == 5

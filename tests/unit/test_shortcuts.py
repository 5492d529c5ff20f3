"""Fast mode: what is left out and what is put in its place, against loops written by hand; off means the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.config import AccelerateArgs, ConfigError
from sgm.inference.fast import check_shortcuts, shortcuts_of
from sgm.inference.fit import SamplingError
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.guiders import IdentityGuider, VanillaCFG
from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler, dpmpp_sde_step, extrapolate_2m
from sgm.modules.diffusionmodules.shortcuts import ShortcutRun
from sgm.modules.ops.step_cache import FirstBlockCache, History, SkipRule, run_layers
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
    assert AccelerateArgs(step_cache_order=0).approximate() == {}  # of a cache that is off
    assert AccelerateArgs(guidance_every=2, fp8=True).approximate() == {"guidance_every": 2, "fp8": True}
    assert AccelerateArgs(step_cache=True).approximate()["step_cache_max_skips"] == 1


def test_threshold_zero_makes_every_call_and_the_same_bits(engine):
    exact, _ = sample(engine)
    got, run = sample(engine, step_cache=True, step_cache_threshold=0, step_cache_keep_first=1)
    assert torch.equal(got, exact)
    assert (run.calls.whole, run.calls.first_layer, run.calls.usual) == (2 * STEPS, 0, 2 * STEPS)


# --- the step cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skips", "computed"), [(1, [0, 1, 3, 5, 7]), (2, [0, 1, 4, 7])])
def test_fixed_pattern(engine, skips, computed):
    switches = {"step_cache_keep_first": 2, "step_cache_keep_last": 1, "step_cache_max_skips": skips}
    exact, _ = sample(engine)
    got, run = sample(engine, step_cache=True, **switches)
    assert run.calls.whole == 2 * len(computed) and run.calls.usual == 2 * STEPS
    assert run.calls.first_layer == STEPS - len(computed)
    assert bool(got.isfinite().all()) and not torch.equal(got, exact)
    batches = network_batches(engine, lambda: sample(engine, step_cache=True, **switches))
    assert batches == [2 if step in computed else 1 for step in range(STEPS)]


def test_thresholds_lie_between_none_and_all(engine):
    made = []
    for threshold in (0.0, 0.05, 0.3, 1e9):
        _, run = sample(engine, step_cache=True, step_cache_threshold=threshold, step_cache_keep_first=1,
                        step_cache_keep_last=1, step_cache_max_skips=9)  # fmt: skip
        made.append(run.calls.whole)
    # the first step, pure noise, leaves no difference of the branches, so the second one is asked whole as well
    assert made == sorted(made, reverse=True) and made[0] == 2 * STEPS and made[-1] == 6


def test_a_step_that_changes_too_much_is_asked_whole_branch_by_branch(engine):
    """A threshold that nothing meets: every call is made, though not in pairs; the result differs by rounding."""
    exact, _ = sample(engine)
    switches = {"step_cache": True, "step_cache_threshold": 1e-9, "step_cache_keep_first": 3, "step_cache_keep_last": 1}
    got, run = sample(engine, **switches)
    assert (run.calls.whole, run.calls.first_layer) == (2 * STEPS, 0)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert network_batches(engine, lambda: sample(engine, **switches)) == [2, 2, 2] + [1] * 8 + [2]


def advanced(x: Tensor, denoised: Tensor, previous: Tensor | None, step: Any, noise: Noise) -> Tensor:
    """The sampler's update, with its discarded draw."""
    if step.is_last:
        return denoised
    drawn = noise(x)
    if previous is not None:
        drawn = noise(x)
    estimate = extrapolate_2m(denoised, previous, step.a_prev, step.a, step.a_next)
    return dpmpp_sde_step(x, estimate, drawn, step.a, step.a_next)


@pytest.mark.parametrize("order", [0, 1])
def test_first_block_cache_adds_what_the_other_layers_added(order):
    """Layers that add a known number, which changes from pass to pass."""
    called = []

    def layer(number: int, amount: float):
        return lambda hidden: called.append(number) or hidden + amount

    cache = FirstBlockCache(SkipRule(0.5, keep_first=1, keep_last=0, max_skips=2, order=order), steps=7, samples=1)
    amounts = [(1.0, 10.0), (1.8, 12.0), (1.9, 99.0), (2.0, 99.0), (2.1, 20.0), (9.0, 30.0)]
    out = []
    for step, (first, rest) in enumerate(amounts):
        cache.step = step
        out.append(float(cache([layer(0, first), layer(1, rest)], torch.zeros(1, 1, 1))))
    # 0 begins; 1 changes by 0.8, too much; 2 and 3 are skipped; 4 comes after two skips; 5 changes too much
    predicted = [12.0, 12.0] if order == 0 else [14.0, 16.0]
    assert out == pytest.approx([11.0, 13.8, 1.9 + predicted[0], 2.0 + predicted[1], 22.1, 39.0])
    assert called == [0, 1, 0, 1, 0, 0, 0, 1, 0, 1]
    cache.step = 6
    pair = cache([layer(0, 9.0), layer(1, 7.0)], torch.zeros(2, 1, 1))  # both branches: never skipped
    assert pair.flatten().tolist() == [16.0, 16.0] and cache.skipped == 0


def test_history_extrapolates_along_the_axis():
    history = History()
    for place, value in ((1, 5.0), (2, 8.0), (4, 10.0)):
        history.add(torch.tensor(value), place)
    assert history.predict(7, order=0) == 10 and history.predict(7, order=1) == 13
    assert float(run_layers([lambda x: x + 1, lambda x: x * 2], torch.tensor(3.0))) == 8


def test_one_run_leaves_nothing_to_the_next(engine):
    shortcuts = shortcuts_of(AccelerateArgs(step_cache=True, step_cache_keep_last=1, guidance_every=2))
    run = ShortcutRun(shortcuts)
    first, again = sample_with(engine, run, seed=5), None
    sample_with(engine, run, seed=6)
    again = sample_with(engine, run, seed=5)
    assert torch.equal(first, again) and run.calls.usual == 2 * STEPS


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_interval_equals_a_loop_by_hand(engine):
    """Steps 2 to 5 of 8 (their middles lie in the interval) are guided, the others conditional."""
    batches = network_batches(engine, lambda: sample(engine, guidance_interval=[0.25, 0.75]))
    assert batches == [1, 1, 2, 2, 2, 2, 1, 1]
    got, run = sample(engine, guidance_interval=[0.25, 0.75])
    assert (run.calls.whole, run.calls.usual) == (12, 16)
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


def test_guidance_at_every_second_call_and_where_it_acts(engine):
    assert network_batches(engine, lambda: sample(engine, guidance_every=3)) == [2, 2, 1, 1, 2, 1, 1, 2]
    scales = engine.sampler.guidance_scales()
    expected = [2 if k < 2 or abs(scale - 1) >= 2 else 1 for k, scale in enumerate(scales)]
    assert set(expected) == {1, 2}
    assert network_batches(engine, lambda: sample(engine, guidance_least=2.0)) == expected
    assert network_batches(engine, lambda: sample(engine, guidance_interval=[0.5, 1.0], guidance_every=2)) == [
        1
    ] * 4 + [2, 1, 2, 1]


def test_the_first_steps_keep_their_guidance(engine):
    def batches(**switches: object) -> list[int]:
        return network_batches(engine, lambda: sample(engine, **switches))

    assert batches(guidance_every=3, guidance_keep_first=4) == [2, 2, 2, 2, 1, 1, 2, 1]
    scales = engine.sampler.guidance_scales()
    expected = [2 if k < 5 or abs(scale - 1) >= 2 else 1 for k, scale in enumerate(scales)]
    assert batches(guidance_least=2.0, guidance_keep_first=5) == expected != batches(guidance_least=2.0)
    late = batches(guidance_interval=[0.5, 1.0], guidance_every=2, guidance_keep_first=6)
    assert late == [1] * 4 + [2, 2, 1, 2]  # outside the interval there is none to keep
    assert shortcuts_of(AccelerateArgs(guidance_keep_first=4)) is None  # alone it says nothing
    assert AccelerateArgs(guidance_keep_first=4).approximate() == {}


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
    run = ShortcutRun(shortcuts_of(AccelerateArgs(guidance_every=6)))
    exact = sampler(denoise, x, cond, uncond, noise_sampler=Noise())
    fast = sampler(run.around(denoise, 2, sampler.guidance_scales()), x, cond, uncond, noise_sampler=Noise())
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-4)
    # at the first step, pure noise, there is no such difference yet
    assert (run.calls.whole, run.calls.usual) == (8, 12)
    assert sampler.guidance_scales() == (4.0,) * 6 and sampler.guidance_scales(scale=2.0) == (2.0,) * 6


def test_all_switches_together_and_a_run_without_guidance(engine):
    switches = {"step_cache": True, "step_cache_keep_first": 2, "step_cache_keep_last": 1, "guidance_every": 2}
    got, run = sample(engine, guidance_interval=[0.3, 0.9], **switches)
    # whole: 0 1 (alone), 2 (guided for the first time, so in a pair and never skipped), 4 (alone), 6 (with the other
    # branch), 7 (alone); skipped: 3 5
    assert bool(got.isfinite().all()) and (run.calls.whole, run.calls.first_layer) == (8, 2)
    text = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))
    plain = {"noise": torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), "scale": 1.0}
    exact = engine.sample({"crossattn": text}, noise_sampler=Noise(), **plain)
    run = ShortcutRun(shortcuts_of(AccelerateArgs(guidance_every=2, guidance_interval=[0.2, 0.9])))
    assert torch.equal(engine.sample({"crossattn": text}, noise_sampler=Noise(), shortcuts=run, **plain), exact)
    assert run.calls.whole == run.calls.usual == STEPS


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [[0.5], [0.7, 0.3], [-0.1, 1.0], [0.0, 1.5], [0.4, 0.4]])
def test_intervals_that_cannot_be(interval):
    with pytest.raises(ConfigError, match="guidance_interval"):
        AccelerateArgs(guidance_interval=interval)


def test_shortcuts_that_could_never_be_taken(engine):
    shortcuts = shortcuts_of(AccelerateArgs(step_cache=True))
    check_shortcuts(shortcuts, engine.sampler, 9)
    with pytest.raises(SamplingError, match=r"keep_last = 8 steps, and the run has 8"):
        check_shortcuts(shortcuts, engine.sampler, 8)
    guided = shortcuts_of(AccelerateArgs(guidance_every=2, guidance_keep_first=6))
    check_shortcuts(guided, engine.sampler, 7)
    with pytest.raises(SamplingError, match=r"guidance_keep_first=6 keeps every step's guidance, and the run has 6"):
        check_shortcuts(guided, engine.sampler, 6)
    unguided = VPSDEDPMPP2MSampler(
        {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}, num_steps=6
    )
    with pytest.raises(SamplingError, match="need a guider"):
        check_shortcuts(shortcuts_of(AccelerateArgs(guidance_every=2)), unguided, 6)
    assert IdentityGuider().scale_at(3) == 1 and VanillaCFG(5.0).scale_at(3) == 5

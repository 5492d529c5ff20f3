"""Samplers as functions of a denoiser and a schedule: draws, prefixes, guidance, numbers of steps."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from sgm.modules.diffusionmodules import sampling
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler, VPODEDPMPP2MSampler, VPSDEDPMPP2MSampler

ROOT = "sgm.modules.diffusionmodules"
ZERO_SNR = {"target": f"{ROOT}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
DYNAMIC = {"target": f"{ROOT}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 50}}
VANILLA = {"target": f"{ROOT}.guiders.VanillaCFG", "params": {"scale": 6.0}}
ALL = [VideoDDIMSampler, VPSDEDPMPP2MSampler, VPODEDPMPP2MSampler]

COND, UNCOND = {"crossattn": torch.full((1, 2, 2), 0.5)}, {"crossattn": torch.zeros(1, 2, 2)}


def build(cls=VPSDEDPMPP2MSampler, num_steps=10, guider=VANILLA, **params):
    return cls(discretization_config=ZERO_SNR, num_steps=num_steps, guider_config=guider, **params)


class Recorder:
    """A smooth denoiser that notes its calls, and a noise source that notes its draws, in one list."""

    def __init__(self, seed: int = 0) -> None:
        self.events: list[tuple] = []
        self.generator = torch.Generator().manual_seed(seed)

    def denoise(self, x, sigma, cond, idx, **extras):
        self.events.append(("call", x.shape[0], idx.tolist(), sigma.tolist(), extras))
        shift = cond["crossattn"].mean((1, 2)).view(-1, 1, 1, 1, 1)
        return 0.3 * torch.tanh(x) + 0.1 * sigma.view(-1, 1, 1, 1, 1) + shift

    def draw(self, x):
        self.events.append(("draw", tuple(x.shape)))
        return torch.randn(x.shape, generator=self.generator)

    def calls(self):
        return [event for event in self.events if event[0] == "call"]

    def draws(self):
        return [event for event in self.events if event[0] == "draw"]


def run(sampler, x=None, recorder=None, cond=COND, uc=UNCOND, **kwargs):
    recorder = recorder or Recorder()
    x = torch.randn(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) if x is None else x
    return sampler(recorder.denoise, x, cond, uc, noise_sampler=recorder.draw, **kwargs), recorder


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("n", [1, 2, 3, 20, 50, 1000])
def test_any_number_of_steps_is_finite(cls, n):
    out, recorder = run(build(cls, num_steps=n))
    assert bool(torch.isfinite(out).all()) and out.dtype == torch.float32
    assert len(recorder.calls()) == n
    assert recorder.calls()[0][2] == [999.0, 999.0] and recorder.calls()[0][3] == [0.0, 0.0]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("n", [20, 50])
def test_steps_of_a_call_equal_configured_steps(cls, n):
    """With a scale that does not depend on the number of steps, asking in the call is the same as configuring."""
    asked, _ = run(build(cls, num_steps=10), num_steps=n)
    configured, _ = run(build(cls, num_steps=n))
    unset, _ = run(build(cls, num_steps=None), num_steps=n)
    assert torch.equal(asked, configured) and torch.equal(unset, configured)


def test_dynamic_scale_is_read_at_configured_steps_minus_timestep():
    """The kept quirk: k = sampler.num_steps - timestep, also when a call asks for other steps."""
    seen = []
    sampler = build(VideoDDIMSampler, num_steps=50, guider=DYNAMIC)
    scale_at = sampler.guider.scale_at
    sampler.guider.scale_at = lambda k, scale=None: seen.append(k) or scale_at(k)
    run(sampler, num_steps=4)
    assert list(dict.fromkeys(seen)) == [50 - 999, 50 - 749, 50 - 499, 50 - 249]


@pytest.mark.parametrize(("n", "draws"), [(1, 0), (2, 1), (3, 3), (10, 17), (50, 97)])
def test_sde_draws(n, draws):
    _, recorder = run(build(num_steps=n))
    assert len(recorder.draws()) == draws


def test_order_of_draws_and_calls():
    kinds = [event[0] for event in run(build(num_steps=4))[1].events]
    assert kinds == ["call", "draw", "call", "draw", "draw", "call", "draw", "draw", "call"]


def test_sde_uses_the_second_of_two_draws():
    """Changing a discarded draw changes nothing; changing a used one does."""

    def sample(replace: int | None):
        noise = torch.randn(7, 1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
        if replace is not None:
            noise[replace] += 1
        source = iter(noise)
        sampler, recorder = build(num_steps=5), Recorder()
        x = torch.zeros(1, 3, 2, 4, 4)
        return sampler(recorder.denoise, x, COND, UNCOND, noise_sampler=lambda _: next(source))

    reference = sample(None)
    changed = [not torch.equal(sample(k), reference) for k in range(7)]
    assert changed == [True, False, True, False, True, False, True]


@pytest.mark.parametrize("cls", [VideoDDIMSampler, VPODEDPMPP2MSampler])
def test_deterministic_samplers_draw_nothing(cls):
    assert not run(build(cls))[1].draws()


def test_start_noise_does_not_matter_to_the_sde_sampler_beyond_the_first_call():
    """At zero SNR the factor of x is 0: two starts give one result if the denoiser is blind to x."""

    def blind(x, sigma, cond, idx):
        return torch.ones_like(x)

    def sample(x):
        generator = torch.Generator().manual_seed(0)
        return build()(blind, x, COND, UNCOND, noise_sampler=lambda z: torch.randn(z.shape, generator=generator))

    assert torch.equal(sample(torch.zeros(1, 1, 1, 2, 2)), sample(torch.full((1, 1, 1, 2, 2), 9.0)))


def test_default_noise_is_randn_like():
    x = torch.randn(1, 2, 2, 2, 2)
    torch.manual_seed(3)
    plain = build()(Recorder().denoise, x, COND, UNCOND)
    torch.manual_seed(3)
    given = build()(Recorder().denoise, x, COND, UNCOND, noise_sampler=torch.randn_like)
    assert torch.equal(plain, given)


@pytest.mark.parametrize("cls", ALL)
def test_a_batch_gives_what_its_samples_give(cls):
    """With one generator a sample, results do not depend on the batching."""

    def per_sample(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])

    x = torch.randn(3, 2, 2, 4, 4)
    sampler, recorder = build(cls), Recorder()
    wide = [{"crossattn": c["crossattn"].repeat(3, 1, 1)} for c in (COND, UNCOND)]
    batch = sampler(recorder.denoise, x, *wide, noise_sampler=per_sample([4, 5, 6]))
    for k in range(3):
        alone = sampler(recorder.denoise, x[k : k + 1], COND, UNCOND, noise_sampler=per_sample([4 + k]))
        torch.testing.assert_close(batch[k : k + 1], alone, rtol=0, atol=1e-5)
    assert recorder.calls()[0][1] == 6


# --- guidance in the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [VideoDDIMSampler, VPSDEDPMPP2MSampler])
@pytest.mark.parametrize("guider", [VANILLA, DYNAMIC])
def test_scale_one_skips_guidance(cls, guider):
    out, recorder = run(build(cls, guider=guider), scale=1)
    assert {call[1] for call in recorder.calls()} == {1}
    unguided, _ = run(build(cls, guider=None))
    assert torch.equal(out, unguided)


def test_a_step_that_guidance_cannot_change_asks_for_the_condition_alone(monkeypatch):
    """The release's curve comes within 4e-6 of 1 at two of its 50 steps."""
    out, recorder = run(build(VideoDDIMSampler, num_steps=50, guider=DYNAMIC))
    assert [index for index, call in enumerate(recorder.calls()) if call[1] == 1] == [47, 48]
    monkeypatch.setattr(sampling, "NEGLIGIBLE", 0.0)
    both, recorder = run(build(VideoDDIMSampler, num_steps=50, guider=DYNAMIC))
    assert {call[1] for call in recorder.calls()} == {2}
    torch.testing.assert_close(out, both, rtol=0, atol=2e-5)


def test_no_guider_runs_the_condition_alone():
    _, recorder = run(build(guider=None))
    assert {call[1] for call in recorder.calls()} == {1}


def test_a_calls_scale_replaces_the_vanilla_scale():
    asked, _ = run(build(), scale=2.5)
    configured, _ = run(build(guider={**VANILLA, "params": {"scale": 2.5}}))
    assert torch.equal(asked, configured)


def test_ode_sampler_ignores_a_calls_scale_and_says_so():
    with pytest.warns(UserWarning, match="VPODEDPMPP2MSampler ignores scale=1"):
        asked, recorder = run(build(VPODEDPMPP2MSampler), scale=1)
    assert torch.equal(asked, run(build(VPODEDPMPP2MSampler))[0])
    assert {call[1] for call in recorder.calls()} == {2}


def test_without_unconditional_conditions_both_halves_are_the_condition():
    out, recorder = run(build(), uc=None)
    assert recorder.calls()[0][1] == 2
    torch.testing.assert_close(out, run(build(), scale=1)[0], rtol=0, atol=1e-5)


def test_extras_reach_the_denoiser_only_when_given():
    ofs = torch.tensor([2.0])
    assert run(build())[1].calls()[0][4] == {}
    assert run(build(), ofs=ofs)[1].calls()[0][4] == {"ofs": ofs}


# --- fixed frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_fixed_frames_stay(cls):
    x = torch.randn(1, 3, 2, 4, 4)
    seen = []
    recorder = Recorder()

    def denoise(x, sigma, cond, idx):
        seen.append(x[:, :1].clone())
        return recorder.denoise(x, sigma, cond, idx)

    out = build(cls, fixed_frames=1)(denoise, x, COND, UNCOND, noise_sampler=recorder.draw)
    assert torch.equal(out[:, :1], x[:, :1]) and not torch.equal(out[:, 1:], x[:, 1:])
    assert all(torch.equal(frame, x[:, :1].repeat(2, 1, 1, 1, 1)) for frame in seen)


def test_sdedit_noises_the_kept_frames_before_each_step():
    x = torch.randn(1, 3, 2, 4, 4)
    out, recorder = run(build(num_steps=4, fixed_frames=1, sdedit=True), x)
    assert torch.equal(out[:, :1], x[:, :1])
    one, three = ("draw", (1, 1, 2, 4, 4)), ("draw", (1, 3, 2, 4, 4))
    order = [event if event[0] == "draw" else "call" for event in recorder.events]
    assert order == [one, "call", three, one, "call", three, three, one, "call", three, three, one, "call"]


def test_fixed_frames_of_a_call():
    x = torch.randn(1, 3, 2, 4, 4)
    out, _ = run(build(), x, fixed_frames=2)
    assert torch.equal(out[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="fixed_frames=4 does not fit a latent of 3 frames"):
        run(build(fixed_frames=4), x)


# --- interface --------------------------------------------------------------------------------------------------------


def test_callback_sees_every_step():
    seen = []
    out, _ = run(build(num_steps=3), callback=lambda i, n, x, denoised: seen.append((i, n, x, denoised)))
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(seen[-1][2], out) and torch.equal(seen[-1][3], out)


def test_half_precision_start_is_sampled_in_float32():
    seen = []
    x = torch.randn(1, 1, 1, 2, 2).half()
    out = build()(lambda x, s, c, idx: seen.append(x.dtype) or (0.1 * x).half(), x, COND, UNCOND)
    assert out.dtype == torch.float32 and set(seen) == {torch.float32}


def test_verbose_shows_progress_on_a_terminal(capsys, monkeypatch):
    run(build(verbose=True))
    assert capsys.readouterr().err == "", "a log would hold every stage of the bar"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(build(verbose=True))
    assert "10/10" in capsys.readouterr().err
    run(build())
    assert capsys.readouterr().err == ""


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="no number of steps: set sampler_config.params.num_steps"):
        run(build(num_steps=None))
    with pytest.raises(ValueError, match="1 to 1000, not 1001"):
        run(build(), num_steps=1001)
    legacy = {"target": f"{ROOT}.discretizer.LegacyDDPMDiscretization"}
    with pytest.raises(ValueError, match="ZeroSNRDDPMDiscretization"):
        run(VideoDDIMSampler(discretization_config=legacy, num_steps=10))


# --- update rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [sampling.ddim_step, sampling.dpmpp_ode_step])
def test_deterministic_steps_follow_the_exact_path_of_a_point(step):
    """If the data is one point, x = a D + sigma eps with a fixed eps solves the ODE, and both rules are exact."""
    point, eps = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    a, a_next = 0.4, 0.7
    x = a * point + math.sqrt(1 - a**2) * eps
    wanted = a_next * point + math.sqrt(1 - a_next**2) * eps
    torch.testing.assert_close(step(x, point, a, a_next), wanted)


def test_sde_step_keeps_the_marginal_variance():
    """From x = a D + sigma e, the step's x' has mean a' D and variance 1 - a'^2."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    eps, fresh = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    for a, a_next in ((0.0, 0.1), (0.3, 0.5), (0.9, 0.95)):
        x = a * 2.0 + math.sqrt(1 - a**2) * eps
        after = sampling.dpmpp_sde_step(x, torch.full_like(x, 2.0), fresh, a, a_next)
        assert after.mean().item() == pytest.approx(2.0 * a_next, abs=0.01)
        assert after.var().item() == pytest.approx(1 - a_next**2, rel=0.02)


def test_extrapolation_is_first_order_after_zero_snr_and_second_order_later():
    now, before = torch.tensor([3.0]), torch.tensor([1.0])
    assert sampling.extrapolate_2m(now, None, math.nan, 0.0, 0.1).item() == 3.0
    assert sampling.extrapolate_2m(now, before, 0.0, 0.1, 0.2).item() == 3.0
    a = [1 / math.sqrt(1 + math.exp(-2 * lam)) for lam in (-1.0, -0.5, 0.0)]  # even steps in lambda: r = 1
    assert sampling.extrapolate_2m(now, before, *a).item() == pytest.approx(4.0)


def test_half_log_snr_at_the_ends():
    assert sampling.half_log_snr(0.0) == -math.inf and sampling.half_log_snr(1.0) == math.inf
    assert sampling.half_log_snr(math.sqrt(0.5)) == pytest.approx(0.0)

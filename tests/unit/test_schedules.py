"""Noise schedules, the denoiser's table and its coefficients."""

from __future__ import annotations

import copy

import pytest
import torch

from sgm.modules.diffusionmodules import denoiser_scaling, denoiser_weighting
from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import (
    LegacyDDPMDiscretization,
    ZeroSNRDDPMDiscretization,
    shift_snr,
    trailing_timesteps,
)
from sgm.typed import ConfigError
from sgm.util import TargetError, instantiate_from_config

ROOT = "sgm.modules.diffusionmodules"
ZERO_SNR = {"target": f"{ROOT}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
LEGACY = {"target": f"{ROOT}.discretizer.LegacyDDPMDiscretization"}


def config(module: str, name: str) -> dict:
    return {"target": f"{ROOT}.{module}.{name}"}


def discrete(scaling: str = "VideoScaling", table: dict = ZERO_SNR, **params) -> DiscreteDenoiser:
    return DiscreteDenoiser(
        config("denoiser_weighting", "EpsWeighting"),
        config("denoiser_scaling", scaling),
        1000,
        table,
        **{"quantize_c_noise": False, **params},
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [2, 7, 20, 50, 999, 1000])
def test_signal_rates_rise_from_zero_below_one(n, shift):
    values = ZeroSNRDDPMDiscretization(shift_scale=shift)(n, do_append_zero=False)
    assert values.shape == (n,) and values.dtype == torch.float32
    assert values[0] == 0 and values[-1] < 1
    assert bool((values.diff() > 0).all())


def test_one_step_is_pure_noise():
    values, timesteps = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1, do_append_zero=False, return_idx=True)
    assert values.tolist() == [0.0] and timesteps.tolist() == [999]


def test_every_step_with_indices():
    values, timesteps = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1000, do_append_zero=False, return_idx=True)
    assert timesteps.tolist() == list(range(1000)) and len(values) == 1000


def test_last_value_of_a_run_is_its_own_not_the_tables():
    disc = ZeroSNRDDPMDiscretization(shift_scale=3.0)
    run, timesteps = disc(50, do_append_zero=False, return_idx=True)
    table = disc(1000, do_append_zero=False, flip=True)[timesteps].flip(0)
    difference = (run - table).abs()
    assert difference[0] == 0 and 5e-4 < difference.max() < 2e-3


def test_append_zero_and_flip():
    disc = ZeroSNRDDPMDiscretization()
    plain = disc(10, do_append_zero=False)
    assert torch.equal(disc(10), torch.cat([plain, torch.zeros(1)]))
    assert torch.equal(disc(10, flip=True), disc(10).flip(0))
    assert torch.equal(disc(10, do_append_zero=False, flip=True), plain.flip(0))


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_steps_out_of_range(n):
    with pytest.raises(ConfigError, match=rf"1 to 1000, not {n}"):
        ZeroSNRDDPMDiscretization()(n)


def test_bad_parameters():
    with pytest.raises(TargetError, match="shift_scale: must be above 0"):
        target = f"{ZeroSNRDDPMDiscretization.__module__}.ZeroSNRDDPMDiscretization"
        instantiate_from_config({"target": target, "params": {"shift_scale": 0}})
    with pytest.raises(ConfigError, match="linear_start <= linear_end"):
        LegacyDDPMDiscretization(linear_start=0.5, linear_end=0.1)


def test_shift_divides_the_signal_to_noise_ratio():
    abar = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    shifted = shift_snr(abar, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), abar / (1 - abar) / 3)


def test_keep_start_keeps_the_first_beta():
    kept = ZeroSNRDDPMDiscretization(shift_scale=3.0, keep_start=True)
    assert 1 - kept.alphas_cumprod[0] == pytest.approx(0.00085, rel=1e-6)
    assert 1 - ZeroSNRDDPMDiscretization(shift_scale=3.0).alphas_cumprod[0] == pytest.approx(3 * 0.00085, rel=1e-2)


def test_trailing_timesteps():
    assert trailing_timesteps(4, 1000).tolist() == [249, 499, 749, 999]
    assert trailing_timesteps(50, 1000)[:2].tolist() == [19, 39]
    for n in (1, 3, 17, 333, 999, 1000):
        steps = trailing_timesteps(n, 1000)
        assert steps[-1] == 999 and len(set(steps.tolist())) == n and steps[0] >= 0


def test_legacy_is_noise_over_signal():
    disc = LegacyDDPMDiscretization()
    sigmas = disc(1000, do_append_zero=False)
    assert bool((sigmas.diff() < 0).all()) and 10 < sigmas[0] < 20
    abar = torch.tensor(disc.alphas_cumprod).flip(0)
    torch.testing.assert_close(1 / (1 + sigmas.double() ** 2), abar, rtol=1e-5, atol=1e-7)


# --- denoiser ---------------------------------------------------------------------------------------------------------


def test_table_is_no_state_keeps_float32_and_is_real_under_meta():
    with torch.device("meta"):
        denoiser = discrete()
    assert denoiser.sigmas.device.type == "cpu" and denoiser.sigmas[999] == 0
    before = denoiser.sigmas.clone()
    denoiser.half()
    assert not denoiser.state_dict() and denoiser.sigmas.dtype == torch.float32
    assert torch.equal(copy.deepcopy(denoiser).sigmas, before)


def test_table_follows_the_input_device():
    assert discrete().table_on(torch.device("meta")).device.type == "meta"


def test_quantising_takes_the_nearest_entry():
    denoiser = discrete()
    sigma = torch.tensor([0.0, 0.35, 0.9719, 1.0])
    snapped = denoiser.quantize_sigma(sigma)
    distance = (denoiser.sigmas[None] - sigma[:, None]).abs().min(dim=1).values
    assert torch.equal((snapped - sigma).abs(), distance)
    assert denoiser.sigma_to_idx(sigma).tolist()[::3] == [999, 0]


@pytest.mark.parametrize("idx", [torch.tensor([999, 3]), torch.tensor([999.0, 3.0])])
def test_network_is_told_the_timestep_unchanged(idx):
    heard = {}

    def network(x, t, cond, **kwargs):
        heard.update(t=t, kwargs=kwargs, cond=cond)
        return torch.zeros_like(x, dtype=torch.float16)

    x = torch.randn(2, 3, 4, 2, 2)
    out = discrete()(network, x, torch.tensor([0.0, 0.99]), {"crossattn": 1}, idx=idx, ofs=7)
    assert torch.equal(heard["t"], idx) and heard["t"].dtype == idx.dtype
    assert heard["kwargs"] == {"ofs": 7} and heard["cond"] == {"crossattn": 1}
    assert out.dtype == torch.float32
    assert bool((out[0] == 0).all())  # a = 0: nothing of x remains


def test_a_perfect_network_gives_the_clean_sample():
    denoiser = discrete()
    clean, noise = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    idx = torch.tensor([700, 0])
    a = denoiser.idx_to_sigma(idx)
    wide = a.view(-1, 1, 1, 1, 1)
    noised, velocity = wide * clean + (1 - wide**2).sqrt() * noise, wide * noise - (1 - wide**2).sqrt() * clean
    out = denoiser(lambda x, t, cond: velocity, noised, a, {}, idx=idx)
    torch.testing.assert_close(out, clean, rtol=0, atol=1e-5)


def test_video_scaling_needs_timesteps_and_signal_rates():
    with pytest.raises(ValueError, match="needs the timesteps"):
        discrete()(lambda x, t, c: x, torch.zeros(1, 2), torch.zeros(1), {})
    with pytest.raises(ValueError, match="quantize_c_noise: False"):
        discrete(quantize_c_noise=True)
    with pytest.raises(ValueError, match="Use ZeroSNRDDPMDiscretization"):
        discrete(table=LEGACY)


def test_quantised_noise_label_is_the_table_index():
    heard = []
    denoiser = discrete("EpsScaling", LEGACY, quantize_c_noise=True)
    denoiser(lambda x, t, c: heard.append(t) or x, torch.zeros(2, 3), denoiser.sigmas[[5, 900]], {})
    assert heard[0].tolist() == [5, 900]


@pytest.mark.parametrize("name", ["EpsScaling", "VScaling", "EDMScaling", "VScalingWithEDMcNoise"])
def test_variance_exploding_scalings_recover_the_clean_sample(name):
    """For each parametrisation, the network output that its definition calls perfect gives back the clean sample."""
    scaling = getattr(denoiser_scaling, name)()
    clean, noise = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    sigma = torch.tensor([1.7], dtype=torch.float64)
    c = scaling(sigma)
    x = clean + sigma * noise
    perfect = {
        "EpsScaling": noise,
        "VScaling": (noise - sigma * clean) / (1 + sigma**2).sqrt(),
        "VScalingWithEDMcNoise": (noise - sigma * clean) / (1 + sigma**2).sqrt(),
        "EDMScaling": (clean - x * 0.25 / (sigma**2 + 0.25)) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5),
    }[name]
    torch.testing.assert_close(c.skip * x + c.out * perfect, clean)
    label = 0.25 * sigma.log() if "EDM" in name else sigma
    torch.testing.assert_close(c.noise, label)


def test_weightings():
    sigma = torch.tensor([0.5, 2.0])
    assert denoiser_weighting.UnitWeighting()(sigma).tolist() == [1, 1]
    assert denoiser_weighting.EpsWeighting()(sigma).tolist() == [4, 0.25]
    torch.testing.assert_close(denoiser_weighting.VWeighting()(sigma), 1 + 1 / sigma**2)
    torch.testing.assert_close(denoiser_weighting.EDMWeighting()(sigma), 4 + 1 / sigma**2)


def test_plain_denoiser_uses_sigma_as_it_is():
    weighting, scaling = config("denoiser_weighting", "UnitWeighting"), config("denoiser_scaling", "EpsScaling")
    denoiser = Denoiser(weighting, scaling)
    x, sigma = torch.randn(2, 3, 4), torch.tensor([0.123, 4.56])
    out = denoiser(lambda x, t, c: torch.ones_like(x), x, sigma, {})
    torch.testing.assert_close(out, x - sigma.view(2, 1, 1))

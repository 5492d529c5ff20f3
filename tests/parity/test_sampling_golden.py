"""Schedules, guidance scales and whole sampler runs against the original.

`tests/golden/sampling_analytic.safetensors` holds runs of the original with a network that acts on every element by
itself, v = 0.6 x + mean(context) cos(x) - 0.2 sin(t / 160), so a crop of a few elements (3 channels, 2 x 2) of all
frames says as much as the whole. The runs of the small transformer need the full reference set.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.guiders import DynamicCFG
from sgm.util import get_obj_from_str, instantiate_from_config

ROOT = "sgm.modules.diffusionmodules"
ZERO_SNR = {"target": f"{ROOT}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
TOLERANCE = 1e-4
SDE, ODE, DDIM = "VPSDEDPMPP2MSampler", "VPODEDPMPP2MSampler", "VideoDDIMSampler"


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "sampling_analytic.safetensors")


@pytest.fixture(scope="module")
def denoiser() -> DiscreteDenoiser:
    return DiscreteDenoiser(
        {"target": f"{ROOT}.denoiser_weighting.EpsWeighting"},
        {"target": f"{ROOT}.denoiser_scaling.VideoScaling"},
        1000,
        ZERO_SNR,
        quantize_c_noise=False,
    )


def analytic_network(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    mean = cond["crossattn"].mean((1, 2)).view(-1, 1, 1, 1, 1)
    return 0.6 * x + mean * torch.cos(x) - 0.2 * torch.sin(t / 160).view(-1, 1, 1, 1, 1)


def guider(name: str, num_steps: int) -> dict:
    if name.startswith("vanilla"):
        return {"target": f"{ROOT}.guiders.VanillaCFG", "params": {"scale": 6.0}}
    steps = 50 if name == "guider50" else num_steps
    return {"target": f"{ROOT}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": steps}}


def build(cls: str, num_steps: int, guidance: str, **params):
    return get_obj_from_str(f"{ROOT}.sampling.{cls}")(
        discretization_config=ZERO_SNR, num_steps=num_steps, guider_config=guider(guidance, num_steps), **params
    )


def sample(sampler, denoise, cases, noise=None, **kwargs) -> tuple[Tensor, list[Tensor]]:
    """The result and x after every step, with the recorded noise in its order."""
    source = iter(cases["noise"] if noise is None else noise)
    steps: list[Tensor] = []
    out = sampler(
        denoise,
        cases["x0"],
        {"crossattn": cases["context"]},
        {"crossattn": cases["uncond_context"]},
        noise_sampler=lambda x: next(source),
        callback=lambda i, n, x, denoised: steps.append(x),
        **kwargs,
    )
    return out, steps


def worst(got: Tensor, wanted: Tensor) -> float:
    return (got - wanted).abs().max().item()


# --- schedules and scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("n", [4, 10, 50, 1000])
def test_schedule(cases, shift, n):
    values, timesteps = ZeroSNRDDPMDiscretization(shift_scale=shift)(n, do_append_zero=False, return_idx=True)
    assert worst(values, cases[f"shift{shift}.n{n}.alphas_cumprod_sqrt"]) <= 1e-6
    assert timesteps.tolist() == [1000 * (k + 1) // n - 1 for k in range(n)]


def test_flipped_table(cases, denoiser):
    assert worst(denoiser.sigmas, cases["shift3.n1000.flip"]) <= 1e-6


@pytest.mark.parametrize("option", ["keep_start", "post_shift"])
def test_schedule_options(cases, option):
    values = ZeroSNRDDPMDiscretization(shift_scale=3.0, **{option: True})(1000, do_append_zero=False)
    assert worst(values, cases[f"options.{option}.n1000"]) <= 1e-6


def test_cumulative_products(shared_golden):
    full = load_file(shared_golden / "sampling_io.safetensors")
    for shift in (1, 3):
        ours = torch.tensor(ZeroSNRDDPMDiscretization(shift_scale=shift).alphas_cumprod)
        assert worst(ours, full[f"shift{shift}.alphas_cumprod_f64"]) <= 1e-12


@pytest.mark.parametrize("n", [10, 50])
def test_snapped_values(cases, denoiser, n):
    values = ZeroSNRDDPMDiscretization(shift_scale=3.0)(n, do_append_zero=False)
    assert worst(denoiser.quantize_sigma(values), cases[f"n{n}.denoiser_quantised"]) <= 1e-6


@pytest.mark.parametrize(("sampler_steps", "guider_steps"), [(50, 50), (10, 10), (10, 50)])
def test_dynamic_scales(cases, sampler_steps, guider_steps):
    wanted = cases[f"dynamic_cfg.sampler{sampler_steps}_guider{guider_steps}.scale_f64"]
    timesteps = range(999, 0, -1000 // sampler_steps)
    ours = [DynamicCFG(6, 5, guider_steps).scale_at(sampler_steps - t) for t in timesteps]
    assert worst(torch.tensor(ours, dtype=torch.float64), wanted) <= 1e-9


# --- runs with the analytic network -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "n", "case", "params", "call"),
    [
        (SDE, 10, "dynamic", {}, {}),
        (ODE, 10, "dynamic", {}, {}),
        (DDIM, 10, "dynamic", {}, {}),
        (SDE, 50, "dynamic", {}, {}),
        (ODE, 50, "dynamic", {}, {}),
        (DDIM, 50, "dynamic", {}, {}),
        (SDE, 10, "guider50", {}, {}),
        (SDE, 10, "vanilla6", {}, {}),
        (DDIM, 10, "vanilla6", {}, {}),
        (DDIM, 10, "vanilla6_scale_arg2.5", {}, {"scale": 2.5}),
        (DDIM, 10, "scale_arg1_no_guidance", {}, {"scale": 1}),
        (SDE, 10, "fixed1", {"fixed_frames": 1}, {}),
        (SDE, 10, "fixed1_sdedit", {"fixed_frames": 1, "sdedit": True}, {}),
    ],
)
def test_run(cases, denoiser, cls, n, case, params, call):
    noise = [cases[f"noise_sdedit.{k:02d}"] for k in range(27)] if params.get("sdedit") else None
    out, steps = sample(build(cls, n, case, **params), partial(denoiser, analytic_network), cases, noise, **call)
    name = f"analytic.{cls}.{n}.{case}"
    if n == 10:
        assert worst(torch.stack(steps), cases[f"{name}.steps"]) <= TOLERANCE
    else:
        some = torch.stack([steps[k] for k in (0, 1, 10, 25, 48)])
        assert worst(some, cases[f"{name}.steps_0_1_10_25_48"]) <= TOLERANCE
    assert worst(out, cases[f"{name}.final"]) <= TOLERANCE


def test_all_recorded_runs_are_covered(cases):
    recorded = {name.rsplit(".", 1)[0] for name in cases if name.startswith("analytic.") and name.endswith(".final")}
    assert len(recorded) == 13


def test_the_tolerance_tells_right_from_wrong(cases, denoiser):
    """Leaving out the snap to the denoiser's own table, the smallest of the usual slips, is caught."""

    def unsnapped(x, sigma, cond, idx):
        c = denoiser.scaling(sigma.view(-1, 1, 1, 1, 1), idx=idx)
        return c.skip * x + c.out * analytic_network(x, idx, cond)

    out, _ = sample(build(SDE, 10, "dynamic"), unsnapped, cases)
    assert worst(out, cases[f"analytic.{SDE}.10.dynamic.final"]) > 5 * TOLERANCE


# --- runs with the small transformer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(shared_golden: Path) -> dict[str, Tensor]:
    return load_file(shared_golden / "sampling_io.safetensors")


@pytest.fixture(scope="module")
def network(shared_golden: Path):
    """The wrapper around the small transformer with the original's weights."""
    import yaml

    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

    config = yaml.safe_load((shared_golden / "tiny_engine.yaml").read_text())["model"]["network_config"]
    net = instantiate_from_config(config).eval()
    state = load_file(shared_golden / "dit_state.safetensors")
    net.load_state_dict({name.removeprefix("model.diffusion_model."): value for name, value in state.items()})
    return OpenAIWrapper(net)


@torch.no_grad()
@pytest.mark.parametrize("k", [0, 1, 2])
def test_denoiser_with_transformer(full, denoiser, network, k):
    case = {name: full[f"denoise{k}.{name}"] for name in ("x", "alpha_sqrt", "idx", "out")}
    cond = {"crossattn": torch.cat([full["uncond_context"], full["context"]])}
    out = denoiser(network, case["x"], case["alpha_sqrt"], cond, idx=case["idx"])
    assert worst(out, case["out"]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("cls", "n"), [(SDE, 10), (ODE, 10), (DDIM, 10), (SDE, 50), (DDIM, 50)])
def test_run_with_transformer(full, denoiser, network, cls, n):
    out, steps = sample(build(cls, n, "dynamic"), partial(denoiser, network), full)
    name = f"dit.{cls}.{n}"
    if f"{name}.steps" in full:
        assert worst(torch.stack(steps), full[f"{name}.steps"]) <= TOLERANCE
    assert worst(out, full[f"{name}.final"]) <= TOLERANCE


def test_recorded_calls(cases, denoiser, shared_golden):
    """What the original's network was told, and how often noise was drawn."""
    facts = json.loads((shared_golden / "sampling_facts.json").read_text())["runs"]
    for name, fact in facts.items():
        cls, n, case = name.split(".", 2)
        calls: list[tuple[int, list[float]]] = []
        draws: list[int] = []

        def network(x, t, cond, calls=calls):
            calls.append((x.shape[0], t.tolist()))
            return analytic_network(x, t, cond)

        params = {"fixed_frames": 1, "sdedit": "sdedit" in case} if "fixed" in case else {}
        scale = {"vanilla6_scale_arg2.5": 2.5, "scale_arg1_no_guidance": 1}.get(case)
        build(cls, int(n), case, **params)(
            partial(denoiser, network),
            cases["x0"],
            {"crossattn": cases["context"]},
            {"crossattn": cases["uncond_context"]},
            scale=scale,
            noise_sampler=lambda x, draws=draws: draws.append(1) or torch.zeros_like(x),
        )
        assert len(draws) == fact["noise_draws"] and len(calls) == fact["network_calls"]
        for recorded, got in (("first_call", calls[0]), ("second_call", calls[1]), ("last_call", calls[-1])):
            assert got == (fact[recorded]["batch"], fact[recorded]["t"])

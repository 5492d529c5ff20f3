"""5B, 5B-I2V, 1.5 and 1.5-I2V against the original at tiny sizes: whole samples, decoded clips, image latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange

from tests.family_tiny import cases_of, engine_of, replay, text

RUNS = {"t2v_5b": ("t2v_5b", "decoded"), "i2v_5b": ("i2v_5b", ""), "t2v_15.r0": ("t2v_15", "decoded_first_latent_dropped"),
        "t2v_15.r1": ("t2v_15", ""), "i2v_15": ("i2v_15", "")}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_samples(family_golden: Path, run: str) -> None:
    """Ten steps from recorded noise; the image's latents from its pixels and the recorded draw of the posterior."""
    case, decoded = RUNS[run]
    engine, cases = engine_of(family_golden, case), cases_of(family_golden, case)
    x, image, steps = cases[f"{run}.x0"], None, []
    if f"{run}.image" in cases:
        pixels = cases[f"{run}.image"]
        image = engine.encode_image(pixels, x.shape[1], noise=cases[f"{run}.image_posterior"])
        torch.testing.assert_close(image, cases[f"{run}.concat"], rtol=0, atol=2e-5)
    samples = engine.sample(
        *text(cases, run),
        noise=x,
        image=image,
        noise_sampler=replay(cases[f"{run}.noise"]),
        callback=lambda _k, _n, x, denoised: steps.append((x, denoised)),
    )
    torch.testing.assert_close(steps[0][1], cases[f"{run}.denoised0"], rtol=0, atol=2e-5)
    torch.testing.assert_close(steps[0][0], cases[f"{run}.step0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(steps[4][0], cases[f"{run}.step4"], rtol=0, atol=1e-4)
    torch.testing.assert_close(samples, cases[f"{run}.samples"], rtol=0, atol=1e-4)
    if decoded:
        z = rearrange(engine.drop_first(samples), "b t c h w -> b c t h w")
        pixels = engine.autoencoder.decode(z / engine.scale_factor)
        torch.testing.assert_close(pixels, cases[f"{run}.{decoded}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("run", "name"), [("t2v_5b", "rotary_5b."), ("t2v_15.r0", "r0.rotary_"), ("t2v_15.r1", "r1.rotary_")]
)
def test_rotations(family_golden: Path, run: str, name: str) -> None:
    """Tables of the configured grid, or the part of them that a smaller size takes."""
    case = RUNS[run][0]
    network, cases = engine_of(family_golden, case).network, cases_of(family_golden, case)
    x = cases[f"{run}.x0"]
    key = name if case == "t2v_5b" else f"{case}.{name}"
    table = network.positions.rotary(network.patch.grid(x.shape[1], *x.shape[3:]), x)
    assert table is not None
    for part in ("cos", "sin"):
        expected = cases[f"{key}{part}"]
        torch.testing.assert_close(getattr(table, part).view_as(expected), expected, rtol=0, atol=1e-6)

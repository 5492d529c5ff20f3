"""A whole sample, latents and pixels, against diffusers' pipeline: its loop, transformer, schedulers and VAE, our weights.

Both start from the same noise and draw the same noise on the way; prompt embeddings and zero negatives are given. With
our schedule in their scheduler both agree; with the stock schedulers they are as far apart as docs/figures.md says.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.convert import dit_keys, dit_sizes, vae_keys
from sgm.models.diffusion import SATVideoDiffusionEngine
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_config
from tests.training_tiny import DISCRETIZATION, MODULES, model_section

diffusers = pytest.importorskip("diffusers")

SCALE = 1.15258426
SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear", clip_sample=False, snr_shift_scale=3.0,
    prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, set_alpha_to_one=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> SATVideoDiffusionEngine:
    model = model_section(tmp_path_factory.mktemp("none"))
    del model["conditioner_config"], model["loss_fn_config"], model["first_stage_config"]["params"]["ckpt_path"]
    model["network_config"] = tiny_config()
    engine = SATVideoDiffusionEngine(**model).eval()
    draw = torch.Generator().manual_seed(5)
    for name, parameter in engine.named_parameters():
        if "pos_embedding" not in name:
            spread = 0.08 if name.startswith("model.") else 0.3 * (parameter.ndim == 1)
            with torch.no_grad():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                if spread:
                    parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=draw))
    return engine


@pytest.fixture(scope="module")
def theirs(engine) -> Any:
    coder = model_section(Path("nowhere"))["first_stage_config"]["params"]["decoder_config"]["params"]
    vae = diffusers.AutoencoderKLCogVideoX(**vae_keys.hf_config(coder, scale_factor=SCALE)).eval()
    vae.load_state_dict(vae_keys.sat_to_hf(engine.first_stage_model.state_dict()), strict=True)
    transformer = diffusers.CogVideoXTransformer3DModel(**dit_sizes.hf_config(tiny_config()["params"])).eval()
    transformer.load_state_dict(dit_keys.sat_to_hf(engine.network.state_dict()), strict=True)
    transformer.norm_out.norm.eps = 1e-6
    pipeline = diffusers.CogVideoXPipeline(None, None, vae, transformer, diffusers.CogVideoXDPMScheduler(**SCHEDULE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def inject(scheduler: Any, engine: SATVideoDiffusionEngine, steps: int) -> Any:
    """Put our values into one of diffusers' schedulers: those of the run, and the denoiser's table that x0 comes from."""
    schedule = engine.sampler.schedule(steps)
    signal = torch.tensor(schedule.signal[:-1])
    snapped = engine.denoiser.quantize_sigma(signal).double()
    timesteps = torch.tensor(schedule.timesteps)
    scheduler.alphas_cumprod[timesteps] = signal.double() ** 2
    table = torch.zeros(1000, dtype=torch.float64)
    table[timesteps] = snapped
    original = scheduler.step

    @wraps(original)  # the pipeline reads the signature
    def step(model_output: Tensor, *arguments: Any, **options: Any) -> Any:
        *_, timestep, sample = arguments if len(arguments) == 2 else (arguments[1], arguments[3])
        a, alpha = table[timestep], scheduler.alphas_cumprod[timestep]
        clean = a * sample - (1 - a**2).sqrt() * model_output
        return original((alpha.sqrt() * sample - clean) / (1 - alpha).sqrt(), *arguments, **options)

    scheduler.step = step
    return scheduler


@torch.no_grad()
def sample_both(
    engine: SATVideoDiffusionEngine, theirs: Any, sampler: str, steps: int, injected: bool
) -> dict[str, Tensor]:
    """Latents (1, 3, 16, 6, 10) and pixels in [0, 1], ours and theirs."""
    from sgm.util import instantiate_from_config

    engine.sampler = instantiate_from_config({
        "target": f"{MODULES}.sampling.{sampler}",
        "params": {"num_steps": steps, "discretization_config": DISCRETIZATION, "guider_config": {
            "target": f"{MODULES}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": steps}}},
    })  # fmt: skip
    kinds = {
        "VideoDDIMSampler": diffusers.CogVideoXDDIMScheduler,
        "VPSDEDPMPP2MSampler": diffusers.CogVideoXDPMScheduler,
    }
    scheduler = kinds[sampler](**SCHEDULE)
    theirs.scheduler = inject(scheduler, engine, steps) if injected else scheduler
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 3, 16, 6, 10, generator=draw)
    text = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draw)
    state = draw.get_state()
    ours = engine.sample({"crossattn": text}, {"crossattn": torch.zeros_like(text)}, noise=noise,
                         noise_sampler=lambda x: torch.randn(x.shape, generator=draw))  # fmt: skip
    common = dict(height=48, width=80, num_frames=9, num_inference_steps=steps, guidance_scale=6.0,
                  use_dynamic_cfg=True, prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text),
                  return_dict=False, output_type="latent")  # fmt: skip
    draw.set_state(state)
    other = theirs(latents=noise, generator=draw, **common)[0]
    pixels = engine.decode_first_stage(ours.transpose(1, 2))
    return {
        "latents": ours, "their latents": other,
        "pixels": ((pixels + 1) / 2).clamp(0, 1),
        "their pixels": (theirs.decode_latents(other) / 2 + 0.5).clamp(0, 1),
    }  # fmt: skip


@pytest.mark.parametrize("sampler", ["VideoDDIMSampler", "VPSDEDPMPP2MSampler"])
def test_agrees_with_our_schedule(engine, theirs, sampler):
    found = sample_both(engine, theirs, sampler, steps=20, injected=True)
    assert found["latents"].std() > 0.3 and found["pixels"].std() > 0.05
    torch.testing.assert_close(found["latents"], found["their latents"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pixels"], found["their pixels"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["VideoDDIMSampler", "VPSDEDPMPP2MSampler"])
def test_differs_from_the_stock_schedulers_as_documented(engine, theirs, sampler):
    found = sample_both(engine, theirs, sampler, steps=50, injected=False)
    rms = (found["latents"] - found["their latents"]).square().mean().sqrt() / found["latents"].square().mean().sqrt()
    print(f"{sampler}: {rms:.3%} rms of the latents")
    assert 1e-4 < rms < 0.05

"""Converted folders in diffusers: the same numbers from the pipeline's parts, a whole sample, and adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sgm.config import merge_yaml
from sgm.convert.to_hf import ToHf, convert, export_lora
from sgm.util import instantiate_from_config
from sgm.weights.release import NETWORK_PREFIX, Adapter, read_transformer
from sgm.weights.save import save_pt
from tests.convert_tiny import adapter_matrices, make_release, model_section, network_of, rewrite
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH, random_inputs

diffusers = pytest.importorskip("diffusers")

SCALE, STEPS, GUIDANCE = 1.15258426, 5, 6.0


@pytest.fixture(scope="module")
def pipeline_folder(sat_release: Path, sat_yaml: Path) -> Path:
    out = sat_release.parent / "hf"
    request = ToHf(out, sat_release / "transformer", sat_release / "vae" / "3d-vae.pt", str(sat_release / "t5"),
                   dtype=torch.float32, config=sat_yaml, shard_bytes=1 << 20)  # fmt: skip
    convert(request)
    return out


@pytest.fixture(scope="module")
def pipeline(pipeline_folder: Path) -> Any:
    pipe = diffusers.CogVideoXPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.norm_out.norm.eps = 1e-6  # SAT's; diffusers' configuration has one eps for all
    return pipe


@torch.no_grad()
def theirs(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return transformer(inputs["x"], inputs["context"], inputs["timesteps"], return_dict=False)[0]


@torch.no_grad()
def ours(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return network(**inputs)


def test_transformer(sat_release: Path, pipeline: Any) -> None:
    inputs = random_inputs()
    expected = ours(network_of(sat_release / "transformer"), inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(pipeline.transformer, inputs), expected, rtol=0, atol=5e-6)


@torch.no_grad()
def test_first_stage(sat_release: Path, pipeline: Any) -> None:
    stage = instantiate_from_config(model_section(sat_release)["first_stage_config"]).eval()
    x = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = stage.moments(x)[:, :16]
    moments = pipeline.vae.encode(x).latent_dist.mean
    torch.testing.assert_close(moments, z, rtol=0, atol=5e-5)
    torch.testing.assert_close(pipeline.vae.decode(z).sample, stage.decode(z), rtol=0, atol=5e-5)
    assert pipeline.vae.config.scaling_factor == SCALE


@torch.no_grad()
def test_text_encoder_and_tokenizer(sat_release: Path, pipeline: Any) -> None:
    conditioner = instantiate_from_config(model_section(sat_release)["conditioner_config"]).eval()
    prompt = "a red ball rolls over 3 green fields, slowly, and then it stops"
    expected = conditioner.embedders[0]([prompt])
    found, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class OurSchedule:
    """SAT's schedule and DPM-Solver++(2M) SDE as a diffusers scheduler, written from the formulas.

    The noise levels are those of the subset of steps; the denoised estimate uses the nearest entry of the
    1000-entry table. Each middle step draws noise twice and uses the second.
    """

    order, init_noise_sigma = 1, 1.0
    config = None

    def __init__(self, levels: Tensor, timesteps: Tensor, table: Tensor, noises: list[Tensor]) -> None:
        self.levels, self.timesteps, self.table, self.noises = levels, timesteps, table, list(noises)
        self.last: Tensor | None = None

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        assert steps == len(self.timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(self, v: Tensor, timestep: Tensor, x: Tensor, **_: Any) -> tuple[Tensor]:
        k = int((self.timesteps == timestep).nonzero()[0])
        a, b = self.levels[k].double(), self.levels[k + 1].double()
        near = self.table[(self.table - self.levels[k]).abs().argmin()]
        d = near * x - (1 - near**2).sqrt() * v
        if k == len(self.timesteps) - 1:
            return (d,)
        lam = [(s / (1 - s**2).sqrt()).log() for s in self.levels.double()[:-1]]
        e_h = ((lam[k] - lam[k + 1]).exp()) if k else torch.tensor(0.0)  # e^-h; the first step starts from pure noise
        mean = d
        if k:
            r = (lam[k] - lam[k - 1]) / (lam[k + 1] - lam[k])
            mean = (1 + 1 / (2 * r)) * d - self.last / (2 * r) if torch.isfinite(r) else d
            self.noises.pop(0)
        noise = self.noises.pop(0)
        self.last = d
        first = ((1 - b**2) / (1 - a**2)).sqrt() * e_h * x
        return ((first + (1 - e_h**2) * b * mean + ((1 - b**2) * (1 - e_h**2)).sqrt() * noise).float(),)


@dataclass(frozen=True)
class Draw:
    """What both sides start from: latents, noise on the way, a prompt's embeddings."""

    start: Tensor
    noises: list[Tensor]
    prompt: Tensor

    @classmethod
    def make(cls) -> Draw:
        draw = torch.Generator().manual_seed(4)
        start = torch.randn(1, 3, 16, 6, 10, generator=draw)
        noises = [torch.randn(start.shape, generator=draw) for _ in range(2 * STEPS - 3)]
        return cls(start, noises, torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draw))


_PARTS = "sgm.modules.diffusionmodules"
SCHEDULE = {"target": f"{_PARTS}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}


@torch.no_grad()
def our_sample(network: nn.Module, draw: Draw) -> Tensor:
    from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
    from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler
    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

    guider = {"target": f"{_PARTS}.guiders.DynamicCFG", "params": {"scale": GUIDANCE, "exp": 5, "num_steps": STEPS}}
    sampler = VPSDEDPMPP2MSampler(discretization_config=SCHEDULE, num_steps=STEPS, guider_config=guider, device="cpu")
    denoiser = DiscreteDenoiser(
        weighting_config={"target": f"{_PARTS}.denoiser_weighting.EpsWeighting"},
        scaling_config={"target": f"{_PARTS}.denoiser_scaling.VideoScaling"},
        num_idx=1000, discretization_config=SCHEDULE, quantize_c_noise=False,
    )  # fmt: skip
    wrapped, queue = OpenAIWrapper(network), list(draw.noises)
    result = sampler(
        lambda x, sigma, c, **kw: denoiser(wrapped, x, sigma, c, **kw), draw.start.clone(), {"crossattn": draw.prompt},
        uc={"crossattn": torch.zeros_like(draw.prompt)}, noise_sampler=lambda x: queue.pop(0),
    )  # fmt: skip
    assert not queue
    return result


@torch.no_grad()
def their_sample(pipeline: Any, draw: Draw) -> Tensor:
    disc = instantiate_from_config(SCHEDULE)
    levels, timesteps = disc(STEPS, do_append_zero=False, return_idx=True)
    levels, table = torch.cat([levels, levels.new_ones(1)]), disc(1000, do_append_zero=False, flip=True)
    pipeline.scheduler = OurSchedule(levels, torch.as_tensor(timesteps).flip(0), table, draw.noises)
    return pipeline(
        prompt_embeds=draw.prompt, negative_prompt_embeds=torch.zeros_like(draw.prompt), latents=draw.start.clone(),
        height=48, width=80, num_frames=9, num_inference_steps=STEPS, guidance_scale=GUIDANCE, use_dynamic_cfg=True,
        output_type="latent",
    ).frames  # fmt: skip


def test_a_whole_sample(sat_release: Path, pipeline: Any) -> None:
    """Our sampler and the pipeline with our schedule, from the same noise and embeddings."""
    expected = our_sample(network_of(sat_release / "transformer"), Draw.make())
    assert expected.std() > 0.3
    torch.testing.assert_close(their_sample(pipeline, Draw.make()), expected, rtol=0, atol=1e-4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(sat_release: Path) -> Path:
    """An adapter on all linears, of a short fine-tuning (alpha 2), alone in SAT's layout, as training saves it."""
    network = network_of(sat_release / "transformer")
    torch.manual_seed(6)
    settings = {"r": 4, "lora_alpha": 2, "targets": ["attention", "mlp", "adaln"]}
    network.attach_lora({"target": "sgm.modules.transformer.lora.LoraMixin", "params": settings})
    trained = {n: p for n, p in network.named_parameters() if ".matrix_" in n}
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    inputs = random_inputs(batch=1, seed=8)
    for _ in range(4):
        optimizer.zero_grad()
        (network(**inputs) - inputs["x"]).square().mean().backward()
        optimizer.step()
    folder = sat_release.parent / "adapter"
    (folder / "7").mkdir(parents=True)
    module = {NETWORK_PREFIX + n: p.detach() for n, p in trained.items()}
    save_pt(folder / "7" / "mp_rank_00_model_states.pt", {"module": module, "lora": {"rank": 4, "alpha": 2.0}})
    (folder / "latest").write_text("7")
    return folder


@torch.no_grad()
def adapted(sat_release: Path, adapter: Path) -> nn.Module:
    from sgm.models.adapters import apply_adapter

    network = network_of(sat_release / "transformer")
    stored = read_transformer(adapter)
    apply_adapter(network, stored.network, facts=stored.lora)
    return network


@pytest.mark.parametrize("fold_scale", [False, True])
def test_exported_adapter_in_the_pipeline(
    sat_release: Path, pipeline: Any, adapter: Path, tmp_path: Path, fold_scale: bool
) -> None:
    pytest.importorskip("peft")
    export_lora(ToHf(tmp_path / "lora", adapter), fold_scale)
    inputs = random_inputs()
    base, expected = ours(network_of(sat_release / "transformer"), inputs), ours(adapted(sat_release, adapter), inputs)
    assert (expected - base).abs().max() > 0.05
    pipeline.load_lora_weights(tmp_path / "lora")
    try:
        torch.testing.assert_close(theirs(pipeline.transformer, inputs), expected, rtol=0, atol=5e-6)
        if not fold_scale:
            sample = our_sample(adapted(sat_release, adapter), Draw.make())
            assert (sample - our_sample(network_of(sat_release / "transformer"), Draw.make())).abs().max() > 0.05
            torch.testing.assert_close(their_sample(pipeline, Draw.make()), sample, rtol=0, atol=1e-4)
            pipeline.fuse_lora()
            torch.testing.assert_close(theirs(pipeline.transformer, inputs), expected, rtol=0, atol=5e-6)
            pipeline.unfuse_lora()
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("way", ["file", "entries", "entries of the pipeline"])
def test_every_way_of_diffusers_heeds_an_exported_alpha(
    sat_release: Path, pipeline: Any, adapter: Path, tmp_path: Path, way: str
) -> None:
    """Also those that see no header: the factor is in the matrices."""
    pytest.importorskip("peft")
    export_lora(ToHf(tmp_path / "lora", adapter))
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    load = pipeline.load_lora_weights if "pipeline" in way else pipeline.transformer.load_lora_adapter
    load(file if way == "file" else load_file(file))
    try:
        inputs = random_inputs()
        expected = ours(adapted(sat_release, adapter), inputs)
        torch.testing.assert_close(theirs(pipeline.transformer, inputs), expected, rtol=0, atol=5e-6)
    finally:
        pipeline.unload_lora_weights()


def test_the_comparing_tool(
    sat_release: Path, sat_yaml: Path, pipeline_folder: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("peft")
    from tools import compare_diffusers

    common = [str(sat_yaml), "--hf", str(pipeline_folder), "--load", str(sat_release / "transformer")]
    export_lora(ToHf(tmp_path / "lora", adapter))
    assert compare_diffusers.main([*common, "--lora", str(adapter), "--hf_lora", str(tmp_path / "lora")]) == 0
    printed = capsys.readouterr().out
    assert "the same numbers" in printed and all(
        part in printed for part in ("transformer", "VAE encoder", "VAE decoder")
    )
    other = make_release(tmp_path / "other")
    changed = rewrite(other / "transformer", tmp_path / "c.pt", lambda m: {n: t * 1.001 for n, t in m.items()})
    assert compare_diffusers.main([*common[:-1], str(changed)]) == 1 and "--fp32" in capsys.readouterr().out
    assert compare_diffusers.main([*common[:-1], str(tmp_path / "none")]) == 2
    named = tmp_path / "named.yaml"
    named.write_text(json.dumps(merge_yaml([sat_yaml]) | {"args": {"lora": [str(adapter)]}}))
    assert compare_diffusers.main([str(named), *common[1:]]) == 1, "the adapters of args.lora count"


def test_a_diffusers_adapter_is_no_transformer(adapter: Path, tmp_path: Path) -> None:
    export_lora(ToHf(tmp_path / "lora", adapter))
    with pytest.raises(ValueError, match="a LoRA of another trainer; to sample with it, name it in args.lora"):
        read_transformer(tmp_path / "lora" / "pytorch_lora_weights.safetensors")


def test_merged_adapters(sat_release: Path, sat_yaml: Path, adapter: Path, tmp_path: Path) -> None:
    """One in the checkpoint itself (upstream's LoRA file) and one given beside: both are folded in by their scale."""

    def wrap(module: dict[str, Tensor]) -> dict[str, Tensor]:
        linears = ("attention.query_key_value.", "attention.dense.")
        split = {next((n.replace(k, f"{k}original.") for k in linears if k in n), n): t for n, t in module.items()}
        return split | adapter_matrices(rank=2, seed=9)

    checkpoint = rewrite(sat_release / "transformer", tmp_path / "own.pt", wrap)
    convert(ToHf(tmp_path / "hf", checkpoint, dtype=torch.float32, config=sat_yaml, partial=True,
                 adapters=[Adapter(str(adapter), 0.5)]))  # fmt: skip
    assert not (tmp_path / "hf" / "model_index.json").exists()
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "hf" / "transformer")
    model.norm_out.norm.eps = 1e-6
    from sgm.models.adapters import apply_adapter

    network = network_of(sat_release / "transformer")
    plain = {n.removeprefix("model.diffusion_model."): t for n, t in adapter_matrices(rank=2, seed=9).items()}
    apply_adapter(network, plain, merge=True)
    stored = read_transformer(adapter)
    apply_adapter(network, stored.network, facts=stored.lora, scale=0.5, merge=True)
    inputs = random_inputs()
    torch.testing.assert_close(theirs(model, inputs), ours(network, inputs), rtol=0, atol=5e-6)

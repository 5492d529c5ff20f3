"""Pipelines of diffusers' own classes, of all kinds, through the converters: there and back, and a whole sample.

Both sides start from the same noise and draw the same noise on the way; prompt embeddings and zero negatives are given.
With our schedule in their scheduler both agree; with the stock schedulers they are as far apart as docs/figures.md says.
"""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sample_video
from sgm.config import load_run_config, merge_yaml
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.options import TrainArgs
from sgm.training.run import train
from tests.convert_tiny import KINDS, SCHEDULE, make_pipeline
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH
from tests.training_tiny import MODULES, REPO, configuration, write_clips, write_yaml
from tools import compare_diffusers, convert_weight_hf2sat, convert_weight_sat2hf

diffusers = pytest.importorskip("diffusers")


@dataclass(frozen=True)
class Converted:
    """A pipeline, the folder that it came from, and the SAT release made of it."""

    pipeline: Any
    hf: Path
    sat: Path


@pytest.fixture(scope="module", params=KINDS)
def converted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = make_pipeline(folder / "hf", request.param)
    pipeline.transformer.norm_out.norm.eps = 1e-6  # SAT's; diffusers' configuration has one eps for all
    arguments = ["--input_path", str(folder / "hf"), "--output_path", str(folder / "sat")]
    assert convert_weight_hf2sat.main(arguments) == 0
    return Converted(pipeline, folder / "hf", folder / "sat")


def engine_of(release: Path, *changes: str) -> SATVideoDiffusionEngine:
    """What the YAML file of a converted release describes, with its weights but for the text encoder's."""
    config = load_run_config([release / "infer.yaml"], SampleArgs, overrides=changes)
    video = Pipeline(config, torch.device("cpu"), with_text_encoder=False)
    video.load("network")
    video.load("first_stage")
    return video.engine


@pytest.mark.parametrize("converted", ["5b-i2v", "1.5", "1.5-i2v"], indirect=True)
def test_the_written_configuration_samples(converted: Converted, tmp_path: Path) -> None:
    """As the converter says at its end, all clips of the trained length, and of the picture's shape with 1.5."""
    later = converted.pipeline.transformer.config.patch_size_t is not None
    arguments = ["--prompt", "a ball", "--device", "cpu", "--steps", "2", "--output-dir", str(tmp_path / "out")]
    size = (32, 48)
    if converted.pipeline.transformer.config.in_channels > 16:
        Image.new("RGB", (60, 60), (200, 30, 30)).save(tmp_path / "red.png")
        arguments += ["--image", str(tmp_path / "red.png")]
        size = (32, 32) if later else size
    assert sample_video.main([str(converted.sat / "infer.yaml"), *arguments]) == 0
    (clip,) = (tmp_path / "out").rglob("*.mp4")
    assert iio.imread(clip).shape == (9, *size, 3)
    (record,) = clip.parent.glob("*.json")
    assert json.loads(record.read_text())["fps"] == (16 if later else 8)


@pytest.mark.parametrize("converted", ["5b-i2v", "1.5-i2v"], indirect=True)
def test_a_fine_tuned_release_comes_back(converted: Converted, tmp_path: Path) -> None:
    """Trained by the file that the converter wrote, saved with its configuration, and a pipeline again."""
    content = configuration(converted.sat, write_clips(tmp_path / "clips", 1, 9), tmp_path / "run", train_iters=2)
    content["model"] = merge_yaml([converted.sat / "infer.yaml"])["model"]
    content["data"]["params"] |= {"video_size": [32, 48], "max_num_frames": 9}
    assert train(load_run_config([write_yaml(tmp_path / "c.yaml", content)], TrainArgs)) == 0
    (run,) = (tmp_path / "run").iterdir()
    arguments = ["--transformer_ckpt_path", str(run), "--vae_ckpt_path", str(converted.sat / "vae" / "3d-vae.pt"),
                 "--text_encoder_path", str(converted.sat / "t5-v1_1-xxl"), "--fp32",
                 "--output_path", str(tmp_path / "hf")]  # fmt: skip
    assert convert_weight_sat2hf.main(arguments) == 0
    pipeline = type(converted.pipeline).from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    pipeline.transformer.norm_out.norm.eps = 1e-6
    inputs = network_inputs(pipeline)
    with torch.no_grad():
        ours = engine_of(converted.sat, f"args.load={run}").network(*inputs)
    torch.testing.assert_close(their_output(pipeline, inputs), ours, rtol=0, atol=5e-6)
    assert (ours - their_output(converted.pipeline, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("converted", ["5b-i2v", "1.5-i2v"], indirect=True)
def test_commands_of_the_page(converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/conversion.md for these models, in order, in a folder that holds what they name."""
    name = "CogVideoX1.5-5B" if converted.pipeline.transformer.config.patch_size_t else "CogVideoX-5b"
    release = tmp_path / f"{name}-SAT"  # as the published one of 1.5
    release.mkdir()
    for file in converted.sat.iterdir():
        (release / file.name.replace("transformer", "transformer_i2v")).symlink_to(file)
    (tmp_path / f"{name}-I2V").symlink_to(converted.hf)
    monkeypatch.chdir(tmp_path)
    tools = {f"tools/{tool.__name__.rpartition('.')[2]}.py": tool for tool in
             (compare_diffusers, convert_weight_hf2sat, convert_weight_sat2hf)}  # fmt: skip
    block = (REPO / "docs" / "conversion.md").read_text().split("```shell")[2].split("```")[0].replace("\\\n", " ")
    commands = [shlex.split(line.replace("cuda", "cpu")) for line in block.splitlines() if line.startswith("python ")]
    ours = [words for words in commands if any(f"{name}-{kind}" in " ".join(words) for kind in ("I2V", "SAT"))]
    assert len(commands) == 8 and len(ours) == 3
    for _, tool, *arguments in ours:
        assert tools[tool].main(arguments) == 0, arguments
    if Path("linear").is_dir():
        assert engine_of(Path("linear")).network.patches.proj.weight.shape == (64, 32 * 4)
    index = json.loads(next(tmp_path.glob("hf-*/model_index.json")).read_text())
    assert index["_class_name"] == "CogVideoXImageToVideoPipeline"


# --- there and back --------------------------------------------------------------------------------------------------


def test_there_and_back_to_the_bit(converted: Converted, tmp_path: Path) -> None:
    sat = converted.sat
    arguments = ["--transformer_ckpt_path", str(sat / "transformer"), "--vae_ckpt_path", str(sat / "vae" / "3d-vae.pt"),
                 "--text_encoder_path", str(sat / "t5-v1_1-xxl"), "--fp32", "--output_path", str(tmp_path / "back")]  # fmt: skip
    assert convert_weight_sat2hf.main(arguments) == 0
    for part in ("transformer", "vae", "text_encoder"):
        before, after = (load_file(next((f / part).glob("*.safetensors"))) for f in (converted.hf, tmp_path / "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back = type(converted.pipeline).from_pretrained(tmp_path / "back")
    for part in ("transformer", "vae", "scheduler"):
        ours, theirs = getattr(back, part), getattr(converted.pipeline, part)
        assert type(ours) is type(theirs)
        for name in theirs.config.keys() - {"_name_or_path", "_use_default_values", "_diffusers_version"}:
            assert json.dumps(ours.config[name]) == json.dumps(theirs.config[name]), (part, name)


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


def our_sampler(kind: str, steps: int, shift_scale: float) -> Any:
    """A sampler of ours with dynamic guidance, on the schedule of a pipeline's shift."""
    from sgm.util import instantiate_from_config

    shift = {"target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": shift_scale}}
    return instantiate_from_config({
        "target": f"{MODULES}.sampling.{kind}",
        "params": {"num_steps": steps, "discretization_config": shift, "guider_config": {
            "target": f"{MODULES}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": steps}}},
    })  # fmt: skip


@torch.no_grad()
def sample_both(converted: Converted, sampler: str, steps: int, injected: bool) -> dict[str, Tensor]:
    """Latents (1, t, 16, 4, 6) and pixels in [0, 1] of 9 frames, ours and theirs; the image, if any, is random."""
    engine, theirs = engine_of(converted.sat), converted.pipeline
    engine.sampler = our_sampler(sampler, steps, theirs.scheduler.config.snr_shift_scale)
    kinds = {
        "VideoDDIMSampler": diffusers.CogVideoXDDIMScheduler,
        "VPSDEDPMPP2MSampler": diffusers.CogVideoXDPMScheduler,
    }
    scheduler = kinds[sampler](**SCHEDULE, snr_shift_scale=theirs.scheduler.config.snr_shift_scale)
    theirs.scheduler = inject(scheduler, engine, steps) if injected else scheduler
    config, draw = theirs.transformer.config, torch.Generator().manual_seed(1)
    noise = torch.randn(1, 4 if config.patch_size_t else 3, 16, 4, 6, generator=draw)
    text = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draw)
    image = torch.rand(1, 3, 32, 48, generator=draw)
    state = draw.get_state()
    given, inputs = {}, {}
    if config.in_channels > 16:
        given = {"image": image}
        posterior = torch.randn(1, 16, 1, 4, 6, generator=draw)
        inputs = {"image": engine.encode_image((image * 2 - 1)[:, :, None], noise.shape[1], noise=posterior)}
    if theirs.vae.config.invert_scale_latents:  # they multiply an image's latents by 1 / 0.7, SAT does not
        theirs.vae_scaling_factor_image = 1.0
    ours = engine.sample({"crossattn": text}, {"crossattn": torch.zeros_like(text)}, noise=noise,
                         noise_sampler=lambda x: torch.randn(x.shape, generator=draw), **inputs)  # fmt: skip
    common = dict(height=32, width=48, num_frames=9, num_inference_steps=steps, guidance_scale=6.0,
                  use_dynamic_cfg=True, prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text),
                  return_dict=False, output_type="latent")  # fmt: skip
    draw.set_state(state)
    other = theirs(latents=noise, generator=draw, **common, **given)[0]
    theirs.vae_scaling_factor_image = theirs.vae.config.scaling_factor
    pixels = engine.autoencoder.decode(engine.drop_first(ours).transpose(1, 2) / engine.scale_factor)
    return {
        "latents": ours, "their latents": other,
        "pixels": ((pixels + 1) / 2).clamp(0, 1),
        "their pixels": (theirs.decode_latents(engine.drop_first(other)) / 2 + 0.5).clamp(0, 1),
    }  # fmt: skip


def test_agrees_with_our_schedule(converted: Converted) -> None:
    is_2b = not converted.pipeline.transformer.config.use_rotary_positional_embeddings
    for sampler in ["VPSDEDPMPP2MSampler", *(["VideoDDIMSampler"] if is_2b else [])]:
        found = sample_both(converted, sampler, steps=20 if is_2b else 8, injected=True)
        assert found["latents"].std() > 0.3 and found["pixels"].std() > 0.05
        torch.testing.assert_close(found["latents"], found["their latents"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["pixels"], found["their pixels"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("converted", ["2b"], indirect=True)
@pytest.mark.parametrize("sampler", ["VideoDDIMSampler", "VPSDEDPMPP2MSampler"])
def test_differs_from_the_stock_schedulers_as_documented(converted: Converted, sampler: str) -> None:
    found = sample_both(converted, sampler, steps=50, injected=False)
    rms = (found["latents"] - found["their latents"]).square().mean().sqrt() / found["latents"].square().mean().sqrt()
    print(f"{sampler}: {rms:.3%} rms of the latents")
    assert 1e-4 < rms < 0.05


@pytest.mark.parametrize("converted", ["2b", "1.5"], indirect=True)
@pytest.mark.parametrize("strength", [0.55, 1.0])
@torch.no_grad()
def test_video_to_video_agrees_with_our_schedule(converted: Converted, strength: float) -> None:
    """From a clip's pixels on, with the same draws. (1.5 takes an even number of latents there: 13 frames.)"""
    engine, parts, steps = engine_of(converted.sat), converted.pipeline, 8
    engine.sampler = our_sampler("VPSDEDPMPP2MSampler", steps, parts.scheduler.config.snr_shift_scale)
    engine.sampler.strength = strength
    taken = len(engine.sampler.schedule().timesteps)
    assert taken == int(steps * strength)
    engine.sampler.guider.num_steps = taken
    stock = diffusers.CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=parts.scheduler.config.snr_shift_scale)
    scheduler = inject(copy.deepcopy(stock), engine, steps)
    scheduler.add_noise = stock.add_noise  # by the table of all timesteps
    theirs = diffusers.CogVideoXVideoToVideoPipeline(
        parts.tokenizer, parts.text_encoder, parts.vae, parts.transformer, scheduler
    )
    draw = torch.Generator().manual_seed(1)
    frames = 13 if parts.transformer.config.patch_size_t else 9
    video = torch.rand(frames, 3, 32, 48, generator=draw)
    text = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draw)
    state = draw.get_state()
    posterior = torch.randn(1, 16, (frames + 3) // 4, 4, 6, generator=draw)
    clip = engine.autoencoder.encode((video * 2 - 1).transpose(0, 1)[None], noise=posterior).transpose(1, 2)
    clip = clip * engine.scale_factor
    noise = torch.randn(clip.shape, generator=draw)
    ours = engine.sample({"crossattn": text}, {"crossattn": torch.zeros_like(text)}, noise=noise, clip=clip,
                         noise_sampler=lambda x: torch.randn(x.shape, generator=draw))  # fmt: skip
    draw.set_state(state)
    other = theirs(video=list(video), generator=draw, height=32, width=48, num_inference_steps=steps, strength=strength,
                   guidance_scale=6.0, use_dynamic_cfg=True, prompt_embeds=text,
                   negative_prompt_embeds=torch.zeros_like(text), return_dict=False, output_type="latent")[0]  # fmt: skip
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converted", ["5b-i2v", "1.5", "1.5-i2v"], indirect=True)
def test_an_adapter_of_peft_acts_alike_and_comes_back_to_the_bit(converted: Converted, tmp_path: Path) -> None:
    """Made as diffusers' trainers make it, of the rank that the original gives 5B image-to-video."""
    peft = pytest.importorskip("peft")
    pipeline = converted.pipeline
    settings = peft.LoraConfig(r=256, lora_alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inputs = network_inputs(pipeline)
    base = their_output(pipeline, inputs)
    pipeline.transformer.add_adapter(settings)
    try:
        draw = torch.Generator().manual_seed(2)
        for name, matrix in pipeline.transformer.named_parameters():
            if ".lora_B." in name:
                matrix.data.copy_(0.2 * torch.randn(matrix.shape, generator=draw))
        layers = peft.get_peft_model_state_dict(pipeline.transformer)
        described = {"transformer_lora_adapter_metadata": settings.to_dict()}
        pipeline.save_lora_weights(tmp_path / "peft", transformer_lora_layers=layers, **described)
        expected = their_output(pipeline, inputs)
    finally:
        pipeline.transformer.delete_adapters("default")
    assert (expected - base).abs().max() > 0.05
    arguments = ["--lora_only", "--input_path", str(tmp_path / "peft"), "--output_path", str(tmp_path / "sat")]
    assert convert_weight_hf2sat.main(arguments) == 0
    network = engine_of(converted.sat, f"args.lora=[{tmp_path / 'sat'}]").network
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), expected, rtol=0, atol=5e-6)
    arguments = ["--lora_only", "--transformer_ckpt_path", str(tmp_path / "sat"), "--output_path", str(tmp_path / "b")]
    assert convert_weight_sat2hf.main([*arguments, "--keep_scale"]) == 0
    before, after = (load_file(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("peft", "b"))
    assert len(before) == 16 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pipeline.load_lora_weights(tmp_path / "b")
    torch.testing.assert_close(their_output(pipeline, inputs), expected, rtol=0, atol=5e-6)
    pipeline.unload_lora_weights()


def network_inputs(pipeline: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text embeddings."""
    config, draw = pipeline.transformer.config, torch.Generator().manual_seed(3)
    x = torch.randn(1, 4 if config.patch_size_t else 3, config.in_channels, 4, 6, generator=draw)
    return x, torch.tensor([499.0]), torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=draw)


@torch.no_grad()
def their_output(pipeline: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, timesteps, text = inputs
    ofs = {"ofs": torch.tensor([2.0])} if pipeline.transformer.config.ofs_embed_dim else {}
    rotary = pipeline._prepare_rotary_positional_embeddings(32, 48, x.shape[1], x.device)
    return pipeline.transformer(x, text, timesteps, image_rotary_emb=rotary, return_dict=False, **ofs)[0]

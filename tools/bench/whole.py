"""Whole videos, from prompt to frames, in one process: `python tools/bench/whole.py CONFIG.yaml --out DIR`. JSON lines.

Random weights of the configuration's sizes are written into DIR (kept for the next call), with a few-step student of
them and a small decoder. Timed are, each in its second video: the exact run, other variants (YAML files laid over it:
`--variant configs/fast.yaml`), the student, and diffusers' pipeline of the same sizes, whose text encoder is left out.
Only times and memory mean anything. `--steps` takes fewer than 50, and computes what 50 take from their mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image

from sgm.config import load_run_config, merge_yaml
from sgm.convert import dit_sizes, vae_keys
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.prompts import MARK, gather
from sgm.models.small_decoder import decoder_fingerprint, save_small_decoder, vae_tensors
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.modules.diffusionmodules.image_condition import clip_frames
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler, guides
from sgm.modules.ops.choice import ATTENTIONS
from sgm.util import instantiate_from_config
from tools.bench import models
from tools.bench.measure import emit
from tools.random_release import ITERATION, write_random_release

PROMPT = "A paper boat drifts down a stream between mossy stones, turning slowly in the current."
STEPS, PASSES = 50, 4
PICTURE = "picture.png"  # in the folder of the weights


class Clock:
    """Seconds by stage of one video, and the most memory that each took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        yield
        self._settle()
        self.seconds[name] = time.perf_counter() - begin
        if self.device.type == "cuda":
            self.peak_gib[name] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[..., None]]:
        """The sampler's steps, as `Pipeline.sample` observes them."""
        with self.stage("steps"):
            yield lambda *_: None

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def report(self, variant: str, steps: int, usual: float = 1.0) -> None:
        """`usual`: the network's passes in a run of `STEPS` over those of this run."""
        whole = sum(self.seconds.values()) + self.seconds["steps"] * (usual - 1)
        emit(variant=variant, steps=steps, **{f"{name}_s": value for name, value in self.seconds.items()},
             seconds=whole, computed=usual != 1, peak_gib=self.peak_gib)  # fmt: skip


def passes(sampler: VideoDDIMSampler, steps: int) -> int:
    """How often a run asks the network: for both branches where guidance acts."""
    return sum(2 if guides(scale) else 1 for scale in sampler.guidance_scales(steps))


def write_weights(config: str, out: Path, dtype: str, device: torch.device) -> None:
    """The release, a student of it (the same weights, with a header that asks for four passes) and a small decoder."""
    model = merge_yaml([config])["model"]
    if not (out / "transformer").exists():
        write_random_release(model, out, dtype=models.TYPES[dtype], device=device)
    if not (out / "small.safetensors").exists():
        decoder = models.small_decoder(config, dtype, device)
        fingerprint = decoder_fingerprint(vae_tensors(out / "vae" / "3d-vae.pt"))
        save_small_decoder(out / "small.safetensors", decoder, fingerprint, torch.float16)
    folder = out / "student" / str(ITERATION)
    if not folder.exists():
        schedule = instantiate_from_config(model["sampler_config"]).schedule(PASSES)
        stated = FewSteps(PASSES, tuple(schedule.timesteps), "renoise")
        file = f"{ITERATION}/mp_rank_00_model_states.pt"
        content = torch.load(out / "transformer" / file, weights_only=True, mmap=True)
        folder.mkdir(parents=True)
        torch.save(content | {"lora": {"few_steps": stated.as_dict()}}, out / "student" / file)
        (out / "student" / "latest").write_text(str(ITERATION))


def overrides(options: argparse.Namespace, *, student: bool) -> list[str]:
    """What a run is told of these weights."""
    out = options.out
    embedders = merge_yaml([options.config])["model"]["conditioner_config"]["params"]["emb_models"]
    embedders[0]["params"]["model_dir"] = str(out / "t5")
    given = [
        f"args.load={out / ('student' if student else 'transformer')}",
        f"model.first_stage_config.params.ckpt_path={out / 'vae' / '3d-vae.pt'}",
        f"model.first_stage_config.params.small_decoder={out / 'small.safetensors'}",
        f"model.conditioner_config.params.emb_models={json.dumps(embedders)}",
        f"args.fp16={str(options.dtype == 'fp16').lower()}",
        f"args.bf16={str(options.dtype == 'bf16').lower()}",
        f"args.placement={options.placement}",
        "accelerate.kernels=auto",
        f"accelerate.attention={options.attention}",
    ]
    return [*given, "args.decoder=small" if student else f"args.num_steps={options.steps}"]


def bench_ours(options: argparse.Namespace, device: torch.device, variant: str, files: Sequence[str] = ()) -> None:
    """Two videos of one configuration; the second one's times."""
    student = variant == "few steps"
    config = load_run_config([options.config, *files], SampleArgs, overrides=overrides(options, student=student))
    pipeline = Pipeline(config, device)
    text = f"{PROMPT}{MARK}{options.out / PICTURE}" if pipeline.visual.pictures.wanted else PROMPT
    prompt = gather([text], None, [], pipeline.visual.pictures)[0][0]
    for _ in range(options.videos):
        clock = Clock(device)
        with clock.stage("text"):
            encoded = pipeline.encode([prompt.text])[0]
            if prompt.picture is not None:
                encoded = replace(encoded, image=pipeline.visual.encode_picture(prompt.picture))
        with clock.stage("placing"):
            latents = pipeline.sample(encoded, [SampleId(0, 0, 0)], clock.steps)[0]
        clock.seconds["placing"] -= clock.seconds["steps"]  # what moves the network to the device and away again
        with clock.stage("decode"):
            pipeline.decode(latents)
    sampler = pipeline.engine.sampler
    usual = 1.0 if student else passes(sampler, STEPS) / passes(sampler, options.steps)
    clock.report(variant, pipeline.num_steps, usual)


def bench_diffusers(options: argparse.Namespace, device: torch.device) -> None:
    """The pipeline of this kind with random weights, given embeddings; everything on the device."""
    import diffusers

    section = merge_yaml([options.config])["model"]
    params, dtype = section["network_config"]["params"], models.TYPES[options.dtype]
    coder = section["first_stage_config"]["params"]["decoder_config"]["params"]
    with device:
        sizes = dit_sizes.sizes_of_params(params)
        network = diffusers.CogVideoXTransformer3DModel(**sizes.hf_config()).to(dtype).eval()
        vae = diffusers.AutoencoderKLCogVideoX(**vae_keys.hf_config(coder, scale_factor=1.0)).to(dtype).eval()
    clip = models.Clip.of(options.config)
    height, width = STRIDES.pixel_size(clip.height, clip.width)
    image = network.config.in_channels > network.config.out_channels
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline = kind(tokenizer=None, text_encoder=None, vae=vae, transformer=network, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.randn(1, network.config.max_text_seq_length, network.config.text_embed_dim, device=device, dtype=dtype)
    frames = STRIDES.pixel_frames(clip_frames(clip.frames, network.config.patch_size_t or 1))
    given: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text), "height": height}
    given |= {"width": width, "num_frames": frames, "guidance_scale": 6.0}
    given |= {"image": Image.open(options.out / PICTURE)} if image else {}
    for steps in (2, options.steps):
        clock = Clock(device)
        with clock.stage("steps"):
            pipeline(num_inference_steps=steps, **given, output_type="latent")
        with clock.stage("whole"):
            pipeline(num_inference_steps=steps, **given, output_type="pt")
    decode = clock.seconds.pop("whole") - clock.seconds["steps"]
    clock.seconds["decode"] = decode
    clock.report("diffusers", options.steps, STEPS / options.steps)


def release() -> None:
    """Give freed memory back, so that the next variant's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", help="YAML of sampling")
    add("--out", type=Path, required=True, help="folder for the weights")
    add("--dtype", default="bf16", choices=models.TYPES)
    add("--steps", type=int, default=STEPS, help="steps of the exact runs and of diffusers (50)")
    add("--videos", type=int, default=2, help="videos of each variant, of which the last is reported (2)")
    add("--attention", default="default", choices=ATTENTIONS)
    add("--placement", default="all", choices=("all", "stages", "lean"))
    add("--variant", action="append", default=[], metavar="YAML", help="laid over the configuration, timed as well")
    add("--few-steps", action="store_true", help="time a student of four passes with a small decoder")
    add("--diffusers", action="store_true", help="time diffusers, too")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1360, 768), (200, 80, 40)).save(options.out / PICTURE)
    with torch.no_grad():
        write_weights(options.config, options.out, options.dtype, device)
        release()
        bench_ours(options, device, "exact")
        for file in options.variant:
            release()
            bench_ours(options, device, file, [file])
        if options.few_steps:
            release()
            bench_ours(options, device, "few steps")
        if options.diffusers:
            release()
            bench_diffusers(options, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

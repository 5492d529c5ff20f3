"""Speed on the CPU: `python tools/bench/cpu.py`. Prints JSON lines.

Sizes are those of a configuration (default: the demo's), weights random, float32. First a whole run by its
stages (imports beyond PyTorch's, building, loading, text encoder, sampling, decoding) and its peak of resident memory;
after it the transformer's forward on a guidance pair, the VAE's decode, the small decoder's, the VAE's encode: ours,
ours with products in bfloat16 (`accelerate.cpu_bf16`), and diffusers' with the same weights (where it is
installed). Each names its limit: its arithmetic at the rate of a large matrix product in float32, measured in the same
run. On a machine that does other work meanwhile, only ratios mean anything.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from sgm.config import RunConfig, load_run_config
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.placement import peak_memory
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.ops.choice import Kernels, choose_kernels
from tools.bench import models
from tools.bench.flops import conv_flops, network_flops
from tools.bench.measure import Ceilings, emit, measure_ceilings, relative_error, time_runs
from tools.random_release import write_random_release

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo_infer.yaml"
PARTS = ("run", "dit", "vae_decode", "vae_decode_small", "vae_encode")
CPU = torch.device("cpu")
MATRIX = 1024
PROMPT = "A paper boat drifts down a stream between mossy stones, turning slowly in the current."


@dataclass(frozen=True)
class Bench:
    """What every part needs."""

    config: str
    clip: models.Clip
    seconds: float
    ceilings: Ceilings

    def report(
        self, part: str, variant: str, run: Callable[[], Tensor], flops: float, expected: Tensor | None = None
    ) -> Tensor:
        """Time one variant of a part, print its line, and give its result back."""
        timing = time_runs(run, CPU, self.seconds, least=1)
        limit = self.ceilings.limit_ms(flops)
        emit(
            part=part,
            variant=variant,
            ms=timing.ms,
            runs=timing.runs,
            gflops=flops / timing.ms / 1e6,
            limit_ms=limit,
            share_of_limit=limit / timing.ms,
            error_to_ours=None if expected is None else relative_error(timing.result, expected),
        )
        return timing.result

    def compare(
        self,
        part: str,
        ours: Callable[[], Tensor],
        use: Callable[[Kernels], None],
        build: Callable[[], Callable[[], Tensor]],
        flops: float,
    ) -> None:
        """Time ours, plain and on other kernels by `use`, and what `build` makes of diffusers where it is there."""
        expected = self.report(part, "ours", ours, flops)
        use(choose_kernels("plain", "default", CPU, products=True))
        self.report(part, "ours, bf16", ours, flops, expected)
        use(Kernels())
        try:
            theirs = build()
        except ImportError as error:
            emit(part=part, variant="diffusers", skipped=str(error))
            return
        self.report(part, "diffusers", theirs, flops, expected)


def bench_run(bench: Bench) -> None:
    """One prompt's way, stage by stage. It comes first, so that the peak is its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for module in ("sgm.models.network", "sgm.inference.pipeline"):
            _stage(f"import {module}", lambda module=module: import_module(module))
        imported = time.perf_counter() - start
        config = _with_random_weights(bench.config, bench.clip.frames, Path(folder))
        start = time.perf_counter() - imported  # what writes the weights is no part of a run
        pipeline = _stage("build", lambda: import_module("sgm.inference.pipeline").Pipeline(config, CPU))
        for part in ("conditioner", "network", "first_stage"):
            _stage(f"load {part}", lambda part=part: pipeline.load(part))
        (prompt,) = _stage("text", lambda: pipeline.encode([PROMPT]))
        steps = lambda _: nullcontext(lambda *_, **__: None)  # noqa: E731
        latents = _stage("sample", lambda: pipeline.sample(prompt, [SampleId(0, 0, 0)], steps))
        _stage("decode", lambda: pipeline.decode(latents[0]))
        emit(
            part="run",
            variant="whole",
            ms=1e3 * (time.perf_counter() - start),
            steps=pipeline.num_steps,
            peak_gib=peak_memory(CPU) / 2**30,
        )


def _stage(name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    emit(part="run", variant=name, ms=1e3 * (time.perf_counter() - start))
    return result


def _with_random_weights(path: str, frames: int, folder: Path) -> RunConfig[SampleArgs]:
    """The configuration of a run of `frames` latent frames, on random weights written to `folder`."""
    config = load_run_config([path], SampleArgs, overrides=[f"args.sampling_num_frames={frames}"])
    write_random_release(config.model, folder, dtype=torch.float32)
    config.model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae" / "3d-vae.pt")
    config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "t5")
    return replace(config, args=replace(config.args, load=str(folder / "transformer")))


@torch.no_grad()
def bench_dit(bench: Bench) -> None:
    network = models.our_network(bench.config, "fp32", CPU)
    x, steps, text = models.network_inputs(network, bench.clip, CPU)
    flops = network_flops(network, models.token_count(network, bench.clip))

    def build() -> Callable[[], Tensor]:
        other = models.diffusers_network_like(network, bench.config)
        return lambda: other(hidden_states=x, encoder_hidden_states=text, timestep=steps, return_dict=False)[0]

    bench.compare("dit", lambda: network(x, steps, text), lambda k: network.use_ops(k.block), build, flops)


def bench_decode(bench: Bench) -> None:
    z = torch.randn(1, 16, *bench.clip)
    _bench_first_stage(
        bench, "decoder", lambda stage: stage.decode(z), lambda other: other.decode(z, return_dict=False)[0]
    )


@torch.no_grad()
def bench_decode_small(bench: Bench) -> None:
    """By a small decoder of the sizes of the one that the configuration names."""
    z = torch.randn(1, 16, *bench.clip)
    decoder = models.small_decoder(bench.config, "fp32", CPU)
    flops = conv_flops(decoder, lambda: decoder.decode(z))
    expected = bench.report("vae_decode_small", "ours", lambda: decoder.decode(z), flops)
    half = copy.deepcopy(decoder).to(torch.bfloat16)
    bench.report("vae_decode_small", "ours, bf16", lambda: half.decode(z.to(half.dtype)), flops, expected)


def bench_encode(bench: Bench) -> None:
    """Pixels to moments; diffusers encodes 8 frames at a time, so longer clips have other norms there."""
    frames, *size = bench.clip
    x = torch.rand(1, 3, STRIDES.pixel_frames(frames), *STRIDES.pixel_size(*size)) * 2 - 1
    _bench_first_stage(
        bench,
        "encoder",
        lambda stage: stage.moments(x),
        lambda other: other.encode(x, return_dict=False)[0].parameters,
    )


def _bench_first_stage(
    bench: Bench, coder: str, ours: Callable[[nn.Module], Tensor], theirs: Callable[[nn.Module], Tensor]
) -> None:
    stage = models.our_first_stage(bench.config, "fp32", CPU)
    flops = conv_flops(stage, lambda: ours(stage))

    def build() -> Callable[[], Tensor]:
        other = models.diffusers_coder_like(stage, bench.config, coder)
        return lambda: theirs(other)

    part = "vae_" + coder.removesuffix("r")
    bench.compare(part, lambda: ours(stage), lambda k: stage.use_ops(k.vae), build, flops)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the runs of each variant, one at least")
    parser.add_argument("--config", default=str(CONFIG), help="YAML with the model section")
    parser.add_argument("--frames", type=int, help="latent frames, odd; default: as the model was trained")
    parser.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.only.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    ceilings = measure_ceilings(CPU, torch.float32, MATRIX)
    emit(torch=torch.__version__, threads=torch.get_num_threads(), matmul_gflops=ceilings.flops / 1e9)
    bench = Bench(options.config, models.Clip.of(options.config, options.frames), options.seconds, ceilings)
    work = dict(zip(PARTS, (bench_run, bench_dit, bench_decode, bench_decode_small, bench_encode), strict=True))
    for part in options.only.split(","):
        work[part](bench)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

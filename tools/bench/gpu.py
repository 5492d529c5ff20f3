"""Speed and memory on one GPU: `python tools/bench/gpu.py`. Prints JSON lines.

Each part times this project's plain path, its fused path (checked against the plain one) and, where it can be imported,
diffusers at the same sizes, and names the limit: the part's arithmetic at the rate of a large matrix product, measured
in the same run. Weights and inputs are random; only times and errors mean anything.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from sgm.inference.placement import Placement
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.ops.choice import Kernels, choose_kernels
from sgm.modules.ops.fp8 import LEAST_CAPABILITY
from sgm.modules.transformer.quantize import quantize_network
from tools.bench import blocks, models, training
from tools.bench.flops import conv_flops, network_flops
from tools.bench.measure import Ceilings, emit, measure_ceilings, relative_error, time_runs, top_kernels

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cogvideox_2b_infer.yaml"


@dataclass(frozen=True)
class Bench:
    """What every part needs."""

    config: str
    dtype: str
    device: torch.device
    ceilings: Ceilings
    seconds: float
    clip: models.Clip
    attention: str
    diffusers: bool
    profile: bool
    plain: Kernels
    fused: Kernels

    @property
    def decoded(self) -> models.Clip:
        """Of an even number of latent frames the first is dropped before the others are decoded (1.5)."""
        return self.clip._replace(frames=self.clip.frames - (self.clip.frames + 1) % 2)

    def report(
        self,
        part: str,
        variant: str,
        run: Callable[[], Tensor],
        flops: float,
        expected: Tensor | None = None,
        truth: Tensor | None = None,
    ) -> Tensor:
        """Time one variant of a part, print its line, and give its result back.

        `expected` is the plain path's result in the same type, `truth` its result in float32 from the same weights.
        """
        timing = time_runs(run, self.device, self.seconds)
        result = timing.result
        limit = self.ceilings.limit_ms(flops)
        emit(
            part=part,
            variant=variant,
            dtype=self.dtype,
            ms=timing.ms,
            runs=timing.runs,
            tflops=flops / timing.ms / 1e9,
            limit_ms=limit,
            share_of_limit=limit / timing.ms,
            peak_gib=timing.peak_bytes / 2**30 if timing.peak_bytes else None,
            error_to_plain=None if expected is None else relative_error(result, expected),
            error_to_fp32=None if truth is None else relative_error(result, truth),
            finite=bool(result.isfinite().all()),
        )
        if self.profile:
            emit(part=part, variant=variant, kernels_ms=top_kernels(run))
        return result


def bench_dit(bench: Bench) -> None:
    """The transformer's forward on a guidance pair."""
    network = models.our_network(bench.config, bench.dtype, bench.device)
    inputs = models.network_inputs(network, bench.clip, bench.device)
    flops = network_flops(network, models.token_count(network, bench.clip))
    truth = _dit_in_float32(network, inputs)
    _their_dit(bench, network, inputs, flops, truth)
    release()
    _our_dit(bench, network, inputs, flops, truth)


def _their_dit(bench: Bench, network: nn.Module, inputs: tuple[Tensor, ...], flops: float, truth: Tensor) -> None:
    """diffusers' transformer with the same weights."""
    with reference(bench, "dit", lambda: models.diffusers_network_like(network, bench.config)) as theirs:
        if theirs is not None:
            given = models.diffusers_inputs(network, bench.clip, inputs)

            def run() -> Tensor:
                return theirs(**given)[0]

            bench.report("dit", "diffusers", run, flops, truth=truth)


def _dit_in_float32(network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    exact = copy.deepcopy(network).float()
    x, steps, text = inputs
    return exact(x.float(), steps, text.float())


def _our_dit(bench: Bench, network: nn.Module, inputs: tuple[Tensor, ...], flops: float, truth: Tensor) -> None:
    expected = bench.report("dit", "plain", lambda: network(*inputs), flops, truth=truth)
    network.use_ops(bench.fused.block)
    bench.report("dit", "fused", lambda: network(*inputs), flops, expected, truth)
    single = tuple(part[:1] for part in inputs)
    bench.report("dit", "fused, conditional alone", lambda: network(*single), flops / 2, expected[:1])
    if torch.cuda.get_device_capability(bench.device) >= LEAST_CAPABILITY:
        quantize_network(network)
        bench.report("dit", "fused, 8-bit linear layers", lambda: network(*inputs), flops, expected, truth)


def bench_block(bench: Bench) -> None:
    """The operations of one transformer block, one by one."""
    network = models.our_network(bench.config, bench.dtype, bench.device)
    blocks.bench_parts(network, bench.clip, bench.device, bench.ceilings, (bench.plain.block, bench.fused.block))


def _latents(bench: Bench) -> Tensor:
    return torch.randn(1, 16, *bench.decoded, device=bench.device, dtype=models.TYPES[bench.dtype])


def bench_decode(bench: Bench) -> None:
    """Latents to pixels, in the chunks that sampling uses."""
    z = _latents(bench)
    _bench_first_stage(
        bench, "vae_decode", z, lambda stage, z: stage.decode(z), lambda theirs: theirs.decode(z, return_dict=False)[0]
    )


def bench_decode_lean(bench: Bench) -> None:
    """Latents to pixels as placement `lean` does it: in runs of frames, the causal cache in pinned host memory."""
    z = _latents(bench)
    stage = models.our_first_stage(bench.config, bench.dtype, bench.device)
    stage.encoder.to("meta")  # only the decoder is on the device then
    flops = conv_flops(stage, lambda: stage.decode(z))
    expected = stage.decode(z)
    stage.set_channels_last()
    stage.set_low_memory(cache_on_cpu=True)
    for variant, kernels in (("plain", bench.plain), ("fused", bench.fused)):
        stage.use_ops(kernels.vae)
        release()
        start = time.perf_counter()
        stage.decode(z)
        torch.cuda.synchronize()
        emit(part="vae_decode_lean", variant=variant, first_ms=1e3 * (time.perf_counter() - start))
        bench.report("vae_decode_lean", variant, lambda: stage.decode(z), flops, expected)


def bench_decode_small(bench: Bench) -> None:
    """Latents to pixels by a small decoder, latent frame by latent frame."""
    z = _latents(bench)
    decoder = models.small_decoder(bench.config, bench.dtype, bench.device)
    flops = conv_flops(decoder, lambda: decoder.decode(z))
    truth = copy.deepcopy(decoder).float().decode(z.float())
    release()
    bench.report("vae_decode_small", "plain", lambda: decoder.decode(z), flops, truth=truth)


def bench_text_lean(bench: Bench) -> None:
    """A prompt through T5 XXL as placement `lean` does it: layer by layer, from memory that is not pinned."""
    encoder = models.text_encoder(bench.dtype)
    blocks_of = [[block] for block in encoder.encoder.block]
    tokens = torch.zeros(1, 226, dtype=torch.long, device=bench.device)
    placement = Placement("lean", bench.device)

    def run() -> Tensor:
        with placement.use(encoder, blocks_of):
            return encoder(tokens)

    timing = time_runs(run, bench.device, bench.seconds)
    size = sum(weight.nbytes for weight in encoder.parameters())
    emit(part="text_lean", ms=timing.ms, peak_gib=timing.peak_bytes / 2**30, gb_s=size / timing.ms / 1e6)


def bench_encode(bench: Bench) -> None:
    """Pixels to the posterior's moments."""
    frames, *latent_size = bench.decoded
    size = (1, 3, STRIDES.pixel_frames(frames), *STRIDES.pixel_size(*latent_size))
    x = torch.rand(size, device=bench.device, dtype=models.TYPES[bench.dtype]) * 2 - 1
    _bench_first_stage(
        bench, "vae_encode", x, lambda stage, x: stage.moments(x),
        lambda theirs: theirs.encode(x).latent_dist.parameters,
    )  # fmt: skip


def _bench_first_stage(
    bench: Bench, part: str, given: Tensor, work: Callable[[nn.Module, Tensor], Tensor], theirs_on_it: Callable
) -> None:
    """Both variants of `work` on our VAE, and diffusers' with the same weights (whose chunks of frames differ)."""
    stage = models.our_first_stage(bench.config, bench.dtype, bench.device)
    flops = conv_flops(stage, lambda: work(stage, given))
    exact = copy.deepcopy(stage).float()
    truth = work(exact, given.float())
    del exact
    release()
    expected = bench.report(part, "plain", lambda: work(stage, given), flops, truth=truth)
    _their_first_stage(bench, part, stage, theirs_on_it, flops, truth)
    release()
    stage.use_ops(bench.fused.vae)
    stage.set_channels_last()
    bench.report(part, "fused", lambda: work(stage, given), flops, expected, truth)


def _their_first_stage(
    bench: Bench, part: str, stage: nn.Module, work: Callable[[Any], Tensor], flops: float, truth: Tensor
) -> None:
    coder = "decoder" if part == "vae_decode" else "encoder"
    with reference(bench, part, lambda: models.diffusers_coder_like(stage, bench.config, coder)) as theirs:
        if theirs is not None:
            comparable = truth if coder == "decoder" else None  # its encoder norms every 8 frames by themselves
            bench.report(part, "diffusers", lambda: work(theirs), flops, truth=comparable)


def bench_train(bench: Bench, rank: int) -> None:
    """A training step of the transformer: all weights, or an adapter of `rank`."""
    part = "train_lora" if rank else "train_full"
    network = models.our_trained_network(bench.config, bench.dtype, bench.device, rank)
    tokens = models.token_count(network, bench.clip)
    flops = sum(training.training_flops(network.hidden_size, tokens, network.num_layers, rank))
    limit = training.training_limit(network, tokens, rank, bench.attention, bench.ceilings)
    size = (bench.config, bench.dtype, bench.device, bench.clip, bench.seconds)
    about = training.TrainingBench(part, rank, *size, flops, limit)
    training.bench_ours(about, network, {"plain": bench.plain, "fused": bench.fused})
    inputs = models.network_inputs(network, bench.clip, bench.device)
    given = models.diffusers_inputs(network, bench.clip, tuple(part[:1] for part in inputs))
    del network

    build = partial(models.diffusers_trained_network, bench.config, bench.dtype, bench.device, rank)
    with reference(bench, part, build) as theirs:
        if theirs is not None:
            training.bench_theirs(about, theirs, given)


PARTS = {
    "dit": bench_dit,
    "block": bench_block,
    "vae_decode": bench_decode,
    "vae_decode_lean": bench_decode_lean,
    "vae_decode_small": bench_decode_small,
    "text_lean": bench_text_lean,
    "vae_encode": bench_encode,
    "train_full": partial(bench_train, rank=0),
    "train_lora": partial(bench_train, rank=128),
}


@contextmanager
def reference(bench: Bench, part: str, build: Callable[[], nn.Module]) -> Iterator[Any]:
    """diffusers' model, or None (with a line that says why) where it is not wanted or cannot be had."""
    release()
    if not bench.diffusers:
        yield None
        return
    try:
        with bench.device:
            model = build()
        model = model.to(models.TYPES[bench.dtype])
    except (ImportError, RuntimeError) as error:
        emit(part=part, variant="diffusers", skipped=str(error).splitlines()[0][:200])
        model = None
    yield model


def run_part(part: str, bench: Bench, began: float) -> bool:
    """Whether a part ran through. One that fails is told with its traceback, and the others still run."""
    release()
    try:
        PARTS[part](bench)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        emit(part=part, failed=f"{type(error).__name__}: {error}"[:300])
        return False
    emit(part=part, done_after_s=time.perf_counter() - began)
    return True


def release() -> None:
    """Give freed memory back, so that the next part's peak is its own."""
    gc.collect()
    torch.cuda.empty_cache()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for the runs of each variant of a part")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--config", default=str(CONFIG), help="YAML with the model section")
    parser.add_argument("--frames", type=int, help="latent frames, of 1.5 even; default: as the model was trained")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: as the model was trained"
    )
    parser.add_argument("--attention", default="cudnn", help="accelerate.attention of the fused path")
    parser.add_argument("--no-diffusers", action="store_true", help="leave the comparison out")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its convolutions (slow start)")
    parser.add_argument("--profile", action="store_true", help="also list the kernels that take longest")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.only.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("error: PyTorch sees no GPU; tools/bench/cpu.py measures the CPU.", file=sys.stderr)
        return 2
    began, device = time.perf_counter(), torch.device("cuda")
    ceilings = measure_ceilings(device, models.TYPES[options.dtype])
    bench = Bench(
        config=options.config,
        dtype=options.dtype,
        device=device,
        ceilings=ceilings,
        seconds=options.seconds,
        clip=models.Clip.of(options.config, options.frames, options.size),
        attention=options.attention,
        diffusers=not options.no_diffusers,
        profile=options.profile,
        plain=choose_kernels("plain", "default", device),
        fused=choose_kernels("triton", options.attention, device),
    )
    emit(
        device=torch.cuda.get_device_name(device),
        torch=torch.__version__,
        matmul_tflops=ceilings.flops / 1e12,
        copy_tb_s=ceilings.bandwidth / 1e12,
    )
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    failed = [part for part in options.only.split(",") if not run_part(part, bench, began)]
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

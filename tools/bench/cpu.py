"""Speed on the CPU: `python tools/bench/cpu.py`. Prints JSON lines.

Times the transformer's forward and the VAE's decode and encode at the sizes of a configuration (default: the demo's),
float32, random weights, and names the limit: the part's arithmetic at the rate of a large matrix product, measured in
the same run. `channels_last` is the VAE with its weights stored so, checked against the usual layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from tools.bench import models
from tools.bench.flops import conv_flops, network_flops
from tools.bench.measure import Ceilings, emit, measure_ceilings, relative_error, time_runs

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo_infer.yaml"
PARTS = ("dit", "vae_decode", "vae_encode")
CPU = torch.device("cpu")
MATRIX = 1024


def report(
    part: str,
    variant: str,
    run: Callable[[], Tensor],
    flops: float,
    ceilings: Ceilings,
    seconds: float,
    expected: Tensor | None = None,
) -> Tensor:
    """Time one variant of a part, print its line, and give its result back."""
    timing = time_runs(run, CPU, seconds, least=1)
    limit = ceilings.limit_ms(flops)
    emit(
        part=part,
        variant=variant,
        ms=timing.ms,
        runs=timing.runs,
        gflops=flops / timing.ms / 1e6,
        limit_ms=limit,
        share_of_limit=limit / timing.ms,
        error_to_plain=None if expected is None else relative_error(timing.result, expected),
    )
    return timing.result


def bench_dit(config: str, frames: int, ceilings: Ceilings, seconds: float) -> None:
    """The transformer's forward on a guidance pair."""
    network = models.our_network(config, "fp32", CPU)
    inputs = models.network_inputs(network, frames, CPU)
    flops = network_flops(network, models.token_count(network, frames))
    report("dit", "plain", lambda: network(*inputs), flops, ceilings, seconds)


def bench_first_stage(
    part: str, config: str, work: Callable[[nn.Module], Tensor], ceilings: Ceilings, seconds: float
) -> None:
    """`work` on the VAE, in both layouts of its weights."""
    stage = models.our_first_stage(config, "fp32", CPU)
    flops = conv_flops(stage, lambda: work(stage))
    expected = report(part, "plain", lambda: work(stage), flops, ceilings, seconds)
    stage.set_channels_last()
    report(part, "channels_last", lambda: work(stage), flops, ceilings, seconds, expected)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the runs of each variant, one at least")
    parser.add_argument("--config", default=str(CONFIG), help="YAML with the model section")
    parser.add_argument("--frames", type=int, default=5, help="latent frames, odd")
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
    height, width = models.latent_size(options.config)
    z = torch.randn(1, 16, options.frames, height, width)
    x = torch.rand(1, 3, 4 * options.frames - 3, 8 * height, 8 * width) * 2 - 1
    shared = (ceilings, options.seconds)
    for part in options.only.split(","):
        if part == "dit":
            bench_dit(options.config, options.frames, *shared)
        elif part == "vae_decode":
            bench_first_stage(part, options.config, lambda stage: stage.decode(z), *shared)
        else:
            bench_first_stage(part, options.config, lambda stage: stage.encode(x, unregularized=True)[0], *shared)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

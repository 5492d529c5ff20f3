"""Several processes for one clip, beside one of them alone, in one call. Prints JSON lines on the first process.

    python -m sgm.launch --standalone --nproc_per_node=2 tools/bench/parallel.py --attention cudnn

For each way in which the processes divide: a guided call of the transformer, decoding, what was sent by one process,
and the share of the time in which it waited for others. Weights and inputs are random: only times mean anything.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.config import merge_yaml
from sgm.distributed import init_distributed, shutdown, wait_for_all
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.ops.choice import ATTENTIONS, choose_kernels
from sgm.parallel.apply import share_network
from sgm.parallel.decoding import SharedChunks
from sgm.parallel.team import BRANCHES, Layout, Team, form_team
from tools.bench import models
from tools.bench.measure import emit, time_runs


class Traffic:
    """Bytes that this process sends, and milliseconds that its collectives take, by being called in their place."""

    CALLS = ("all_to_all_single", "all_gather", "broadcast", "recv", "isend")

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        plain = {name: getattr(dist, name) for name in self.CALLS}
        for name, call in plain.items():
            setattr(dist, name, self._counted(name, call))
        try:
            yield self
        finally:
            for name, call in plain.items():
                setattr(dist, name, call)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            sent = {"all_to_all_single": rest[:1], "all_gather": rest[:1], "isend": (first,)}.get(name, ())
            self.bytes += sum(tensor.nbytes for tensor in sent)
            begin = self._now()
            result = call(first, *rest, **options)
            self._spans.append((begin, self._now()))
            return result

        return counted

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited_ms(self) -> float:
        if self.device.type != "cuda":
            return sum(1e3 * (end - begin) for begin, end in self._spans)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self._spans)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cogvideox_2b_infer.yaml")
    parser.add_argument("--dtype", default="bf16", choices=models.TYPES)
    parser.add_argument("--frames", type=int, default=13, help="latent frames")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: the configured size")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--attention", default="default", choices=ATTENTIONS)
    parser.add_argument("--seconds", type=float, default=5.0, help="about so long for each figure")
    parser.add_argument("--runs", type=int, default=5, help="of each figure on several processes")
    return parser.parse_args(arguments)


def layouts(world: int) -> list[Layout]:
    """All ways in which `world` processes make one clip."""
    found = [Layout(1, 1, world)]
    return [Layout(1, BRANCHES, world // BRANCHES), *found] if world % BRANCHES == 0 else found


def engine_of(options: argparse.Namespace, device: torch.device) -> SATVideoDiffusionEngine:
    section = copy.deepcopy(merge_yaml([options.config])["model"])
    parts = {name: section[name] for name in ("network_config", "denoiser_config", "sampler_config")}
    with torch.device("meta"):
        engine = SATVideoDiffusionEngine(**parts, dtype=options.dtype)
    engine.model.diffusion_model = models.our_network(options.config, options.dtype, device)
    engine.use_kernels(choose_kernels(options.kernels, options.attention, device))
    return engine.eval()


def latent_size(engine: SATVideoDiffusionEngine, options: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the latents that are asked for, or configured."""
    if options.size:
        return STRIDES.latent_size(*options.size)
    return engine.network.latent_height, engine.network.latent_width


def guided_call(engine: SATVideoDiffusionEngine, options: argparse.Namespace, device: torch.device) -> Callable:
    """A call for both branches, as the sampler makes it; by this process's share of it."""
    network = engine.network
    size = latent_size(engine, options)
    numbers = torch.Generator(device).manual_seed(0)
    kind = {"device": device, "dtype": network.dtype, "generator": numbers}
    x = torch.randn(2, options.frames, network.out_channels, *size, **kind)
    text = torch.randn(2, network.positions.text_length, network.patches.text_hidden_size, **kind)
    times = torch.full((2,), 500.0, device=device)

    def denoise(x: Tensor, signal: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return network(x, signal, conditions["crossattn"])

    call = engine.branches.around(denoise, 1) if engine.branches is not None else denoise
    return lambda: call(x, times, {"crossattn": text})


def together(run: Callable[[], Any], options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Figures of what all processes do at the same time; each as often as the others."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    with Traffic(device).counting() as traffic:
        for _ in range(options.runs):
            dist.barrier()
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - begin))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    ms, whole = sorted(times)[len(times) // 2], sum(times)
    sent = traffic.bytes / options.runs / 2**20
    return {"ms": ms, "sent_mib": sent, "waiting": traffic.waited_ms() / whole, "peak_gib": peak}


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    info = init_distributed()
    first, device = info.rank == 0, info.device
    say = emit if first else lambda **facts: None
    stage = models.our_first_stage(options.config, options.dtype, device)
    stage.use_ops(choose_kernels(options.kernels, options.attention, device).vae)
    if device.type == "cuda":
        stage.set_channels_last()
    engine = engine_of(options, device)
    with torch.no_grad():
        alone = {}
        size = latent_size(engine, options)
        z = torch.randn(1, 16, options.frames, *size, device=device, dtype=models.TYPES[options.dtype])
        parts = {"guided call": guided_call(engine, options, device), "decode": lambda: stage.decode(z)}
        for part, run in parts.items():
            if first:
                alone[part] = time_runs(run, device, options.seconds).ms
                say(part=part, processes=1, ms=alone[part])
            wait_for_all()
        for layout in layouts(info.world_size):
            team = form_team(layout)
            engine = engine_of(options, device)
            share_network(engine, team)
            figures = together(guided_call(engine, options, device), options, device)
            _report(say, "guided call", layout, figures, alone)
        _report(say, "decode", layout, together(lambda: _decode(stage, z, team), options, device), alone)
    shutdown()
    return 0


def _decode(stage: Any, z: Tensor, team: Team) -> None:
    for _ in stage.decode_chunks(z, SharedChunks(team)):
        pass


def _report(say: Callable, part: str, layout: Layout, figures: dict[str, float], alone: dict[str, float]) -> None:
    times = alone[part] / figures["ms"] if alone else None
    ways = {"guidance": layout.guidance, "sequence": layout.sequence} if part != "decode" else {}
    say(part=part, processes=layout.world, **ways, **figures, times_faster=times)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Several processes for one clip, beside one of them alone, in one call.

    python -m sgm.launch --standalone --nproc_per_node=2 tools/bench/parallel.py --attention cudnn
    ... --training      a training step of a LoRA adapter (--rank 0: of all weights), for each way of checkpointing
    ... --forward       the transformer for one sample

Without either: a guided call of the transformer in each way in which the processes divide it, decoding, encoding. Of
each, what one process sends, the share of the time in which it waits for others, and the most memory that it takes.
Weights and inputs are random: only times mean anything. The first process prints JSON lines, then a table.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.config import merge_yaml
from sgm.distributed import DistInfo, init_distributed, shutdown, wait_for_all
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.ops.choice import ATTENTIONS, choose_kernels
from sgm.parallel.apply import share_encoding, share_network, share_tokens
from sgm.parallel.decoding import SharedChunks
from sgm.parallel.team import BRANCHES, Layout, Team, form_team
from tools.bench import models
from tools.bench.measure import emit, time_runs
from tools.bench.traffic import Traffic
from tools.bench.training import CHECKPOINTING, training_step

MODES = {str(mode).lower(): mode for mode in CHECKPOINTING}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cogvideox_2b_infer.yaml")
    parser.add_argument("--dtype", default="bf16", choices=models.TYPES)
    parser.add_argument("--frames", type=int, default=13, help="latent frames")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels; default: the configured size")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--attention", default="default", choices=ATTENTIONS)
    parser.add_argument("--seconds", type=float, default=5.0, help="about so long for each figure of one process")
    parser.add_argument("--runs", type=int, default=5, help="of each figure on several processes")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--training", action="store_true", help="a training step in place of sampling's parts")
    what.add_argument("--forward", action="store_true", help="the transformer for one sample in place of them")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter that --training trains; 0: all weights")
    parser.add_argument("--checkpointing", nargs="+", default=list(MODES), choices=MODES, help="of --training")
    options = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        parser.error("one process has none to share with: start several by `python -m sgm.launch`, as --help shows")
    return options


@dataclass
class Report:
    """Figures of parts on one process and on several, from the first one of them."""

    prints: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    alone: dict[str, float] = field(default_factory=dict)

    def one(self, part: str, run: Callable[[], Any], device: torch.device, seconds: float) -> None:
        """Time a part on the first process alone; the others wait. Where memory ends is said."""
        if self.prints:
            try:
                timing = time_runs(run, device, seconds)
            except torch.OutOfMemoryError:
                self._add(part=part, processes=1, ms=None)
            else:
                self.alone[part] = timing.ms
                peak = timing.peak_bytes / 2**30 if timing.peak_bytes else None
                self._add(part=part, processes=1, ms=timing.ms, peak_gib=peak)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        wait_for_all()

    def several(self, part: str, layout: Layout, figures: dict[str, float | None]) -> None:
        ways = {"guidance": layout.guidance, "sequence": layout.sequence} if part not in ("decode", "encode") else {}
        alone, ms = self.alone.get(part), figures["ms"]
        self._add(
            part=part, processes=layout.world, **ways, **figures, times_faster=alone / ms if alone and ms else None
        )

    def _add(self, **facts: Any) -> None:
        if self.prints:
            self.rows.append(facts)
            emit(**facts)

    def table(self) -> str:
        """All figures as markdown."""
        lines = [
            "| part | processes | time | times faster | sent by each | waiting | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            ways = [f"{row[name]} {what}" for name, what in _WAYS.items() if row.get(name, 1) > 1]
            cells = [
                row["part"], f"{row['processes']}{f' ({chr(44).join(ways)})' if ways else ''}",
                "does not fit" if row["ms"] is None else f"{row['ms']:.1f} ms",
                _cell(row.get("times_faster"), "{:.2f}"), _cell(row.get("sent_mib"), "{:.0f} MiB"),
                _cell(row.get("waiting"), "{:.1%}"), _cell(row.get("peak_gib"), "{:.1f} GiB"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


_WAYS = {"guidance": "branches", "sequence": "shares"}


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


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


def inputs_of(network: nn.Module, options: argparse.Namespace, device: torch.device, count: int) -> tuple[Tensor, ...]:
    """Latents, timesteps and text for `count` samples, the same on every process."""
    torch.manual_seed(0)
    clip = models.Clip.of(options.config, options.frames, options.size)
    return tuple(part[:count] for part in models.network_inputs(network, clip, device))


def guided_call(engine: SATVideoDiffusionEngine, options: argparse.Namespace, device: torch.device) -> Callable:
    """A call for both branches, as the sampler makes it; by this process's share of it."""
    x, times, text = inputs_of(engine.network, options, device, 2)

    def denoise(x: Tensor, signal: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return engine.network(x, signal, conditions["crossattn"])

    call = engine.branches.around(denoise, 1) if engine.branches is not None else denoise
    return lambda: call(x, times, {"crossattn": text})


def together(run: Callable[[], Any], options: argparse.Namespace, device: torch.device) -> dict[str, float | None]:
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
    options, info = parse(arguments), init_distributed()
    report = Report(info.rank == 0)
    if options.training:
        bench_training(options, info, report)
    else:
        with torch.no_grad():
            (bench_forward if options.forward else bench_sampling)(options, info, report)
    if report.prints:
        print(f"\n{report.table()}", flush=True)
    shutdown()
    return 0


def bench_sampling(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """A guided call, divided in each way, and decoding."""
    device = info.device
    stage = models.our_first_stage(options.config, options.dtype, device)
    stage.use_ops(choose_kernels(options.kernels, options.attention, device).vae)
    if device.type == "cuda":
        stage.set_channels_last()
    engine = engine_of(options, device)
    clip = models.Clip.of(options.config, options.frames, options.size)
    z = torch.randn(1, 16, *clip, device=device, dtype=models.TYPES[options.dtype])
    report.one("guided call", guided_call(engine, options, device), device, options.seconds)
    report.one("decode", lambda: stage.decode(z), device, options.seconds)
    frames, size = stage.strides.pixel_frames(clip.frames), stage.strides.pixel_size(clip.height, clip.width)
    x = torch.rand(1, 3, frames, *size, device=device, dtype=z.dtype)
    report.one("encode", lambda: stage.moments(x), device, options.seconds)
    for layout in layouts(info.world_size):
        team = form_team(layout)
        engine = engine_of(options, device)
        share_network(engine, team)
        report.several("guided call", layout, together(guided_call(engine, options, device), options, device))
    report.several("decode", layout, together(lambda: _decode(stage, z, team), options, device))
    share_encoding(stage, team)
    report.several("encode", layout, together(lambda: stage.moments(x), options, device))


def bench_forward(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """The network for one sample: whole, and in shares of its tokens."""
    network, team = engine_of(options, info.device).network, form_team(Layout(1, 1, info.world_size))
    inputs = inputs_of(network, options, info.device, 1)
    report.one("forward", lambda: network(*inputs), info.device, options.seconds)
    share_tokens(network, team)
    report.several("forward", team.layout, together(lambda: network(*inputs), options, info.device))


def bench_training(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """A step on one clip, for each way of checkpointing: whole, and in shares of its tokens."""
    team = form_team(Layout(1, 1, info.world_size))
    network = models.our_trained_network(options.config, options.dtype, info.device, options.rank)
    network.use_ops(choose_kernels(options.kernels, options.attention, info.device).block)
    inputs = inputs_of(network, options, info.device, 1)
    like = inputs[0][:, :, : network.out_channels]
    step = training_step(network, lambda: network(*inputs), like)
    shared = training_step(network, lambda: network(*inputs), like, mean_over_processes)
    for alone in (True, False):
        if not alone:
            share_tokens(network, team)
        for name in options.checkpointing:
            network.transformer.checkpoint_activations = MODES[name]
            part = f"training step, checkpointing {name}"
            if alone:
                report.one(part, step, info.device, options.seconds)
            else:
                report.several(part, team.layout, together(shared, options, info.device))
            network.zero_grad(set_to_none=True)


def mean_over_processes(gradients: Sequence[Tensor]) -> None:
    """In one message, as ZeRO 1 does where gradients fill one bucket."""
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def _decode(stage: Any, z: Tensor, team: Team) -> None:
    for _ in stage.decode_chunks(z, SharedChunks(team)):
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Several processes for one clip, beside one of them alone, in one call.

    python -m sgm.launch --standalone --nproc_per_node=2 tools/bench/parallel.py --attention cudnn
    ... --training      a training step of a LoRA adapter (--rank 0: of all weights), for each way of checkpointing
    ... --zero          the same, nothing run again, by DeepSpeed's ZeRO 2: a clip for each process, and one for all
    ... --forward       the transformer for one sample
    ... --all           everything that docs/several_gpus.md foretells

Without either: a guided call of the transformer in each way in which the processes divide it, decoding, encoding. Of
each, what one process sends, the share of the time in which it waits for others, the most memory that it takes, and
what `tools/bench/scaling.py` foretells of H200s. Weights and inputs are random: only times mean anything. The first
process prints JSON lines, then a table.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.config import merge_yaml
from sgm.distributed import DistInfo, ensure_groups, init_distributed, shutdown, wait_for_all
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.models.network import DiffusionTransformer
from sgm.modules.ops.choice import ATTENTIONS, choose_kernels
from sgm.parallel.apply import share_encoding, share_network, share_tokens
from sgm.parallel.first_stage import SharedChunks
from sgm.parallel.team import Layout, Team, form_team
from sgm.training.optimizers.spec import parameter_groups
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.engine import start_engine
from tools.bench import models, scaling
from tools.bench.measure import emit, time_runs
from tools.bench.traffic import Traffic
from tools.bench.training import CHECKPOINTING, loss_of, training_step

LARGE = (21, 768, 1360)  # latent frames, pixels: of --forward in --all
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
    what.add_argument("--zero", action="store_true", help="training steps by ZeRO 2 in place of them")
    what.add_argument("--forward", action="store_true", help="the transformer for one sample in place of them")
    what.add_argument("--all", action="store_true", help="all of these, one after another")
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

    def several(
        self,
        part: str,
        layout: Layout,
        figures: dict[str, float | None],
        predict: Callable[[float], scaling.Predicted] | None = None,
    ) -> None:
        """What all processes did together, beside what is predicted from the time of one."""
        ways = {"guidance": layout.guidance, "sequence": layout.sequence} if part not in ("decode", "encode") else {}
        alone, ms = self.alone.get(part), figures["ms"]
        faster = {"times_faster": layout.data * alone / ms if alone and ms else None}
        predicted = predict(alone)._asdict() if alone and predict else {}
        foretold = {f"predicted_{name}": value for name, value in predicted.items()}
        self._add(part=part, processes=layout.world, clips=layout.data, **ways, **figures, **faster, **foretold)

    def whole_clips(self) -> None:
        """Lines for all steps of a clip with its decode, from those of both that are there."""
        made = {line["processes"]: line for line in self.rows if line["part"] == "decode"}
        for call in [line for line in self.rows if line["part"] == "guided call"]:
            facts = {name: call[name] for name in ("processes", "guidance", "sequence") if name in call}
            for name in ("ms", "predicted_ms"):
                if (one := call.get(name)) and (decode := made[call["processes"]].get(name)):
                    facts[name] = scaling.STEPS * one + decode
            if "ms" in facts:
                self.alone.setdefault(scaling.WHOLE, facts["ms"])
                self._add(part=scaling.WHOLE, **facts, times_faster=self.alone[scaling.WHOLE] / facts["ms"])

    def _add(self, **facts: Any) -> None:
        if self.prints:
            self.rows.append(facts)
            emit(**facts)


def engine_of(options: argparse.Namespace, device: torch.device) -> SATVideoDiffusionEngine:
    section = copy.deepcopy(merge_yaml([options.config])["model"])
    parts = {name: section[name] for name in ("network_config", "denoiser_config", "sampler_config")}
    with torch.device("meta"):
        engine = SATVideoDiffusionEngine(**parts, dtype=options.dtype)
    engine.model.diffusion_model = models.our_network(options.config, options.dtype, device, frames=options.frames)
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
    try:
        for bench, its_options in work_of(options):
            with torch.set_grad_enabled(bench in (bench_training, bench_zero)):
                bench(its_options, info, report)
    finally:
        if report.prints:
            print(f"\n{scaling.table(report.rows)}", flush=True)
    shutdown()
    return 0


def work_of(options: argparse.Namespace) -> list[tuple[Callable[..., None], argparse.Namespace]]:
    """What is asked for, with the options of each."""

    def with_(**changes: Any) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(options), **changes})

    if options.all:
        large = with_(size=options.size or LARGE[1:], frames=LARGE[0] if options.size is None else options.frames)
        steps = [(bench_training, with_(checkpointing=["false"])), (bench_zero, options), (bench_zero, with_(rank=0))]
        return [(bench_sampling, options), *steps, (bench_forward, large)]
    chosen = {bench_training: options.training, bench_zero: options.zero, bench_forward: options.forward}
    return [(next((bench for bench, wanted in chosen.items() if wanted), bench_sampling), options)]


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
    shapes = scaling.Shapes.of(options.config, options.frames, options.size)
    for layout in scaling.layouts(info.world_size):
        team = form_team(layout)
        engine = engine_of(options, device)
        share_network(engine, team)
        figures = together(guided_call(engine, options, device), options, device)
        report.several("guided call", layout, figures, partial(scaling.sampling, shapes, layout, 2))
    figures = together(lambda: _decode(stage, z, team), options, device)
    report.several("decode", layout, figures, partial(scaling.decoding, clip, layout.world))
    share_encoding(stage, team)
    report.several("encode", layout, together(lambda: stage.moments(x), options, device))
    report.whole_clips()


def bench_forward(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """The network for one sample: whole, and in shares of its tokens."""
    network, team = engine_of(options, info.device).network, form_team(Layout(1, 1, info.world_size))
    inputs = inputs_of(network, options, info.device, 1)
    report.one("forward", lambda: network(*inputs), info.device, options.seconds)
    share_tokens(network, team)
    shapes = scaling.Shapes.of(options.config, options.frames, options.size)
    figures = together(lambda: network(*inputs), options, info.device)
    report.several("forward", team.layout, figures, partial(scaling.sampling, shapes, team.layout, 1))


def bench_training(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """A step on one clip, for each way of checkpointing: whole, and in shares of its tokens."""
    team = form_team(Layout(1, 1, info.world_size))
    network, inputs, like = training_of(options, info.device)
    shapes = scaling.Shapes.of(options.config, options.frames, options.size)
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
                figures = together(shared, options, info.device)
                predict = partial(scaling.training, shapes, team.layout, options.rank, False)
                report.several(part, team.layout, figures, predict if name == "false" else None)
            network.zero_grad(set_to_none=True)


def bench_zero(options: argparse.Namespace, info: DistInfo, report: Report) -> None:
    """A step by DeepSpeed's ZeRO 2: on a clip for each process, then on one in shares of its tokens."""
    network, inputs, like = training_of(options, info.device)
    shapes = scaling.Shapes.of(options.config, options.frames, options.size)
    part = f"training step, ZeRO 2, {f'adapter of rank {options.rank}' if options.rank else 'all weights'}"
    report.one(part, training_step(network, lambda: network(*inputs), like), info.device, options.seconds)
    network.zero_grad(set_to_none=True)
    ensure_groups()
    import deepspeed

    section = merge_yaml(["configs/cogvideox_2b_sft.yaml"])["deepspeed"]
    section |= {"fp16": {"enabled": options.dtype == "fp16"}, "bf16": {"enabled": options.dtype == "bf16"}}
    plan = plan_deepspeed(section, device_type=info.device.type, data_parallel_size=info.world_size)
    engine = start_engine(network, parameter_groups(network), plan, info.device.type)

    def gather(*given: Any, **how: Any) -> Any:
        return dist.all_gather_into_tensor(*given, **how)

    deepspeed.comm.comm.cdb.all_gather_function = gather  # it holds PyTorch's, for which `Traffic` puts another

    def step() -> None:
        engine.backward(loss_of(engine(*inputs), like))
        engine.step()

    for layout in (Layout(info.world_size), Layout(1, 1, info.world_size)):
        share_tokens(network, form_team(layout))
        figures = together(step, options, info.device)
        report.several(part, layout, figures, partial(scaling.training, shapes, layout, options.rank, True))
    engine.destroy()


def training_of(
    options: argparse.Namespace, device: torch.device
) -> tuple[DiffusionTransformer, tuple[Tensor, ...], Tensor]:
    """A network that learns, its inputs for one clip, and what its result is like."""
    network = models.our_trained_network(options.config, options.dtype, device, options.rank, options.frames)
    network.use_ops(choose_kernels(options.kernels, options.attention, device).block)
    network.transformer.checkpoint_activations = False
    inputs = inputs_of(network, options, device, 1)
    return network, inputs, inputs[0][:, :, : network.out_channels]


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

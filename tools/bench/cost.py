"""What a clip costs by length and size, for the models of the family; and the picture of it.

    python tools/bench/cost.py --attention cudnn > cost.jsonl
    python tools/bench/cost.py --plot cost.png cost.jsonl

Times one guided call of each model's transformer for clips of several lengths and sizes, with the fused kernels where
they run, then the VAE's decoding (of the first configuration). Prints a JSON line for each: milliseconds, seconds in a
whole clip (of the transformer computed, for 50 calls), most memory with the part's weights. A clip for which the model
has no positions, or which does not fit, gets a line that says so. Weights and inputs are random: only times and memory
mean anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor, nn

from sgm.cli import exit_code
from sgm.files import replacing
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.ops.choice import ATTENTIONS, Kernels, choose_kernels
from sgm.training.watch.curve import Curve, chart
from tools.bench import models
from tools.bench.measure import emit, time_runs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FAMILY = [str(CONFIGS / f"{name}_infer.yaml") for name in ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b")]
CLIPS = "9x256x384 25x256x384 49x256x384 25x480x720 49x480x720 49x768x1360 81x768x1360 161x768x1360".split()
STEPS = 50
WARM_UP = 5  # latent frames that show the decoder's first chunk and its later ones
DECODE = "VAE decode"
COLORS, GREY = ("#1f4e8c", "#c0392b", "#2e8b57", "#8e44ad"), "#808080"


class Size(NamedTuple):
    """Frames, height and width of a clip, in pixels."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, text: str) -> Size:
        """Of "49x480x720"."""
        try:
            size = cls(*map(int, text.split("x")))
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not frames x height x width: {CLIPS[0]}") from error
        step = STRIDES.size_step
        if min(size) < 1 or size.frames % (2 * STRIDES.time) != 1 or size.height % step or size.width % step:
            raise argparse.ArgumentTypeError(
                f"{text!r}: frames must be 1, 9, 17, 25, ... and both sides multiples of {step} pixels: {CLIPS[0]}"
            )
        return size

    def latents(self, patch: int = 1) -> models.Clip:
        """As a transformer with patches of so many frames handles it."""
        frames = sampled_frames(STRIDES.latent_frames(self.frames), patch)
        return models.Clip(frames, *STRIDES.latent_size(self.height, self.width))


@dataclass(frozen=True)
class Bench:
    """What every point needs."""

    sizes: Sequence[Size]
    dtype: str
    device: torch.device
    kernels: Kernels
    seconds: float

    def point(
        self, model: str, size: Size, run: Callable[[], Tensor], warm_up: Callable[[], Any], calls: int, **facts: Any
    ) -> bool:
        """Time what a clip calls so many times, and print its line; False where it failed, but for lack of memory."""
        facts = {"model": model, **size._asdict(), **facts}
        failed = None
        try:
            timing = time_runs(run, self.device, self.seconds, least=1, warm_up=warm_up)
            peak = timing.peak_bytes / 2**30 if timing.peak_bytes else None
            finite = bool(timing.result.isfinite().all())
            emit(**facts, ms=timing.ms, runs=timing.runs, seconds=calls * timing.ms / 1e3, peak_gib=peak, finite=finite)
            del timing
        except RuntimeError as error:
            lacking = isinstance(error, torch.OutOfMemoryError)
            failed = "out of memory" if lacking else f"{type(error).__name__}: {error}"[:300]
        if failed:
            emit(**facts, failed=failed)
        release(self.device)
        return failed in (None, "out of memory")


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next point's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def bench_transformer(bench: Bench, config: str) -> bool:
    """Guided calls of the model of a YAML file, of which a clip takes `STEPS`; False where one failed."""
    name = Path(config).stem.removesuffix("_infer")
    network = models.our_network(config, bench.dtype, bench.device)
    network.use_ops(bench.kernels.block)
    right = True
    for size in bench.sizes:
        clip = size.latents(network.patch.t)
        facts = {"latent_frames": clip.frames, "tokens": models.token_count(network, clip)}
        try:
            network.positions.check_grid(network.patch.grid(*clip))
        except ValueError as error:
            emit(model=name, **size._asdict(), **facts, skipped=str(error))
            continue
        inputs = models.network_inputs(network, clip, bench.device)

        def run(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
            return network(*inputs)

        def warm_up(run: Callable[[], Tensor] = run) -> None:
            with first_layer_alone(network):
                run()

        right &= bench.point(name, size, run, warm_up, STEPS, **facts)
    return right


@contextmanager
def first_layer_alone(network: nn.Module) -> Iterator[None]:
    """All layers launch the same kernels: one is enough to load and choose them."""
    layers = network.transformer.layers
    network.transformer.layers = layers[:1]
    try:
        yield
    finally:
        network.transformer.layers = layers


@torch.no_grad()
def bench_decode(bench: Bench, config: str) -> bool:
    """Latents to pixels, in the chunks that sampling uses; False where a clip failed."""
    stage = models.our_first_stage(config, bench.dtype, bench.device)
    stage.encoder.to("meta")  # only the decoder is on the device then
    stage.use_ops(bench.kernels.vae)
    if bench.kernels.fused:
        stage.set_channels_last()
    right = True
    for size in bench.sizes:
        z = torch.randn(1, 16, *size.latents(), device=bench.device, dtype=models.TYPES[bench.dtype])
        right &= bench.point(
            DECODE, size, lambda z=z: stage.decode(z), lambda z=z: stage.decode(z[:, :, :WARM_UP]), calls=1
        )
    return right


def read(logs: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The points that were measured, by model, from the smallest clip up. A later line replaces an earlier one."""
    found: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.startswith("{") else {}
            if "seconds" in record:
                size = tuple(record[side] for side in Size._fields)
                found.setdefault(record["model"], {})[size] = record
    return {model: sorted(points.values(), key=megapixels) for model, points in found.items()}


def megapixels(point: dict[str, Any]) -> float:
    return point["frames"] * point["height"] * point["width"] / 1e6


def draw(picture: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Time above memory, one line a model; memory is left out where none was measured.

    Raises:
        SaveError: the picture cannot be written.
    """
    titles = {"seconds": f"seconds: {STEPS} steps; decoding", "peak_gib": "GPU memory at most, GiB"}
    panels = []
    for fact, title in titles.items():
        curves = []
        for k, (model, points) in enumerate(found.items()):
            color, width = (GREY, 2) if model == DECODE else (COLORS[k % len(COLORS)], 3)
            places = [(megapixels(point), point[fact]) for point in points if point[fact] is not None]
            curves.append(Curve(model, places, color, width))
        curves = [curve for curve in curves if curve.points]
        dots = [Curve("", curve.points, curve.color, 0) for curve in curves]
        if curves:
            panels.append(chart(title, [*dots, *curves], "megapixels of the clip: frames x height x width", None))
    whole = Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)))
    for k, panel in enumerate(panels):
        whole.paste(panel, (0, k * panel.height))
    with replacing(picture) as temporary:
        whole.save(temporary)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, metavar="RESULTS.jsonl", help="what --plot draws")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results in place of measuring")
    parser.add_argument("--config", nargs="+", default=FAMILY, help="YAML files with the model section (the family's)")
    parser.add_argument(
        "--clips", nargs="+", type=Size.of, default=[Size.of(clip) for clip in CLIPS], metavar="FxHxW",
        help=f"frames x height x width in pixels, small ones first ({' '.join(CLIPS)})",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="for the runs of each point, of which one is made")
    parser.add_argument("--dtype", default="bf16", choices=models.TYPES)
    parser.add_argument("--attention", default="default", choices=ATTENTIONS)
    options = parser.parse_args(arguments)
    if bool(options.plot) != bool(options.logs):
        parser.error("--plot FILE.png goes with the results to draw: --plot cost.png cost.jsonl")
    missing = [str(log) for log in options.logs if not log.is_file()]
    if missing:
        parser.error(f"there is no file {missing[0]}; write it: python tools/bench/cost.py > {missing[0]}")
    return options


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.plot:
        found = read(options.logs)
        if not found:
            print(f"error: no results in {', '.join(map(str, options.logs))}", file=sys.stderr)
            return 2
        draw(options.plot, found)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = choose_kernels("auto", options.attention, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    emit(device=name, torch=torch.__version__, dtype=options.dtype, attention=options.attention, fused=kernels.fused)
    bench = Bench(options.clips, options.dtype, device, kernels, options.seconds)
    right = True
    for config in options.config:
        right &= bench_transformer(bench, config)
        release(device)
    right &= bench_decode(bench, options.config[0])
    return 0 if right else 1


def main(arguments: list[str]) -> int:
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

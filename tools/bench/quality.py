"""What fast mode costs: `python tools/bench/quality.py [CONFIG.yaml ...] [--fast FAST.yaml]`. Prints JSON lines.

Samples the same prompts with the same noise exactly, then with all switches of the fast configuration, and with each
kind alone where there are several. For each clip: PSNR of the decoded pixels to the exact clip's (dB, of uint8 values),
relative error of the latents, the part of the exact run's layers that ran, and seconds of sampling. For each variant:
their means, the lowest PSNR, and how much of what the captions say the clips show (`tools/demo/score.py`), where the
captions are of the demo's grammar.

`--curve` goes through `reuse_error` instead, and through settings of cache-dit (`tools/bench/cached_diffusers.py`),
which runs diffusers' transformer with the same weights, sampler and noise; `--cache-dit` adds a setting. On a CPU give
`--set accelerate.cpu_bf16=false`, so that both round alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from sgm.cli import exit_code
from sgm.config import AccelerateArgs, ConfigError, RunConfig, load_run_config, merge_yaml
from sgm.distributed import shutdown
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.prompts import gather
from sgm.inference.stages import EncodedPrompt
from sgm.modules.autoencoding.strides import STRIDES
from sgm.typed import build_args
from sgm.weights.preflight import with_found_paths
from tools.bench.cached_diffusers import CachedDiffusers, CacheDit
from tools.bench.measure import emit, relative_error
from tools.demo.captions import caption, parse
from tools.demo.measure import measure
from tools.demo.score import compare
from tools.demo.shapes import sample_spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KINDS = ("reuse", "guidance", "fp8")  # how the names of switches begin
OUR_CURVE = (0.08, 0.12, 0.18, 0.26, 0.4)  # reuse_error
THEIR_CURVE = ("warmup=32,skips=1", "warmup=16,skips=1", "warmup=8,skips=1", "warmup=16,skips=2", "warmup=8,skips=2",
               "warmup=8,skips=3")  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One sampled clip: latents (t, c, h, w), frames uint8 (f, h, w, 3), what it took.

    `layers`: those of the network that ran, each counted once for each branch.
    """

    latents: Tensor
    frames: np.ndarray
    seconds: float
    layers: int


def variants_of(exact: AccelerateArgs, fast: AccelerateArgs, extra: Sequence[str] = ()) -> dict[str, AccelerateArgs]:
    """ "exact"; all of the fast switches ("fast"), and each kind alone where there are several; and those given as
    texts "a=1;b=[0,1]"."""
    changes = {name: value for name, value in asdict(fast).items() if value != getattr(exact, name)}
    own = {kind: {n: v for n, v in changes.items() if n.startswith(kind)} for kind in KINDS}
    kinds = {kind: replace(exact, **values) for kind, values in own.items() if values}
    whole = {"fast": replace(exact, **{n: v for n, v in changes.items() if n.startswith(KINDS)})} if kinds else {}
    variants = {"exact": exact} | (kinds if len(kinds) > 1 else {}) | whole
    return variants | {text: _parsed(text, exact) for text in extra}


def _parsed(text: str, base: AccelerateArgs) -> AccelerateArgs:
    given = asdict(base) | merge_yaml([], text.split(";"))
    problems: list[str] = []
    found = build_args(AccelerateArgs, given, problems, [], "accelerate")
    if found is None:
        raise ConfigError(f"--variant {text}: {'; '.join(problems)}")
    return found


def demo_captions(count: int, frames: int, seed: int) -> list[str]:
    """Captions of the demo's grammar for clips of `frames` frames."""
    rng = np.random.default_rng(seed)
    return [caption(sample_spec(rng, frames), rng) for _ in range(count)]


def sample_clips(pipeline: Pipeline, prompts: Sequence[EncodedPrompt], decoder: Pipeline, seed: int) -> Iterator[Clip]:
    """One clip a prompt, with noise that depends on seed and prompt only."""
    pipeline.load("network")
    network = pipeline.engine.model
    cached = network if isinstance(network, CachedDiffusers) else None
    for index, prompt in enumerate(prompts):
        if cached:
            cached.start()
        with counted(cached.blocks if cached else pipeline.engine.network.transformer.layers) as layers:
            start = time.perf_counter()
            latents = pipeline.sample(prompt, [SampleId(seed, index, 0)])[0]
            seconds = time.perf_counter() - start
        yield Clip(latents, decoder.decode(latents), seconds, sum(layers))


@contextmanager
def counted(layers: Iterable[torch.nn.Module]) -> Iterator[list[int]]:
    """A list that gets the batch of every call of one of the layers."""
    batches: list[int] = []

    def count(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        batches.append(len(given[0] if given else named["hidden_states"]))

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        yield batches
    finally:
        for hook in hooks:
            hook.remove()


def psnr(frames: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 frames in dB; 99 for equal ones."""
    error = np.square(frames.astype(np.float32) - expected).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def prompt_score(prompts: Sequence[str], clips: Sequence[Clip]) -> float | None:
    """Share of the attributes that the captions name and the clips show; None for captions of another grammar."""
    right: list[bool] = []
    try:
        for text, clip in zip(prompts, clips, strict=True):
            found = compare(*parse(text), *measure(clip.frames))
            right += [value for name, values in found.items() if name != "all" for value in values]
    except ValueError:
        return None
    return sum(right) / len(right)


def report(name: str, prompts: Sequence[str], clips: Sequence[Clip], exact: Sequence[Clip]) -> None:
    """A line for each clip, then the variant's."""
    ratios = [psnr(clip.frames, other.frames) for clip, other in zip(clips, exact, strict=True)]
    for index, (clip, other, ratio) in enumerate(zip(clips, exact, ratios, strict=True)):
        error = relative_error(clip.latents, other.latents)
        part = clip.layers / other.layers
        emit(variant=name, prompt=index, psnr=ratio, latent_error=error, blocks=part, seconds=clip.seconds)
    score = prompt_score(prompts, clips)
    emit(
        variant=name,
        clips=len(clips),
        psnr_mean=statistics.fmean(ratios),
        psnr_least=min(ratios),
        seconds=statistics.median(clip.seconds for clip in clips),
        speed_up=statistics.median(c.seconds for c in exact) / statistics.median(c.seconds for c in clips),
        blocks=sum(c.layers for c in clips) / sum(c.layers for c in exact),
        prompt_score=score,
    )


def run(
    config: RunConfig[SampleArgs],
    fast: AccelerateArgs,
    prompts: Sequence[str],
    extra: Sequence[str],
    others: Sequence[str] = (),
) -> None:
    """Sample and report every variant, then the settings of cache-dit."""
    device = torch.device(config.args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first = Pipeline(config, device)
    encoded = first.encode(list(prompts), config.args.negative_prompt)
    first.drop_text_encoder()
    exact: list[Clip] = []
    for name, accelerate in variants_of(config.accelerate, fast, extra).items():
        emit(variant=name, switches=accelerate.approximate())
        other = replace(config, accelerate=accelerate)
        pipeline = first if name == "exact" else Pipeline(other, device, with_text_encoder=False)
        clips = list(sample_clips(pipeline, encoded, first, config.args.seed))
        exact = exact or clips
        report(name, prompts, clips, exact)
    params = config.model["network_config"]["params"]
    ours = first.engine.model
    for text in others:
        emit(variant=f"cache-dit {text}", switches=asdict(CacheDit.parse(text)))
        first.engine.model = CachedDiffusers(first.engine.network, params, CacheDit.parse(text), first.num_steps)
        report(f"cache-dit {text}", prompts, list(sample_clips(first, encoded, first, config.args.seed)), exact)
        first.engine.model = ours


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("configs", nargs="*", default=[str(CONFIGS / "demo_infer.yaml")], help="what is exact; default: the demo")
    add("--fast", default=str(CONFIGS / "fast.yaml"), help="YAML whose accelerate section is compared")
    add("--variant", action="append", default=[], help='a further one: "reuse_error=0.2;fp8=true"')
    add("--cache-dit", action="append", default=[], metavar="SETTINGS", help='beside it: "warmup=16,skips=2"')
    add("--curve", action="store_true", help="reuse_error and cache-dit from likeness to speed, in place of --fast")
    add("--only-variants", action="store_true", help="those of --variant alone, not the fast configuration's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the configuration")
    add("--input-file", help="one prompt a line; default: captions of the demo's grammar")
    add("--count", type=int, default=8, help="so many captions")
    add("--steps", type=int, help="sampling steps")
    add("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: compare_variants(options), "stopped")


def compare_variants(options: argparse.Namespace) -> int:
    """Read the configurations and go through the variants; returns the exit status."""
    flags = {"num_steps": options.steps, "seed": options.seed}
    config = with_found_paths(load_run_config(options.configs, SampleArgs, overrides=options.set, flags=flags))
    fast = load_run_config([*options.configs, options.fast], SampleArgs, overrides=options.set).accelerate
    if options.input_file:
        prompts = [p.text for p in gather([], options.input_file, config.files)[0]]
    else:
        prompts = demo_captions(options.count, STRIDES.pixel_frames(config.args.sampling_num_frames), options.seed)
    ours = [*options.variant, *(f"reuse_error={error}" for error in OUR_CURVE if options.curve)]
    theirs = [*options.cache_dit, *(THEIR_CURVE if options.curve else ())]
    try:
        run(config, config.accelerate if options.only_variants or options.curve else fast, prompts, ours, theirs)
    finally:
        shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())

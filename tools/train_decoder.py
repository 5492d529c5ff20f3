"""Learn a small decoder from a VAE's own: the same frames, nearly, in a fraction of the time.

    python sample_video.py CONFIG.yaml --input-file PROMPTS --output-dir LATENTS --only-save-latents
    python tools/train_decoder.py CONFIG.yaml OUT --latents LATENTS --seconds 600

Latents are what the model samples, as above (no videos are needed), clips of a data set that tools/precompute_cache.py
has encoded (--latents CACHE), or, for the demo, clips that are drawn (--drawn N); the full decoder says what each is to
look like. OUT gets small_decoder.safetensors (averaged weights), metrics.jsonl, preview.png (full decoder, small one,
four times the difference) and checkpoint.pt, from which --resume goes on. Then set
first_stage_config.params.small_decoder to the file, and sample with --decoder small.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sgm.cli import exit_code

if TYPE_CHECKING:
    import torch

    from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
    from sgm.modules.autoencoding.small_decoder import SmallDecoder
    from tools.decoder_latents import Origin
    from tools.decoder_training import Clock, Learner, Pairs

LOG_SECONDS, SAVE_SECONDS, PREVIEWED = 5.0, 60.0, 2
KEPT = ("seed", "batch", "crop", "noise", "rate", "memory", "drawn")  # options that a resumed run must have as before


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.yaml", help="configuration whose VAE is learned from")
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add(
        "--latents",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="saved latents, a folder of them, or a cache of encoded clips; may be repeated",
    )
    add("--drawn", type=int, default=0, metavar="N", help="also N clips that the demo draws")
    add(
        "--test",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="latents to measure on; default: an eighth of the others, 16 at most, which are left out of training",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="time of training")
    length.add_argument("--steps", type=int, help="steps of training, whatever time they take")
    add("--vae", type=Path, metavar="FILE", help="in place of the configuration's ckpt_path")
    add("--widths", type=_numbers, metavar="N,N,...", help="channels of each level (256,256,128,64)")
    add("--blocks", type=_numbers, metavar="N,N,...", help="residual blocks of each level (2,2,2,1)")
    add("--batch", type=int, default=4, help="clips a step (4)")
    add("--crop", type=int, default=32, metavar="CELLS", help="latent cells of a side that a step sees at most (32)")
    add("--rate", type=float, default=1e-3, help="highest learning rate (0.001)")
    add("--noise", type=float, default=0.1, help="most noise on latents, in standard deviations (0.1)")
    add("--memory", type=float, default=4.0, metavar="GIB", help="room on the device for frames to learn from (4)")
    add("--store", choices=("fp16", "fp32"), default="fp16", help="type stored")
    add("--seed", type=int, default=0)
    add("--device", help="default cuda where there is one")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    args = parser.parse_args(arguments)
    lengths = [
        n for n in (args.seconds, args.steps, args.batch, args.rate, args.memory, args.crop - 4) if n is not None
    ]
    if min(lengths) <= 0 or min(args.drawn, args.noise, args.seed) < 0:
        parser.error("--seconds, --steps, --batch, --rate and --memory must be positive, --crop above 4, "
                     "--drawn, --noise and --seed not negative")  # fmt: skip
    if not args.latents and not args.drawn:
        parser.error("nothing to learn from: give --latents PATH, or --drawn N for the demo")
    return args


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str]) -> int:
    return exit_code(lambda: run(parse(arguments)), "stopped; --resume goes on from the last checkpoint")


def run(args: argparse.Namespace) -> int:
    import torch

    from sgm.config import merge_yaml
    from sgm.models.small_decoder import decoder_fingerprint, load_small_decoder, save_small_decoder, vae_tensors
    from sgm.weights import DTYPES
    from tools.decoder_latents import Origin
    from tools.decoder_training import Learner, Pairs, Teacher, compared, preview, psnr

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cudnn.benchmark = True  # one shape of batch, as a rule
    model = merge_yaml([args.config]).get("model") or {}
    vae = _vae(args, model, device)
    origin = decoder_fingerprint(vae_tensors(vae.ckpt_path))
    decoder = _new_decoder(args, vae)
    count = sum(p.numel() for p in decoder.parameters())
    read_as = Origin.of(model)
    train, test = _latents(args, vae, read_as, device)
    print(f"{count:,} parameters, {len(train)} clips to learn from, {len(test)} to measure on, {device}", flush=True)
    learner, teacher = Learner(decoder, args.rate, device), Teacher(vae, device)
    facts = {"vae": origin, "sizes": json.dumps(asdict(decoder.sizes)), **_data_facts(args, read_as)}
    clock = _begin(args, learner, facts)
    pairs = Pairs(teacher, train, int(args.memory * 2**30), args.noise, args.seed)
    pairs.at(clock.done)
    _learn(args, learner, clock, pairs, facts)
    path = save_small_decoder(args.out / "small_decoder.safetensors", learner.averaged(), origin, DTYPES[args.store])
    stored = load_small_decoder(path, vae.ckpt_path, device=device, dtype=torch.float32)
    made = list(compared(stored, teacher, test))
    preview(made[:PREVIEWED]).save(args.out / "preview.png")
    figures = [psnr(*pair) for pair in made]
    mean, least = sum(figures) / len(figures), min(figures)
    _log(args.out, {"step": clock.done, "seconds": clock.passed, "test_psnr": mean, "test_psnr_least": least})
    print(
        f"{path}: {path.stat().st_size:,} bytes; on {len(test)} clips {mean:.2f} dB to the full decoder's frames, "
        f"least {least:.2f}",
        flush=True,
    )
    return 0


def _vae(args: argparse.Namespace, model: dict[str, Any], device: torch.device) -> VideoAutoencoderInferenceWrapper:
    """The frozen VAE, with its fastest arithmetic."""
    import torch

    from sgm.models.loading import load_first_stage
    from sgm.modules.ops.choice import choose_kernels
    from sgm.places import found_path
    from sgm.util import instantiate_from_config
    from sgm.weights.preflight import check_paths, with_paths

    stage_config = dict(model.get("first_stage_config") or {})
    stage_config["params"] = dict(stage_config.get("params") or {})
    if args.vae:
        stage_config["params"]["ckpt_path"] = str(args.vae)
    found = with_paths({"first_stage_config": stage_config}, found_path)
    check_paths(found, None)
    with torch.device("meta"):
        vae = instantiate_from_config(found["first_stage_config"])
    kernels = choose_kernels("auto", "default", device, "auto")
    load_first_stage(vae, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    vae.use_ops(kernels.vae)
    if kernels.fused:
        vae.set_channels_last()
    return vae


def _new_decoder(args: argparse.Namespace, vae: VideoAutoencoderInferenceWrapper) -> SmallDecoder:
    import torch

    from sgm.config import ConfigError
    from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes

    torch.manual_seed(args.seed)
    given = {name: getattr(args, name) for name in ("widths", "blocks") if getattr(args, name)}
    try:
        sizes = SmallDecoderSizes(**given, z_channels=vae.decoder.z_channels, strides=vae.strides)
    except ValueError as error:
        raise ConfigError(f"--widths and --blocks: {error}") from error
    return SmallDecoder(sizes)


def _latents(
    args: argparse.Namespace, vae: VideoAutoencoderInferenceWrapper, origin: Origin, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those to learn from, and those to measure on."""
    from sgm.config import ConfigError
    from tools.decoder_latents import drawn, read_all

    file = Path(str(vae.ckpt_path))
    train = [z for path in args.latents for z in read_all(path, origin, file, args.seed)]
    train += drawn(args.drawn, vae, device, args.seed)
    test = [z for path in args.test for z in read_all(path, origin, file, args.seed)]
    if not test:
        step = max(8, len(train) // 16)
        train, test = [z for k, z in enumerate(train) if k % step != step - 1], train[step - 1 :: step]
    if not train or not test:
        raise ConfigError(
            f"{len(train)} clips to learn from and {len(test)} to measure on: give 8 clips, or --test too"
        )
    return train, test


def _data_facts(args: argparse.Namespace, origin: Origin) -> dict[str, Any]:
    """What decides each step's clips, beside the VAE: plain values."""
    from tools.decoder_latents import fingerprint

    of_files = {name: ", ".join(map(fingerprint, getattr(args, name))) for name in ("latents", "test")}
    return {**of_files, **asdict(origin), **{name: getattr(args, name) for name in KEPT}}


def _begin(args: argparse.Namespace, learner: Learner, facts: dict[str, Any]) -> Clock:
    """At the start, or where the checkpoint left off."""
    from sgm.config import ConfigError
    from sgm.weights import read_checkpoint
    from tools.decoder_training import Clock

    clock, path = Clock(args.steps, args.seconds), args.out / "checkpoint.pt"
    if not args.resume:
        if path.exists():
            raise ConfigError(f"{args.out} holds a run already: --resume goes on with it, or name another folder")
        args.out.mkdir(parents=True, exist_ok=True)
        return clock
    content = read_checkpoint(path)
    known = content.get("facts") or {}
    other = [f"{name} was {known.get(name)!r}, now {now!r}" for name, now in facts.items() if known.get(name) != now]
    if other:
        raise ConfigError(f"{path} is of another run: {'; '.join(other)}. Give what it had, or another OUT")
    learner.restore(content, clock)
    return clock


def _learn(args: argparse.Namespace, learner: Learner, clock: Clock, pairs: Pairs, facts: dict[str, Any]) -> None:
    """Train to the end; lines on the way, and checkpoints."""
    clock.start()
    logged = saved = time.perf_counter()
    sums: dict[str, torch.Tensor] = {}
    count = 0
    while clock.part < 1.0:
        terms = learner.step(*pairs.batch(clock.done, args.batch, args.crop), clock.part)
        clock.done += 1
        sums = {name: sums[name] + value if sums else value.clone() for name, value in terms.items()}
        count += 1
        now = time.perf_counter()
        if now - logged >= LOG_SECONDS or clock.part >= 1.0:
            _tell(args.out, clock, {name: float(value) / count for name, value in sums.items()})
            logged, sums, count = now, {}, 0
        if now - saved >= SAVE_SECONDS or clock.part >= 1.0:
            learner.save(args.out / "checkpoint.pt", clock, facts)
            saved = now


def _tell(out: Path, clock: Clock, means: dict[str, float]) -> None:
    """A line for the screen and the log. Raises ConfigError where the loss left the numbers."""
    import math

    from sgm.config import ConfigError

    if not math.isfinite(means["total"]):
        raise ConfigError(f"the loss is {means['total']} at step {clock.done}: lower --rate")
    seen = 10 * math.log10(4 / max(means["square"], 1e-12))
    print(
        f"{clock.passed:6.1f} s ({clock.part:4.0%}) step {clock.done}: loss {means['total']:.4f}, PSNR {seen:.2f} dB, "
        f"gradient {means['gradient']:.2f}",
        flush=True,
    )
    _log(out, {"step": clock.done, "seconds": clock.passed, "psnr": seen, **means})


def _log(out: Path, facts: dict[str, Any]) -> None:
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

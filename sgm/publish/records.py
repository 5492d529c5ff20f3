"""What a run's records say of it: model, data, settings, captions, sample clips; no path of this machine is in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgm.config import merge_yaml
from sgm.convert.dit_sizes import Sizes, sizes_of_params
from sgm.convert.lazy import ConvertError
from sgm.data.clips import CaptionError, ListedClip, caption_of
from sgm.inference.prompts import MARK
from sgm.weights.release import newest_run

CONFIG, METRICS = "training_config.yaml", "metrics.jsonl"
_CAPTIONS_READ, _SHOWN = 1000, 3
_NEARLY_ALL = 0.9  # share of captions that have a word for it to count as common to them
_FILLERS = frozenset("a an and are as at by for from in into is it its of on or over the then this to with".split())


@dataclass(frozen=True)
class Sample:
    """A clip, and the prompt that it was made from ("" where nothing says it)."""

    file: Path
    prompt: str


@dataclass(frozen=True)
class Training:
    """Of a run's records.

    Attributes:
        name: of the run.
        sizes: of the network; None where no configuration is kept.
        captions: of its clips, or a distillation's prompts; at most a thousand.
        facts: rows of a table, (what, how much).
        samples: clips of its newest evaluation.
        fps, size, frames: of its clips; None where nothing says it.
    """

    name: str
    sizes: Sizes | None = None
    captions: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fps: float | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None

    @property
    def examples(self) -> list[str]:
        """Some captions, each once."""
        return list(dict.fromkeys(self.captions))[:_SHOWN]

    @property
    def common_words(self) -> list[str]:
        """Words that nearly all captions have, in the order of the first that has them."""
        if len(set(self.captions)) < 2:
            return []
        words = [re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption) for caption in self.captions]
        counts = Counter(word for found in words for word in {w.lower() for w in found})
        common = {w for w, n in counts.items() if n >= _NEARLY_ALL * len(words) and w not in _FILLERS}
        return list(dict.fromkeys(word for found in words for word in found if word.lower() in common))


def run_folder(path: Path) -> Path | None:
    """The folder of the training run that `path` (a run, also without its date, an iteration or a file of it) is of."""
    path = path if path.exists() else newest_run(path) or path
    return next((place for place in (path, *path.parents[:2]) if (place / CONFIG).is_file()), None)


def read_training(run: Path, iteration: int | None) -> Training:
    """What is known of a run.

    Args:
        iteration: of the checkpoint that is published; None where nothing says it.
    Raises:
        ConvertError: its configuration describes no network.
    """
    config = merge_yaml([run / CONFIG])
    try:
        params = config["model"]["network_config"]["params"]
        sizes = sizes_of_params(params)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{run / CONFIG} describes no network (model.network_config.params).") from error
    data = (config.get("data") or {}).get("params") or {}
    args = config.get("args") or {}
    clips = list(_clips(run))
    captions = _prompts(args) or [text for clip in clips[:_CAPTIONS_READ] if (text := _caption(clip))]
    size = data.get("video_size")
    return Training(
        name=re.sub(r"(-\d\d){4}(-\d+)?$", "", run.name),
        sizes=sizes,
        captions=captions,
        facts=[*_amounts(config, len(clips), iteration), *_course(run, iteration)],
        samples=_samples(run, args),
        fps=data.get("fps"),
        size=(int(size[0]), int(size[1])) if size else None,
        frames=data.get("max_num_frames"),
    )


def _clips(run: Path) -> Iterator[Mapping[str, Any]]:
    for line in (run / "train_data_0.jsonl").read_text().splitlines() if (run / "train_data_0.jsonl").exists() else ():
        entry = json.loads(line)
        if entry.get("status") == "usable":
            yield entry


def _caption(clip: Mapping[str, Any]) -> str:
    """The clip's caption in one line; "" where it is not to be had any more."""
    with suppress(CaptionError, OSError):
        return " ".join(caption_of(ListedClip(clip["path"], clip.get("caption"))).text.split())
    return ""


def _prompts(args: Mapping[str, Any]) -> list[str]:
    files = [Path(name) for name in (args.get("distill") or {}).get("prompts") or [] if Path(name).is_file()]
    lines = (line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line][:_CAPTIONS_READ]


def _amounts(config: Mapping[str, Any], clips: int, iteration: int | None) -> list[tuple[str, str]]:
    data, args = (config.get("data") or {}).get("params") or {}, config.get("args") or {}
    deepspeed = config.get("deepspeed") or {}
    optimizer = deepspeed.get("optimizer") or {}
    folders = ", ".join(Path(name).name for name in args.get("train_data") or [])
    facts = [("steps", str(iteration))] if iteration else []
    facts += [("clips", f"{clips} ({folders})")] if clips else []
    facts += [("distilled with", "prompts alone, from its own base")] if args.get("distill") else []
    if size := data.get("video_size"):
        frames = f"{data['max_num_frames']} frames of " if data.get("max_num_frames") else ""
        rate = f", {data['fps']:g} a second" if data.get("fps") else ""
        facts.append(("size", f"{frames}{size[1]}x{size[0]}{rate}"))
    params = optimizer.get("params") or {}
    name = str(optimizer.get("type", "")).rpartition(".")[2]
    facts += [("optimizer", f"{name}, rate {params['lr']}")] if name and "lr" in params else []
    kinds = [kind for kind in ("fp16", "bf16") if (deepspeed.get(kind) or {}).get("enabled")]
    return [*facts, ("precision", kinds[0] if kinds else "fp32"), ("seed", str(args.get("seed", 42)))]


def _course(run: Path, iteration: int | None) -> list[tuple[str, str]]:
    """Of `metrics.jsonl`: clips a step, loss and time up to the checkpoint."""
    file = run / METRICS
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    steps = [e for e in lines if e.get("kind") == "train" and (not iteration or e.get("iteration", 0) <= iteration)]
    if not steps:
        return []
    last = steps[-1]
    each = last.get("samples", 0) / max(1, last["iteration"])
    seconds, before = 0.0, 0
    for entry in steps:
        seconds += (entry["iteration"] - before) * (entry.get("seconds_per_step") or 0)
        before = entry["iteration"]
    facts = [("clips a step", f"{each:.4g}")] if each else []
    facts += [("loss at the end", f"{last['loss_average']:.4g}")] if last.get("loss_average") is not None else []
    return [*facts, ("time", f"{seconds / 60:.3g} minutes")]


def _samples(run: Path, args: Mapping[str, Any]) -> list[Sample]:
    """Clips of the newest evaluation, with their prompts."""
    folders = sorted((run / "video").glob("samples_gs-*"))
    if not folders:
        return []
    texts = run / "video_texts" / f"{int(folders[-1].name.rpartition('-')[2]):08d}"
    prompts = texts.read_text(encoding="utf-8").splitlines() if texts.is_file() else []
    if not args.get("distill"):  # behind the first one's stand captions of its batch, of which nothing is sampled
        prompts = [*(prompts[:1] or [""]), *(text.split(MARK)[0].strip() for text in args.get("eval_prompts") or [])]
    named = {f"{k:06d}": prompt for k, prompt in enumerate(prompts)}  # one that was not finite has no file
    return [Sample(file, named.get(file.stem, "")) for file in sorted(folders[-1].glob("*.mp4"))]


def samples_in(places: Sequence[Path]) -> list[Sample]:
    """Clips (files, or all below folders), with the prompts of the JSON that sampling writes beside each.

    Raises:
        ConvertError: one is no clip, or a folder has none.
    """
    found = []
    for place in places:
        files = sorted(place.rglob("*.mp4")) if place.is_dir() else [place] if place.is_file() else []
        if not files or any(file.suffix != ".mp4" for file in files):
            raise ConvertError(f"--samples {place}: no .mp4 file there; name clips, or the output folder of sampling.")
        for file in files:
            record = file.with_suffix(".json")
            content = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            found.append(Sample(file, str(content.get("prompt", ""))))
    return found

"""Text to video from Python: a model that stays loaded, and makes videos call by call.

    from sgm import TextToVideo

    model = TextToVideo.from_config("configs/demo_infer.yaml")
    model("A small red star moves to the left.", seed=7).save("star.mp4")

The command samples with this class, too: equal requests give equal numbers.
"""

from __future__ import annotations

import json
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgm.config import ConfigError, RunConfig, load_run_config
from sgm.data.images import HeldPicture
from sgm.distributed import preserve_rng
from sgm.inference.fit import SamplingError
from sgm.inference.generation import Generation, Sampled, out_of_memory_advice
from sgm.inference.options import DEMO_CONFIG, SHIPPED_CONFIG, SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.progress import Progress
from sgm.inference.prompts import Prompt, PromptError
from sgm.inference.requests import Wanted
from sgm.inference.setup import checked, join_processes, without_fp16_on_cpu
from sgm.inference.source_clip import HeldClip
from sgm.inference.video import Preview, StepReport, Video
from sgm.inference.visual import NOTHING, InMemory
from sgm.placeholders import config_files
from sgm.places import found_path
from sgm.typed import build_args, listing, nearest

OnStep = Callable[[StepReport], object]
Prompts = list[str] | tuple[str, ...]


class Asked(TypedDict, total=False):
    """What a call may ask for; what it leaves out (or gives as None) is as the configuration has it.

    seed: base seed. Noise depends on it, on the prompt's place in the list and on the sample's number alone.
    steps: sampling steps. negative_prompt: what to steer away from. guidance_scale: in place of the guider's.
    size: (height, width) in pixels. num_frames: latent frames, as `--num-frames`: 13 give 49 frames, 1 an image.
    image: what the video begins with: a file, one of Pillow's pictures, or uint8 (h, w, 3).
    video: the clip that it is made from: a file, a `Video`, or uint8 (f, h, w, 3).
    strength: share of the steps that are taken from that clip, in (0, 1].
    extend: go on with that clip instead: so many new frames behind its last one.
    window_frames, window_overlap: latent frames that are sampled at once, and that a window has from the one before.
    lora: adapters as `PATH` or `PATH:SCALE`, in place of those that the model has; [] for none.
    refine: let a language model write the prompt out first.
    configs: YAML files laid over the model's own for this call, as `configs/fast.yaml` or `configs/few_steps.yaml`.
    overrides: keys with dots and their values, as `--set`.
    """

    seed: int | None
    steps: int | None
    negative_prompt: str | None
    guidance_scale: float | None
    size: Sequence[int] | None
    num_frames: int | None
    image: str | Path | Image.Image | np.ndarray | None
    video: str | Path | Video | np.ndarray | None
    strength: float | None
    extend: int | None
    window_frames: int | None
    window_overlap: int | None
    lora: str | Sequence[str] | None
    refine: bool | None
    configs: Sequence[str | Path]
    overrides: Mapping[str, object]


OPTIONS = {"steps": "num_steps", "size": "sampling_image_size", "num_frames": "sampling_num_frames"}  # named otherwise


def _texts(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


FORMS: dict[str, Callable[[Any], Any]] = {"size": list, "image": str, "video": str, "lora": _texts}  # as `args:` has it


class TextToVideo:
    """A model on one device, whose parts are loaded when they are first needed and stay.

    One call runs at a time; one from another thread waits for its turn.

    Attributes:
        pipeline: the parts, for those who want tensors.
        noted: what was said of it, which is not said again.
    """

    def __init__(self, config: RunConfig[SampleArgs], device: torch.device, *, with_text_encoder: bool = True):
        self.config = config
        self.pipeline = Pipeline(config, device, with_text_encoder=with_text_encoder)
        self.shown = False
        self._asked = config
        self._overrides: list[str] = []
        self._flags: dict[str, Any] = {}
        self.noted: set[str] = set()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._listener: int | None = None  # the thread that holds a preview of a stream

    @classmethod
    def from_config(
        cls,
        *configs: str | Path,
        model: str | None = None,
        overrides: Mapping[str, object] | None = None,
        lora: str | Sequence[str] = (),
        placement: str | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> TextToVideo:
        """The model of YAML files, later ones laid over earlier ones; without any, the one that the command takes.

        Args:
            model: a released model, such as "zai-org/CogVideoX-2b", which is fetched at first use, or a folder with an
                `infer.yaml`; `configs` are laid over it.
            overrides: keys with dots and their values, as `--set`: {"args.bf16": True}.
            lora: adapters as `PATH` or `PATH:SCALE`; a call may name others.
            placement: "all", "stages" or "lean"; see `args.placement`.
            device: "cpu", "cuda" or "cuda:N"; default: the GPU if there is one.
            progress: show bars and stages on the standard error, as the command does.
        Raises:
            ConfigError: a file, key or path that is wrong; lists every problem.
        """
        from sgm.hub.release import run_file_of

        released = [] if model is None else [str(run_file_of(model))]
        files = config_files([*released, *map(str, configs)], SHIPPED_CONFIG, DEMO_CONFIG)
        texts = _set_texts(overrides or {})
        flags = {"lora": _texts(lora) or None, "placement": placement, "device": device and str(device)}
        config = checked(load_run_config(files, SampleArgs, overrides=texts, flags=flags))
        if config.args.decode_latents or config.args.only_save_latents:
            raise ConfigError("args.decode_latents and args.only_save_latents are for the command; leave them out.")
        _, device = join_processes(config.args.device)
        made = cls(without_fp16_on_cpu(config, device), device)
        made.shown, made._overrides, made._flags = progress, texts, flags
        return made

    @contextmanager
    def generation(
        self, config: RunConfig[SampleArgs], progress: Progress, held: InMemory = NOTHING
    ) -> Iterator[Generation]:
        """This model's turn at what `config` asks for, with what is `held` in memory in place of its files.

        Raises:
            SamplingError: it asks for what is decided when a model is loaded, or its options do not fit; or this is
                called from within a call, or between the previews of a stream.
        """
        if threading.get_ident() in (self._owner, self._listener):
            raise SamplingError(
                "this model is at work on the call from which it is called again; let that one end, or close() its "
                "stream."
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                if config is not self._asked:
                    self.pipeline.ask(config, held)
                    self._asked = config
                for note in self.pipeline.notes:
                    if note not in self.noted:
                        progress.line(note)
                self.noted |= {*self.pipeline.notes}
                yield Generation(config, self.pipeline, progress)
            except torch.OutOfMemoryError as error:
                raise SamplingError(out_of_memory_advice(config.args)) from error
            finally:
                self._owner = None

    # --- videos ---------------------------------------------------------------------------------------------------

    @overload
    def __call__(
        self, prompt: str, *, samples: None = None, on_step: OnStep | None = None, **asked: Unpack[Asked]
    ) -> Video: ...

    @overload
    def __call__(
        self, prompt: Prompts, *, samples: int | None = None, on_step: OnStep | None = None, **asked: Unpack[Asked]
    ) -> list[Video]: ...

    @overload
    def __call__(
        self, prompt: str, *, samples: int, on_step: OnStep | None = None, **asked: Unpack[Asked]
    ) -> list[Video]: ...

    def __call__(
        self,
        prompt: str | Prompts,
        *,
        samples: int | None = None,
        on_step: OnStep | None = None,
        **asked: Unpack[Asked],
    ) -> Video | list[Video]:
        """Make the video of a prompt; of several, or with `samples`, the list of them, prompt by prompt.

        Args:
            samples: of each prompt, with noise of its own.
            on_step: called after each sampling step. What it raises stops the call, and comes out of it; the model
                stays as it was.
            asked: see `Asked`.
        Raises:
            ConfigError, PromptError, SamplingError, WeightsError: what is asked for cannot be; nothing was made.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        held = _in_memory(asked)
        config = self._config_of(prompts, samples or 1, {**asked, **_names(held)})
        made = list(self._videos(config, held, on_step))
        return made[0] if isinstance(prompt, str) and samples is None else made

    def check(self, prompt: str, **asked: Unpack[Asked]) -> None:
        """Raise what a call would, as far as it shows before weights are read."""
        held = _in_memory(asked)
        config = self._config_of([prompt], 1, {**asked, **_names(held)})
        with self.generation(config, _CallProgress(self, None), held) as generation:
            generation.fitting(self.pipeline.visual.pictures.attach([Prompt(0, prompt.strip())]))

    def stream(self, prompt: str, *, every: int = 1, **asked: Unpack[Asked]) -> Iterator[Preview | Video]:
        """Previews after each step (every `every`-th and the last), and at the end the video.

        It is made in a thread of its own. Whoever stops listening stops it: at its next step.

        Raises:
            What a call would.
        """
        if every < 1:
            raise ConfigError(f"every is {every}; it must be 1 or more: a preview after each so many steps.")
        listening = threading.Event()
        listening.set()
        heard: queue.Queue[Preview | Video | BaseException] = queue.Queue(maxsize=1)

        def offer(item: Preview | Video | BaseException) -> None:
            while listening.is_set():
                with suppress(queue.Full):
                    return heard.put(item, timeout=0.1)
            raise _NobodyListens

        def on_step(report: StepReport) -> None:
            if report.step % every == 0 or report.step == report.total:
                offer(Preview(report.step, report.total, report.preview()))

        def work() -> None:
            with suppress(_NobodyListens):
                try:
                    offer(self(prompt, on_step=on_step, **asked))
                except BaseException as error:  # noqa: BLE001  # raised where the stream is read
                    offer(error)

        worker = threading.Thread(target=work, name="sgm-stream", daemon=True)
        worker.start()
        try:
            while True:
                item = heard.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Video):
                    yield item
                    return
                self._listener = threading.get_ident()
                yield item
                self._listener = None
        finally:
            self._listener = None
            listening.clear()
            worker.join()

    # --- one call -------------------------------------------------------------------------------------------------

    def _config_of(self, prompts: Sequence[str], samples: int, asked: Mapping[str, Any]) -> RunConfig[SampleArgs]:
        """The configuration with what a call asks for. Raises ConfigError, PromptError."""
        _refuse_unknown(asked)
        blank = [k for k, text in enumerate(prompts) if not text.strip()]
        if blank or not prompts:
            raise PromptError(f"prompt {blank[0]} is blank; write some text." if blank else "there is no prompt.")
        config = self._laid_over(asked.get("configs") or (), asked.get("overrides") or {})
        own = {name: v for name, v in asked.items() if name not in ("configs", "overrides") and v is not None}
        given = {OPTIONS.get(name, name): FORMS[name](v) if name in FORMS else v for name, v in own.items()}
        problems: list[str] = []
        values = asdict(config.args) | given | {"prompts": list(prompts), "batch_size": samples, "skip_done": False}
        args = build_args(SampleArgs, values, problems, [])
        if args is None:
            raise ConfigError(listing(problems, "this call"))
        config = replace(config, args=args)
        return checked(config) if "lora" in given else config

    def _laid_over(self, configs: Sequence[str | Path], overrides: Mapping[str, object]) -> RunConfig[SampleArgs]:
        """The model's own configuration with files and keys over it."""
        if not configs and not overrides:
            return self.config
        files: list[str | Path] = [*self.config.files, *(found_path(str(file)) for file in configs)]
        texts = [*self._overrides, *_set_texts(overrides)]
        config = load_run_config(files, SampleArgs, overrides=texts, flags=self._flags)
        return without_fp16_on_cpu(checked(config), self.pipeline.device)

    def _videos(self, config: RunConfig[SampleArgs], held: InMemory, on_step: OnStep | None) -> Iterator[Video]:
        progress = _CallProgress(self, on_step)
        with self.generation(config, progress, held) as generation, _own_stream(config.args):
            prompts = [Prompt(k, text.strip()) for k, text in enumerate(config.args.prompts)]
            fitting = generation.fitting(self.pipeline.visual.pictures.attach(prompts))
            numbers = list(range(config.args.batch_size))
            todo = generation.refined([Wanted(prompt, numbers, [], "") for prompt in fitting])
            generation.load_what_samples_need()
            encoded = generation.encode([wanted.prompt for wanted in todo])
            for wanted, conditioning in zip(todo, encoded):
                progress.prompt = wanted.prompt.index
                for sampled in generation.samples(wanted, conditioning):
                    yield self._video(generation, sampled, progress)

    @staticmethod
    def _video(generation: Generation, sampled: Sampled, progress: _CallProgress) -> Video:
        record = generation.requests.record(sampled.prompt, sampled.number, sampled.latents)
        frames = generation.decode(sampled.latents, sampled.times)
        record = generation.measured(record, sampled.times, {})
        return Video(frames, generation.args.sampling_fps, sampled.latents, record, tuple(progress.warned))


class _NobodyListens(Exception):
    """The stream was left before its end."""


class _CallProgress(Progress):
    """What a call says of itself: to its `on_step`, and as Python's warnings."""

    def __init__(self, model: TextToVideo, on_step: OnStep | None):
        super().__init__(model.shown, model.pipeline.device)
        self.pipeline, self.on_step = model.pipeline, on_step
        self.noted = model.noted
        self.prompt = 0
        self.warned: list[str] = []

    def line(self, text: str) -> None:
        if text.startswith("warning: "):
            self.warn(text.removeprefix("warning: "))
        elif text not in self.noted:
            self.noted.update([text] if text.startswith("note: ") else [])
            super().line(text)

    def note(self, text: str) -> None:
        self.warned.append(text)
        if self.shown:
            super().note(text)
        else:
            warnings.warn(text, stacklevel=2)

    def warn(self, text: str) -> None:
        self.warned.append(text)
        warnings.warn(text, stacklevel=2)

    @contextmanager
    def steps(self, total: int) -> Iterator[Callable[..., None]]:
        """A sampler callback that also makes reports of steps."""
        with super().steps(total) as shown:

            def step(index: int, total: int, x: Tensor, estimate: Tensor) -> None:
                shown()
                if self.on_step is not None:
                    self._report(index + 1, total, estimate)

            yield step

    def _report(self, step: int, total: int, estimate: Tensor) -> None:
        held = [estimate]

        def preview() -> Any:
            if not held:
                raise SamplingError("a preview is made within on_step; the step that this one is of is over.")
            return self.pipeline.preview(held[0][0])

        try:
            if self.on_step is not None:
                self.on_step(StepReport(step, total, self.prompt, preview))
        finally:
            held.clear()


@contextmanager
def _own_stream(args: SampleArgs) -> Iterator[None]:
    """Under seed_mode `upstream`: the process's random stream begins at the seed, and goes on after the call as if it
    had not been."""
    if args.seed_mode != "upstream":
        yield
        return
    with preserve_rng():
        torch.manual_seed(args.seed)
        yield


def _in_memory(asked: Asked) -> InMemory:
    """What of it lies in no file. Raises ImageError, SourceError: neither picture nor clip."""
    image, video = asked.get("image"), asked.get("video")
    clip = video.frames if isinstance(video, Video) else video
    return InMemory(
        HeldPicture.holding(image) if isinstance(image, Image.Image | np.ndarray) else None,
        HeldClip.holding(clip) if isinstance(clip, np.ndarray) else None,
    )


def _names(held: InMemory) -> dict[str, Path]:
    """What stands in the configuration in place of files."""
    parts = {"image": held.picture, "video": held.clip}
    return {name: part.path for name, part in parts.items() if part}


def _refuse_unknown(asked: Iterable[str]) -> None:
    for name in asked:
        if name in ("device", "placement", "progress"):
            raise ConfigError(f"{name} is decided when a model is loaded: TextToVideo.from_config(..., {name}=...)")
        if name not in Asked.__annotations__:
            raise ConfigError(f"unknown option {name!r}{nearest(name, Asked.__annotations__)}")


def _set_texts(overrides: Mapping[str, object]) -> list[str]:
    """As behind `--set`; JSON is YAML."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]

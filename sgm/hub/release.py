"""A released model by its name on the hub: fetched, checked, converted to SAT's layout with an `infer.yaml` beside."""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sgm.cli import print_line
from sgm.convert.hf_folder import DIFFUSION_STEM, ENCODER_STEM, TOKENIZER_FILES
from sgm.convert.to_sat import RUN_FILE, ToSat, convert
from sgm.files import advising, readable, remove, remove_if_empty, require_space, saving, try_lock, write_json
from sgm.hub import download
from sgm.hub.client import Hub, HubError, HubFile, UnreachableError
from sgm.hub.download import Download
from sgm.modules.encoders.t5_files import VOCABULARIES
from sgm.places import INSTALLED, PROJECT, shown
from sgm.progress import Tally
from sgm.weights.checksums import read_json

T = TypeVar("T")
_NAMES = ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V")
MODELS = tuple(f"zai-org/{name}" for name in _NAMES)
WEIGHTS = (Path() if INSTALLED else PROJECT) / "weights"  # a folder for each owner, in it one for each model
ORIGIN = "hub.json"  # in a release: which commit it was made of; before that, beside the files that have come
_KEPT = "download_kept"  # in it: whether these files stay
_ATTEMPTS = 3  # to ask what there is


@dataclass(frozen=True)
class Wish:
    """A model and where it is to lie.

    Attributes:
        name: `OWNER/NAME` on the hub, or `OWNER/NAME@REVISION`.
        output: folder of the release in SAT's layout; by default one of `WEIGHTS`.
        keep: leave the downloaded files (diffusers' layout) beside it.
    """

    name: str
    output: Path | None = None
    keep: bool = False

    @property
    def repository(self) -> str:
        return self.name.partition("@")[0]

    @property
    def revision(self) -> str:
        return self.name.partition("@")[2] or "main"

    @property
    def target(self) -> Path:
        """The release's folder, from the root. Raises HubError: the name cannot be one."""
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", self.name):
            raise HubError(f"{self.name!r} is no model's name: write OWNER/NAME, such as {', '.join(MODELS)}.")
        return (self.output or WEIGHTS / self.name.replace("@", "-at-")).expanduser().absolute()

    @property
    def downloads(self) -> Path:
        """Where files lie until they are converted."""
        return self.target.with_name(f"{self.target.name}.download")

    @property
    def has_leftover(self) -> bool:
        """Whether downloads that nobody wants to keep lie beside the release that was made of them."""
        if not (self.target / RUN_FILE).is_file() or not os.access(self.downloads, os.W_OK):
            return False
        return (self.downloads / ORIGIN).is_file() or not origin_of(self.target).get(_KEPT, True)


def say_on_stderr(text: str) -> None:
    print_line(text, sys.stderr)


def run_file_of(name: str, *, may_download: bool = True, say: Callable[[str], None] = say_on_stderr) -> Path:
    """The configuration that runs a model: a folder with an `infer.yaml`, or a name on the hub, fetched at first use.

    Raises:
        HubError: it is not here and cannot be had, or not to be fetched.
    """
    folder = Path(name).expanduser()
    file = (folder if folder.is_dir() else Wish(name).target) / RUN_FILE
    if not file.is_file() and (folder.is_dir() or not may_download):
        get = f"; it comes by: python tools/get_weights.py {shlex.quote(name)}"
        raise HubError(f"there is no {shown(file)}{'' if folder.is_dir() else get}.")
    is_settled = file.is_file() and (folder.is_dir() or not may_download or not Wish(name).has_leftover)
    return file if is_settled else get_release(Wish(name), say)


def get_release(wish: Wish, say: Callable[[str], None] = say_on_stderr) -> Path:
    """Download and convert what is not here yet; returns the release's `infer.yaml`.

    A download that broke off is gone on with. Another command that is at it is waited for.

    Raises:
        HubError: no network (with the way without), no such model, or files that are not what the hub's list says.
        SaveError: no room, looked at before anything is fetched.
        ConvertError, WeightsError: what came is no model of this family.
    """
    file = wish.target / RUN_FILE
    with alone(wish.target, wish.name, say):
        if not file.is_file():
            if wish.target.exists() and not (wish.target.is_dir() and not any(wish.target.iterdir())):
                there = f"{wish.target} is there, and holds no {RUN_FILE}"
                raise HubError(f"{there}; choose another folder (--output_path).")
            try:
                _download(wish, say)
            except UnreachableError as error:
                raise HubError(f"{error} {_by_hand(wish)}") from error
            say("converting ...")
            for line in convert(ToSat(source=wish.downloads, output=wish.target)):
                say(line)
        if wish.has_leftover:
            _settle(wish)
    return file


def _settle(wish: Wish) -> None:
    """Note in the release what it was made of, then remove the downloads; also behind a command that was killed."""
    record = origin_of(wish.downloads) or origin_of(wish.target)
    record[_KEPT] = record[_KEPT] or wish.keep
    write_json(wish.target / ORIGIN, record)
    with saving(wish.downloads):
        remove(wish.downloads / ORIGIN if record[_KEPT] else wish.downloads)


def origin_of(folder: Path) -> dict[str, Any]:
    """Its `hub.json`; empty where there is none. Raises WeightsError: it cannot be read."""
    return read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}


@contextmanager
def alone(target: Path, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """As the only command that fetches `name` into the folder `target`; the folder above is there then, and goes again
    where nothing came."""
    absent = [folder for folder in target.parents if not folder.exists()]
    told = False
    try:
        while True:
            with saving(target):  # each time: one that it waits for takes the folder away where nothing came
                target.parent.mkdir(parents=True, exist_ok=True)
            with try_lock(target.with_name(f".lock-get-{target.name}")) as mine:
                if mine:
                    yield
                    return
            if not told:
                say(f"another command is fetching {name}; this one waits for it")
            told = True
            time.sleep(0.5)
    finally:
        for folder in absent:
            remove_if_empty(folder)


def _by_hand(wish: Wish) -> str:
    name, output = wish.repository, shlex.quote(shown(wish.target))
    folder = shlex.quote(name.partition("/")[2])
    return (
        f"Without network: `hf download {name} --local-dir {folder}` on a machine that has one, bring that folder "
        f"here, then: python tools/convert_weight_hf2sat.py --input_path {folder} --output_path {output}"
    )


# --- what is fetched -------------------------------------------------------------------------------------------------


def wanted(files: Sequence[HubFile], repository: str) -> list[HubFile]:
    """Of a repository's files those that make a release: safetensors, JSON and the tokenizer's vocabulary.

    Raises:
        HubError: it is no diffusers pipeline of CogVideoX, or lacks some of them.
    """
    named = {file.path: file for file in files}
    lacking: list[str] = []
    around: list[str] = ["model_index.json", "scheduler/scheduler_config.json"]
    found = [path for path in around if path in named]
    for folder, stem in (("transformer", DIFFUSION_STEM), ("vae", DIFFUSION_STEM), ("text_encoder", ENCODER_STEM)):
        paths = [f"{folder}/config.json", *_weights(named, f"{folder}/{stem}")]
        lacking += [path for path in paths if path not in named]
        found += paths
    found += [path for path in (f"tokenizer/{name}" for name in TOKENIZER_FILES) if path in named]
    if not any(f"tokenizer/{name}" in named for name in VOCABULARIES):
        lacking.append(f"tokenizer/{VOCABULARIES[0]}")
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise HubError(
            f"{repository} is no whole diffusers release of CogVideoX: it lacks {', '.join(lacking[:3])}{more}. These "
            f"are: {', '.join(MODELS)}."
        )
    return [named[path] for path in found]


def _weights(named: dict[str, HubFile], stem: str) -> list[str]:
    """The one file, or the index and the shards that its names count."""
    index = f"{stem}.safetensors.index.json"
    if index not in named:
        return [f"{stem}.safetensors"]
    shard = re.compile(rf"{stem}-\d{{5}}-of-(\d{{5}})\.safetensors")
    counted = [int(match[1]) for path in named if (match := shard.fullmatch(path))]
    count = max(counted, default=1)
    return [index, *(f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count))]


def _download(wish: Wish, say: Callable[[str], None]) -> None:
    """All files, and then a note of what they are."""
    hub = Hub.from_environment()
    try:
        commit = patiently(lambda: hub.commit(wish.repository, wish.revision))
    except UnreachableError:
        raise
    except HubError as error:
        known = "" if wish.repository in MODELS else f" The models are: {', '.join(MODELS)}."
        raise HubError(f"{error}{known}") from error
    files = wanted(patiently(lambda: hub.files(wish.repository, commit)), wish.repository)
    work = Download(hub, wish.repository, commit, wish.downloads, say=say)
    missing, total = work.missing_bytes(files), sum(file.size for file in files)
    place = shown(wish.target.parent)
    say(f"{wish.name}: {readable(missing)} of {readable(total)} are fetched, then converted in {place}")
    with advising("What is fetched and what is made of it are there together for a while."):
        require_space(wish.target.parent, missing + total)
    fetch(work, files)
    listed = {file.path: file.digest for file in files}
    record = {"repository": wish.repository, "commit": commit, _KEPT: wish.keep, "files": listed}
    write_json(wish.downloads / ORIGIN, record)


def fetch(work: Download, files: Sequence[HubFile]) -> None:
    """Bring the files, with a bar. Raises HubError, SaveError."""
    lock = threading.Lock()
    with _bar(work.missing_bytes(files)) as update:

        def advance(count: int) -> None:
            with lock:
                update(count)

        work.advance = advance
        work.run(files)


def patiently(ask: Callable[[], T]) -> T:
    """The hub's answer, after some attempts where it does not answer. Raises UnreachableError."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except UnreachableError as error:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(max(error.wait, download.PAUSE * 2**attempt))
    raise AssertionError("unreachable")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """Of bytes: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc="download", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
            yield bar.update
        return
    tally, held = Tally("download", "MB", -(-total // 10**6), say_on_stderr), [0]

    def update(count: int) -> None:
        held[0] += count
        whole = held[0] // 10**6
        held[0] -= whole * 10**6
        tally.update(whole)

    yield update

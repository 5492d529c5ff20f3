"""Where a T5 encoder's files lie: a local folder in one of two layouts, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sgm.errors import first_line
from sgm.files import refuse_lfs_pointer
from sgm.weights import WeightsNotFoundError, read_checkpoint
from sgm.weights.files import shards_of

CONFIG = "config.json"
VOCABULARIES = ("spiece.model", "tokenizer.json")  # in order of preference; transformers 5 saves the second alone
# In order of preference: a single file, or an index that names shards.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

HOW_TO_GET = (
    "To get the folder: download the release's diffusers repository (THUDM/CogVideoX-2b), copy everything from its "
    "text_encoder/ and tokenizer/ folders into one folder, and set conditioner_config's model_dir to that folder."
)


class EncoderFilesError(WeightsNotFoundError):
    """Files of the text encoder are missing. The message lists all of them and says how to get the folder."""


@dataclass(frozen=True)
class T5Files:
    """A complete set of files: encoder config, tokenizer folder, and weight files in the order to read them."""

    config: Path
    tokenizer: Path
    weights: tuple[Path, ...]

    @property
    def vocabulary(self) -> Path:
        return _vocabulary_in(self.tokenizer)

    def read_weights(self) -> dict[str, Tensor]:
        """All tensors by name, memory-mapped where the format allows.

        Raises:
            WeightsError: a file is damaged, or holds code instead of tensors.
        """
        state: dict[str, Tensor] = {}
        for path in self.weights:
            state.update(read_checkpoint(path))
        return state


def resolve(model_dir: str, cache_dir: str | None = None) -> T5Files:
    """The files behind `model_dir`, an existing folder or a hub id (`owner/name`).

    A folder never touches the network. A hub id is taken from the local cache where that has every file.

    Raises:
        EncoderFilesError: no such folder, an incomplete one, or a hub id that is neither cached nor reachable.
    """
    folder = Path(model_dir).expanduser()
    if folder.is_dir():
        return files_in(folder)
    if not _HUB_ID.fullmatch(model_dir):
        raise EncoderFilesError(f"the text encoder's folder {model_dir} does not exist. {HOW_TO_GET}")
    return files_in(_from_hub(model_dir, cache_dir))


def is_local(model_dir: str, cache_dir: str | None = None) -> bool:
    """Whether `resolve` would need no network: a folder (whole or not), or a hub id that the cache holds whole."""
    return Path(model_dir).expanduser().is_dir() or (
        _HUB_ID.fullmatch(model_dir) is not None and _complete_snapshot(model_dir, cache_dir) is not None
    )


def files_in(folder: Path, need_weights: bool = True) -> T5Files:
    """The files in a folder: all together (the SAT release), or in text_encoder/ and tokenizer/ (diffusers).

    Without `need_weights` a folder with configuration and tokenizer alone will do; `weights` is empty then.

    Raises:
        EncoderFilesError: lists everything that is missing.
        WeightsError: the index of the weights is unreadable.
    """
    encoder = _subfolder_with(folder, "text_encoder", CONFIG)
    tokenizer = _subfolder_with(folder, "tokenizer", _vocabulary_in(folder).name)
    missing = [str(path) for path in (encoder / CONFIG, _vocabulary_in(tokenizer)) if not path.is_file()]
    found = next((encoder / name for name in WEIGHT_FILES if (encoder / name).is_file()), None)
    weights = tuple(shards_of(found)[1] if found.suffix == ".json" else [found]) if found else ()
    if found is None and need_weights:
        missing.append(f"weights (one of {', '.join(WEIGHT_FILES)}) in {encoder}")
    missing += [f"{path} (named in {found.name})" for path in weights if found and not path.is_file()]
    if missing:
        raise EncoderFilesError(
            f"the text encoder in {folder} is incomplete; missing: {'; '.join(missing)}. {HOW_TO_GET}"
        )
    files = T5Files(encoder / CONFIG, tokenizer, weights)
    for path in (files.config, files.vocabulary, *weights):
        refuse_lfs_pointer(path, EncoderFilesError)
    return files


def _vocabulary_in(folder: Path) -> Path:
    """The first of `VOCABULARIES` that there is, else the first."""
    return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), folder / VOCABULARIES[0])


def _subfolder_with(folder: Path, name: str, wanted: str) -> Path:
    sub = folder / name
    return sub if sub.is_dir() and not (folder / wanted).is_file() else folder


# --- hub --------------------------------------------------------------------------------------------------------------


def wanted_files(names: Collection[str]) -> list[str]:
    """Of a repository's file names those that the encoder needs, in the layout and weight format that it has."""
    encoder = "" if CONFIG in names or f"text_encoder/{CONFIG}" not in names else "text_encoder/"
    vocabularies = [place + name for place in ("", "tokenizer/") for name in VOCABULARIES if place + name in names]
    vocabulary = next(iter(vocabularies), VOCABULARIES[0])
    tokenizer = vocabulary.removesuffix(vocabulary.rpartition("/")[2])
    wanted = {encoder + CONFIG, vocabulary, *(tokenizer + extra for extra in TOKENIZER_EXTRAS)}
    weights = next((name for name in WEIGHT_FILES if encoder + name in names), None)
    if weights is not None:
        wanted.add(encoder + weights)
        if weights.endswith(".index.json"):
            stem, suffix = weights.removesuffix(".index.json").rsplit(".", 1)
            shard = re.compile(re.escape(encoder + stem) + r"-\d+-of-\d+\." + suffix)
            wanted.update(name for name in names if shard.fullmatch(name))
    return sorted(wanted.intersection(names))


def _from_hub(repo: str, cache_dir: str | None) -> Path:
    """The local snapshot of a hub repository, downloaded where the cache does not hold it whole."""
    cached = _complete_snapshot(repo, cache_dir)
    if cached is not None:
        return cached
    from huggingface_hub import HfApi, snapshot_download

    try:
        listing = HfApi().model_info(repo, timeout=20).siblings or []
        names = wanted_files([file.rfilename for file in listing])
        return Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns=names))
    except Exception as error:  # the hub's HTTP library, which its versions choose, has errors of its own
        raise EncoderFilesError(
            f"the text encoder {repo!r} is neither an existing folder nor in the Hugging Face cache, and the hub did "
            f"not give it ({first_line(error)}). {HOW_TO_GET}"
        ) from error


def _complete_snapshot(repo: str, cache_dir: str | None) -> Path | None:
    """The cached snapshot, if it has every file; no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(repo, cache_dir=cache_dir, local_files_only=True))
        files_in(snapshot)
    except (LocalEntryNotFoundError, EncoderFilesError):
        return None
    return snapshot

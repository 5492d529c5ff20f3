"""The release's folder layout: `<dir>/latest`, `<dir>/<iteration>/mp_rank_XX_model_states.pt`, and what is inside.

A checkpoint may hold the transformer alone (the published files), or the whole engine with text encoder and VAE
(files that the original's fine-tuning saves); it may be split over tensor-parallel ranks, and may carry LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.weights.checksums import read_bytes, read_header
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, tensors_of, while_files_change

NETWORK_PREFIX = "model.diffusion_model."
FROZEN_PREFIXES = ("conditioner.", "first_stage_model.")
ADAPTER_FILE = "lora.safetensors"
_PART = re.compile(r"mp_rank_(\d+)_model_states\.(?:pt|safetensors)$")
_DATE = re.compile(r"(-\d\d){4}(-\d+)?$")
_2B = "zai-org/CogVideoX-2b"  # on the hub
_NETWORK_ROOTS = ("mixins.", "transformer.", "time_embed.", "ofs_embed.")


def how_to_get(*archives: str, repository: str = _2B) -> str:
    """Where weights come from: the named archives of 2B's SAT release, another model's folders, or what takes their
    place."""
    by_hand = "name the folders of the SAT release, or make them"
    if repository == _2B:
        by_hand = f"unpack {' and '.join(archives)} of the SAT release into one folder, or make that folder"
    return (
        f"Get the weights: `python tools/get_weights.py {repository}` fetches a released model and writes an "
        f"infer.yaml for it; by hand, {by_hand} from the diffusers release with tools/convert_weight_hf2sat.py. Random "
        "ones for a trial come from tools/make_weights.py. docs/weights.md has the steps."
    )


HOW_TO_GET = how_to_get("transformer.zip", "vae.zip")


@dataclass
class Checkpoint:
    """A transformer checkpoint that has been read (tensors still mapped from the file where possible).

    Attributes:
        files: one file a tensor-parallel rank, in rank order.
        network: the transformer's entries without `model.diffusion_model.`.
        others: entries of text encoder and VAE, with their engine names.
        lora: what the file says of its adapter ({"rank", "alpha", ...}), empty if it says nothing.
        notes: what is to be said of it where it is used.
    """

    files: list[Path]
    network: dict[str, Tensor]
    others: dict[str, Tensor]
    iteration: int | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        return str(self.files[0]) + (f" (and {len(self.files) - 1} more parts)" if len(self.files) > 1 else "")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to apply: checkpoint path and the factor on its contribution."""

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`PATH` or `PATH:SCALE`. A path that exists as it stands is never cut.

        Raises:
            WeightsError: the part behind the last colon is no number.
        """
        path, colon, tail = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(text)
        wrong = f"--lora {text!r}: expected PATH or PATH:SCALE, {tail!r} is not a number."
        try:
            scale = float(tail)
        except ValueError as error:
            raise WeightsError(wrong) from error
        if not math.isfinite(scale):
            raise WeightsError(wrong)
        return cls(path, scale)


def locate(path: str | Path) -> tuple[list[Path], int | None]:
    """The file or files of a checkpoint given as file, iteration folder or release folder; and its iteration.

    A folder may also hold an adapter's `lora.safetensors` alone. A training run's folder may be given without its date,
    see `newest_run`.

    Raises:
        WeightsNotFoundError: nothing there, or `latest` names a folder that is not there.
        WeightsError: `latest` is unreadable, or the folder holds something else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        path = newest_run(path) or path
    if path.is_file():
        return [path], _iteration_of(path.parent.name)
    if not path.is_dir():
        raise WeightsNotFoundError(f"no transformer weights at {path}: no such file or folder. {HOW_TO_GET}")
    if (path / "latest").is_file():
        return _follow_latest(path)
    parts = _parts_in(path)
    if parts:
        return parts, _iteration_of(path.name)
    if (path / ADAPTER_FILE).is_file():
        return [path / ADAPTER_FILE], None
    raise WeightsError(f"{path} is not a SAT checkpoint folder: {_what_lies_in(path)}")


def newest_run(path: Path) -> Path | None:
    """Of the training runs `path`-MM-DD-HH-MM the one that saved last; None where there is none."""
    if not path.parent.is_dir():
        return None
    dated = (p for p in path.parent.iterdir() if p.name.startswith(path.name))
    runs = [p for p in dated if _DATE.match(p.name, len(path.name))]
    saved = [(marker.stat().st_mtime, run) for run in runs if (marker := run / "latest").is_file()]
    return max(saved)[1] if saved else None


def _follow_latest(path: Path) -> tuple[list[Path], int | None]:
    text = read_bytes(path / "latest").decode(errors="replace").strip()
    if text != "release" and not re.fullmatch(r"0*[1-9]\d*(-ema)?", text):
        raise WeightsError(
            f"{path / 'latest'} reads {text!r}; it must hold an iteration above 0 or the word release. "
            f"There are: {', '.join(sorted(p.name for p in path.iterdir() if p.is_dir())) or 'no folders'}."
        )
    folder = path / text
    if not folder.is_dir():
        raise WeightsNotFoundError(f"{path / 'latest'} names {text!r}, but there is no folder {folder}. {HOW_TO_GET}")
    parts = _parts_in(folder)
    if not parts:
        raise WeightsNotFoundError(f"{folder} has no mp_rank_00_model_states.pt: {_what_lies_in(folder)}")
    return parts, _iteration_of(text)


def _parts_in(folder: Path) -> list[Path]:
    parts = sorted(p for p in folder.iterdir() if _PART.search(p.name))
    ranks = [int(_PART.search(p.name).group(1)) for p in parts]  # type: ignore[union-attr]
    if ranks != list(range(len(ranks))):
        raise WeightsNotFoundError(
            f"{folder} has tensor-parallel parts {ranks}; parts 0 to {max(ranks)} must all be there, once each."
        )
    return parts


def _what_lies_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if any(n.startswith("z3_rank_") for n in names):
        return "it holds ZeRO-3 partitions (z3_rank_*), no whole weights; save that run with a ZeRO stage below 3."
    if "model_index.json" in names or "diffusion_pytorch_model.safetensors.index.json" in names:
        return "it holds a diffusers model; convert it with tools/convert_weight_hf2sat.py."
    iterations = [n for n in names if _iteration_of(n) is not None]
    if iterations:
        return f"no `latest` file in it; name one of its iterations ({', '.join(iterations)}) or write it to `latest`."
    return f"no `latest` and no mp_rank_00_model_states.pt in it (found: {', '.join(names[:8]) or 'nothing'})."


def _iteration_of(name: str) -> int | None:
    digits = name.removesuffix("-ema")
    return int(digits) if digits.isdigit() else None


def read_transformer(path: str | Path) -> Checkpoint:
    """Read a transformer checkpoint (see `locate`), merged over tensor-parallel parts.

    Raises:
        WeightsError: as `locate` and `read_checkpoint`; or entries that belong to no part of the engine.
    """
    parts = read_parts(path)
    network = [part.network for part in parts]
    if len(network) > 1:
        from sgm.weights.tensor_parallel import merge_partitions

        network = [merge_partitions(network)]
    return replace(parts[0], files=[file for part in parts for file in part.files], network=network[0])


def read_parts(path: str | Path) -> list[Checkpoint]:
    """Read a transformer checkpoint (see `locate`), its tensor-parallel parts one by one, in rank order.

    A checkpoint that is deleted meanwhile is looked up again: `latest` may name another one by then.

    Raises:
        WeightsError: as `locate` and `read_checkpoint`; or entries that belong to no part of the engine.
    """

    def read() -> list[Checkpoint]:
        files, iteration = locate(path)
        return [_read_part(file, iteration) for file in files]

    return while_files_change(read)


def _read_part(file: Path, iteration: int | None) -> Checkpoint:
    content = read_checkpoint(file)
    network, others = _split(tensors_of(weights_entry(content)), file)
    stored, lora = content.get("iteration"), content.get("lora")
    return Checkpoint(
        [file],
        network,
        others,
        iteration if iteration is not None else (stored if isinstance(stored, int) else None),
        dict(lora) if isinstance(lora, Mapping) else _metadata(file),
    )


def weights_entry(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping of names to tensors inside a checkpoint's content, which may be the content itself."""
    for name in ("module", "state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def _split(state: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(network entries without prefix, text encoder and VAE entries)."""
    network = {n.removeprefix(NETWORK_PREFIX): t for n, t in state.items() if n.startswith(NETWORK_PREFIX)}
    others = {n: t for n, t in state.items() if n.startswith(FROZEN_PREFIXES)}
    rest = {n: t for n, t in state.items() if n not in others and not n.startswith(NETWORK_PREFIX)}
    foreign = any(not n.startswith(_NETWORK_ROOTS) or ".lora_" in n for n in rest)
    if rest and not network and not foreign:
        return rest, others
    if rest or not network:
        from sgm.weights.identify import what_is

        found = what_is(rest) if rest else "no tensors"
        raise WeightsError(f"{file} is not a SAT transformer checkpoint: it holds {found}.")
    return network, others


def _metadata(file: Path) -> dict[str, Any]:
    """Adapter facts that we store as text in a safetensors header."""
    if file.suffix != ".safetensors":
        return {}
    stored = read_header(file).metadata
    numbers = {"rank": int, "alpha": float}
    try:
        return {k: numbers.get(k, str)(v) for k, v in stored.items()}
    except ValueError as error:
        raise WeightsError(f"{file}: its header states a LoRA rank or alpha that is no number ({error}).") from error

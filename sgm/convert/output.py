"""Folders that appear whole or not at all, their upload to the Hugging Face hub, and weights in shards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sgm.convert.lazy import ConvertError, Deferred, summed_bytes
from sgm.errors import first_line
from sgm.files import (
    PARTIAL,
    exchange,
    remove,
    replaced,
    require_space,
    restore_replaced,
    try_lock,
    write_failed,
    write_json,
)
from sgm.weights.save import save_safetensors

SHARD_BYTES = 5 << 30
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@contextmanager
def whole_folder(target: Path, *, overwrite: bool, inputs: Mapping[str, Path], needed: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends without an error, and is deleted otherwise.

    It grows beside `target` as `.partial-NAME`; a process that is killed leaves that name behind, and the next run
    with the same target deletes it.

    Args:
        overwrite: an existing target is replaced (at the end, in one step) instead of refused.
        inputs: what is read, by the option that names it; none may lie in an existing target.
        needed: bytes that are going to be written.
    Raises:
        ConvertError: `target` is there, or holds an input, or another process is writing it.
        SaveError: no room, no permission.
    """
    target = target.expanduser().absolute()
    staging = target.with_name(PARTIAL + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with try_lock(target.with_name(f".lock-{target.name}")) as alone:
            if not alone:
                raise ConvertError(f"another command is writing {target} just now; wait for it, or choose another.")
            restore_replaced(target.parent, target.name)
            _refuse_existing(target, overwrite, inputs)
            remove(staging)
            require_space(target.parent, needed)
            staging.mkdir()
            try:
                yield staging
                exchange(staging, target)
                remove(replaced(target))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise write_failed(target, error) from error


def _refuse_existing(target: Path, overwrite: bool, inputs: Mapping[str, Path]) -> None:
    for name, path in inputs.items():
        if path.expanduser().resolve().is_relative_to(target.resolve()):
            raise ConvertError(f"{name} {path} lies in the output folder {target}; choose another output folder.")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not overwrite:
        raise ConvertError(f"{target} exists already; choose another folder, or replace it with --overwrite.")


def push_to_hub(folder: Path, name: str | None = None, *, private: bool = False) -> str:
    """Upload `folder` to a repository of the hub, which is made where it is missing; returns a line for the report.

    Args:
        name: `OWNER/NAME`, or `NAME` in the logged-in user's account; by default the folder's name.
        private: for its owner alone; a repository that is there and public is refused then.
    Raises:
        ConvertError: no network, no login, refused. The folder itself is complete and stays.
    """
    from huggingface_hub import HfApi

    name = name or folder.resolve().name
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True, private=private or None).repo_id
        if private and not api.repo_info(repository).private:
            raise ConvertError(
                f"{repository} is on the hub already and public, so {folder} was not uploaded: choose another name, or "
                "ask for a public one."
            )
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except ConvertError:
        raise
    except Exception as error:  # the hub's HTTP library, which its versions choose, has errors of its own
        why = first_line(error).rstrip(".")
        raise ConvertError(
            f"{folder} is complete, but the upload to the hub failed: {why}. Log in (hf auth login) and upload "
            f"it with: hf upload {name} {folder}"
        ) from error
    return f"uploaded: {repository}"


# --- weights in shards -----------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number. Raises ConvertError: not a positive size."""
    word = text.strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if word.endswith(u)), "")
    try:
        size = int(float(word.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        size = 0
    if size <= 0:
        raise ConvertError(f"--max_shard_size {text!r} is no size; write for example 5GB or 500MB.")
    return size


def write_shards(
    folder: Path, stem: str, plan: Mapping[str, Deferred], limit: int, facts: Mapping[str, str] | None = None
) -> list[Path]:
    """Write `stem.safetensors`, or `stem-00001-of-0000N.safetensors` and their index, one tensor in memory at a time.

    A shard holds at most `limit` bytes, or a single tensor that is larger; the header of each has the `facts`.
    """
    shards = _shards(plan, limit)
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]  # fmt: skip
    written = [
        save_safetensors(folder / name, {n: plan[n] for n in shard}, {"format": "pt", **(facts or {})})
        for name, shard in zip(names, shards)
    ]
    if len(shards) > 1:
        placed = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        content = {"metadata": {"total_size": summed_bytes(plan)}, "weight_map": placed}
        written.append(write_json(folder / f"{stem}.safetensors.index.json", content, indent=2))
    return written


def _shards(plan: Mapping[str, Deferred], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, source in plan.items():
        if shards[-1] and source.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= source.nbytes
    return shards

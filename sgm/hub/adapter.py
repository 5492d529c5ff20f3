"""An adapter by its name in the Hugging Face hub: `OWNER/NAME`, or `OWNER/NAME/FILE` where there are several."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sgm.convert.lora_files import USUAL
from sgm.files import require_space, write_json
from sgm.hub import release
from sgm.hub.client import Hub, HubError, UnreachableError
from sgm.hub.download import Download
from sgm.hub.release import ORIGIN, alone, fetch, origin_of, patiently, say_on_stderr
from sgm.places import shown
from sgm.weights.release import newest_run

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w.-]+(?:/[\w.-]+)*\.(?:safetensors|bin|pt)))?")
_FOLDER = "adapters"  # beside the releases
_BESIDE = "adapter_config.json"


def is_hub_name(text: str) -> bool:
    """Whether `text` can be an adapter's name in the hub: nothing of it is here, neither itself nor a folder above."""
    path = Path(text).expanduser()
    return (
        _NAME.fullmatch(text) is not None
        and not path.exists()
        and not Path(path.parts[0]).is_dir()
        and newest_run(path) is None
    )


def adapter_from_hub(name: str, say: Callable[[str], None] = say_on_stderr) -> Path:
    """The local file of an adapter in the hub, which is downloaded at first use.

    Raises:
        HubError: it is not to be had, the repository has no adapter, or several and `name` does not say which.
        SaveError: no room.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise HubError(f"{name!r} is no adapter's name: write OWNER/NAME, or OWNER/NAME/FILE.")
    repository, file = match["repository"], match["file"]
    folder = (release.WEIGHTS / _FOLDER / repository).absolute()
    if here := _fetched(folder, file):
        return here
    with alone(folder, repository, say):
        return _fetched(folder, file) or _download(repository, file, folder, say)


def _fetched(folder: Path, file: str | None) -> Path | None:
    named = file or origin_of(folder).get("adapter")
    return folder / named if named and (folder / named).is_file() else None


def _download(repository: str, file: str | None, folder: Path, say: Callable[[str], None]) -> Path:
    try:
        hub = Hub.from_environment()
        commit = patiently(lambda: hub.commit(repository))
        listed = {found.path: found for found in patiently(lambda: hub.files(repository, commit))}
        chosen = file or choose_file(repository, listed)
        if chosen not in listed:
            raise HubError(f"{repository} has no file {chosen}; its files: {', '.join([*listed][:8])}.")
        beside = str(PurePosixPath(chosen).with_name(_BESIDE))
        files = [listed[path] for path in (beside, chosen) if path in listed]
        say(f"fetching {repository}/{chosen} into {shown(folder)}")
        require_space(folder.parent, Download(hub, repository, commit, folder).missing_bytes(files))
        for each in files:  # the settings first: where the adapter is, it is whole
            fetch(Download(hub, repository, commit, folder, say=say), [each])
    except UnreachableError as error:
        wanted = shlex.join([repository, *([file] if file else [])])
        raise HubError(
            f"{error} There is no file or folder {repository} here, so it was looked for in the hub. Without network: "
            f"`hf download {wanted} --local-dir FOLDER` on a machine that has one, bring that folder here and name it."
        ) from error
    if file is None:
        write_json(folder / ORIGIN, {"repository": repository, "commit": commit, "adapter": chosen})
    return folder / chosen


def choose_file(repository: str, names: Iterable[str]) -> str:
    """The adapter's file among those of a repository. Raises HubError: there is none, or there are several."""
    names = list(names)
    usual = next((name for name in USUAL if name in names), None)
    others = [name for name in names if name.endswith(".safetensors")]
    if usual is None and len(others) != 1:
        listed = "; ".join(f"--lora {repository}/{name}" for name in others[:8])
        raise HubError(
            f"{repository} in the hub holds {len(others)} .safetensors files; name one: {listed}."
            if others
            else f"{repository} in the hub holds no adapter (a .safetensors file), but {', '.join(names[:8])}."
        )
    return usual or others[0]

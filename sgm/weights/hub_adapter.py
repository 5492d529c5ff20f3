"""An adapter by its name in the Hugging Face hub: `OWNER/NAME`, or `OWNER/NAME/FILE` where there are several."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sgm.errors import first_line
from sgm.weights.checksums import WeightsError, WeightsNotFoundError
from sgm.weights.release import newest_run

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w.-]+(?:/[\w.-]+)*\.(?:safetensors|bin|pt)))?")
# What an adapter is called by those who write it, in order of preference.
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors",
         "pytorch_lora_weights.bin", "adapter_model.bin")  # fmt: skip
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


def adapter_from_hub(name: str) -> Path:
    """The local file of an adapter in the hub: the cache's, else it is downloaded into the cache.

    Raises:
        WeightsNotFoundError: neither cached nor to be had; no adapter in the repository.
        WeightsError: the repository holds several and `name` does not say which.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise WeightsNotFoundError(f"{name} is no OWNER/NAME of the hub.")
    repository, file = match["repository"], match["file"]
    cached = _cached(repository, file)
    return cached or _downloaded(repository, file)


def _cached(repository: str, file: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for candidate in [file] if file else USUAL:
        found = try_to_load_from_cache(repository, candidate)
        if isinstance(found, str):
            return Path(found)
    return None


def _downloaded(repository: str, file: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(repository)
        chosen = file or choose_file(repository, names)
        if _BESIDE in names:
            hf_hub_download(repository, _BESIDE)
        return Path(hf_hub_download(repository, chosen))
    except WeightsError:
        raise
    except Exception as error:  # the hub's HTTP library, which its versions choose, has errors of its own
        named = f"{repository}/{file}" if file else repository
        raise WeightsNotFoundError(
            f"no adapter at {named}: there is no such file or folder here, and from the hub it was not to be had: "
            f"{first_line(error)}. Where there is network: hf download {repository}{f' {file}' if file else ''}; its "
            "last line is the folder to name here."
        ) from error


def choose_file(repository: str, names: Iterable[str]) -> str:
    """The adapter's file among those of a repository. Raises WeightsError: there is none, or there are several."""
    names = list(names)
    usual = next((name for name in USUAL if name in names), None)
    others = [name for name in names if name.endswith(".safetensors")]
    if usual is None and len(others) != 1:
        listed = "; ".join(f"--lora {repository}/{name}" for name in others[:8])
        raise WeightsError(
            f"{repository} in the hub holds {len(others)} .safetensors files; name one: {listed}."
            if others
            else f"{repository} in the hub holds no adapter (a .safetensors file), but {', '.join(names[:8])}."
        )
    return usual or others[0]

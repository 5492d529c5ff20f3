"""Uploading a converted folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sgm.convert.lazy import ConvertError
from sgm.errors import first_line


def push_to_hub(folder: Path) -> str:
    """Upload `folder` to the repository of that name in the logged-in user's account; returns a line for the report.

    Raises:
        ConvertError: no network, no login, refused. The folder itself is complete and stays.
    """
    from huggingface_hub import HfApi

    name = folder.resolve().name
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except Exception as error:  # the hub's HTTP library, which its versions choose, has errors of its own
        raise ConvertError(
            f"{folder} is complete, but the upload to the hub failed: {first_line(error)}. Log in (hf auth login) "
            f"and upload it with: hf upload {name} {folder}"
        ) from error
    return f"uploaded: {repository}"

"""Where prompts come from, and their names on disk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sgm.errors import SgmError
from sgm.files import refuse_lfs_pointer

_NAME_CHARACTERS = 120  # of the prompt, as the original
_NAME_BYTES = 200  # file systems allow 255 bytes a name; emoji and CJK text take up to 4 a character
_IMAGE = re.compile(r"@@\s*[\"']?(?P<path>[^@]+\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic))[\"']?\s*$", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\<>:"|?*]')


class PromptError(SgmError):
    """Prompts cannot be read; the message says where."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its index: the line number (from 0) in its file, which names its folder and seeds its noise.

    `refined` is a language model's caption of it, "" without; the folder keeps the prompt's own name.
    """

    index: int
    text: str
    refined: str = ""

    @property
    def wording(self) -> str:
        """What the text encoder reads."""
        return self.refined or self.text

    @property
    def folder(self) -> str:
        return f"{self.index}_{safe_name(self.text)}"


def safe_name(text: str) -> str:
    """The original's folder name (spaces to `_`, `/` removed, 120 characters), safe on every file system.

    Plain prompts give the original's name to the letter; control characters, backslashes and characters that Windows
    forbids go, the name is cut at 200 bytes, and what leaves nothing but dots is called `prompt`.
    """
    name = _UNSAFE.sub("", text.strip().replace(" ", "_").replace("/", ""))[:_NAME_CHARACTERS]
    name = name.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore")
    return name if name.strip(".") else "prompt"


def refuse_images(prompts: Sequence[Prompt], file: Path | None = None) -> None:
    """Refuse the original's `TEXT@@IMAGE`, in lines of `file`, say. An @@ without a picture's name is part of the text.

    Raises:
        PromptError: naming the first of them.
    """
    asking = [(prompt, found["path"]) for prompt in prompts if (found := _IMAGE.search(prompt.text))]
    if asking:
        first, image = asking[0]
        place = f"{file}, line {first.index + 1}" if file else f"prompt {first.index}"
        raise PromptError(
            f"{place}{f' (and {len(asking) - 1} more)' if asking[1:] else ''} asks for a video that begins with the "
            f"image {image!r}. Videos are made from text alone here: remove the @@ and what is behind it, and describe "
            "in words what the image shows."
        )


def read_prompt_file(path: Path) -> tuple[list[Prompt], int]:
    """(prompts, number of blank lines left out) of a UTF-8 text file with one prompt a line.

    Raises:
        PromptError: not UTF-8 (names line and byte), no prompt in it, or one with an image.
    """
    refuse_lfs_pointer(path, PromptError)
    prompts: list[Prompt] = []
    blank = 0
    for number, raw in enumerate(path.read_bytes().splitlines()):
        try:
            text = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise PromptError(
                f"{path}, line {number + 1}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8. "
                "Save the file as UTF-8."
            ) from error
        if text:
            prompts.append(Prompt(number, text))
        else:
            blank += 1
    if not prompts:
        raise PromptError(f"{path} holds no prompt ({blank} blank lines). Write one prompt a line.")
    refuse_images(prompts, path)
    return prompts, blank


def find_prompt_file(name: str, config_files: Sequence[Path]) -> Path:
    """`name` from the current folder, then beside the YAML files (the last one first).

    Raises:
        PromptError: not found; lists the places tried.
    """
    folders = [Path(), *(f.resolve().parent for f in reversed(config_files))]
    tried = [folder / name for folder in folders]
    for path in tried:
        if path.is_file():
            return path
    raise PromptError(f"no prompt file {name!r}; looked at {', '.join(str(p) for p in dict.fromkeys(tried))}")


def gather(
    given: Sequence[str], input_file: str | None, config_files: Sequence[Path]
) -> tuple[list[Prompt], str | None]:
    """(prompts, a line that says where they are from) of a run: `given` ones, or else those of `input_file`.

    Raises:
        PromptError: none given and no file named, the file is missing, unreadable or empty, or a prompt has an image.
    """
    if given:
        prompts = [Prompt(k, text.strip()) for k, text in enumerate(given) if text.strip()]
        if not prompts:
            raise PromptError("the prompts given are blank; write some text behind --prompt.")
        refuse_images(prompts)
        return prompts, None
    if not input_file:
        raise PromptError("args.input_file is not set: name a file with one prompt a line, or give --prompt.")
    path = find_prompt_file(input_file, config_files)
    prompts, blank = read_prompt_file(path)
    return prompts, f"{len(prompts)} prompts from {path}" + (f", {blank} blank lines left out" if blank else "")


def share(prompts: Sequence[Prompt], rank: int, world_size: int) -> list[Prompt]:
    """This process's prompts: line k belongs to rank k % world_size, as in the original."""
    return [p for p in prompts if p.index % world_size == rank]


def ask() -> Iterator[Prompt]:
    """Prompts typed by a person, until end of input (Ctrl-D). Empty answers are asked again."""
    index = 0
    while True:
        print("Prompt (Ctrl-D quits): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield Prompt(index, line.strip())
            index += 1

"""Where prompts and their pictures come from, and their names on disk."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sgm.data.images import ImageError, Picture
from sgm.errors import SgmError
from sgm.files import read_lines
from sgm.typed import listing

MARK = "@@"  # between a prompt and its picture, as in the original

_NAME_CHARACTERS = 120  # of the prompt, as the original
_NAME_BYTES = 200  # file systems allow 255 bytes a name; emoji and CJK text take up to 4 a character
_IMAGE = re.compile(r"@@\s*[\"']?(?P<path>[^@]+\.(png|jpe?g|webp|bmp|gif|tiff?|avif|heic))[\"']?\s*$", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\<>:"|?*]')


class PromptError(SgmError):
    """Prompts cannot be read; the message says where."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its index: the line number (from 0) in its file, which names its folder and seeds its noise.

    `refined` is a language model's caption of it, "" without; the folder keeps the prompt's own name. `picture` is what
    the video begins with, None where that is left to the model.
    """

    index: int
    text: str
    refined: str = ""
    picture: Picture | None = None

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


@dataclass(frozen=True)
class Pictures:
    """Whether a run's videos begin with pictures, and with which.

    Attributes:
        wanted: each does. given: the file (or the picture itself) for prompts that name none.
        other: a configuration of the other kind, for advice.
        extends: videos go on with a clip, and need no picture of any model.
    """

    wanted: bool
    given: str | Picture | None = None
    other: str = ""
    extends: bool = False

    def attach(self, prompts: Sequence[Prompt], file: Path | None = None) -> list[Prompt]:
        """Prompts (lines of `file`, say) that still hold `TEXT@@IMAGE`, with their pictures, which are read once.

        A picture is looked for from the current folder, then beside the file.

        Raises:
            PromptError: naming every prompt whose picture is missing, not wanted or cannot be read.
        """
        if not self.wanted:
            self._refuse_images(prompts, file)
            return list(prompts)
        known: dict[Path, Picture] = {}
        found, problems = [], []
        for prompt in prompts:
            try:
                found.append(self._attached(prompt, file, known))
            except (PromptError, ImageError) as error:
                problems.append(f"{_place(prompt, file)}: {error}")
        if problems:
            raise PromptError(problems[0] if len(problems) == 1 else listing(problems, "the prompts"))
        return found

    def _attached(self, prompt: Prompt, file: Path | None, known: dict[Path, Picture]) -> Prompt:
        text, *names = (part.strip() for part in prompt.text.split(MARK))
        if len(names) > 1:
            raise PromptError(f"{MARK} stands {len(names)} times; write TEXT{MARK}IMAGE, with one.")
        name = names[0].strip("\"'") if names else self.given
        if isinstance(name, Picture):
            return replace(prompt, text=text, picture=name)
        if not name:
            instead = f", or give --image FILE. From text alone: {self.other}" if self.other else ""
            raise PromptError(
                f"no picture is named, and this model makes videos from one: write TEXT{MARK}IMAGE{instead}."
            )
        place, beside = Path(os.path.expanduser(name)), file.parent / os.path.expanduser(name) if file else None
        path = beside if beside is not None and beside.exists() and not place.exists() else place
        if path not in known:
            known[path] = Picture.of(path)
        return replace(prompt, text=text, picture=known[path])

    def _refuse_images(self, prompts: Sequence[Prompt], file: Path | None) -> None:
        """Refuse `TEXT@@IMAGE`, naming the first of them. An @@ without a picture's name is part of the text."""
        asking = [(prompt, found["path"]) for prompt in prompts if (found := _IMAGE.search(prompt.text))]
        if not asking:
            return
        first, image = asking[0]
        reason = "args.extend goes on with a clip" if self.extends else "this model makes videos from text alone"
        instead = f", or take {self.other}" if self.other and not self.extends else ""
        raise PromptError(
            f"{_place(first, file)}{f' (and {len(asking) - 1} more)' if asking[1:] else ''} asks for a video that "
            f"begins with the image {image!r}, and {reason}: remove the {MARK} and what is behind it{instead}."
        )


FROM_TEXT = Pictures(wanted=False)


def picture_apart(text: str) -> tuple[str, str]:
    """A prompt's text, and the `@@IMAGE` behind it, "" where no picture is named."""
    found = _IMAGE.search(text)
    return (text[: found.start()].rstrip(), found[0]) if found else (text, "")


def _place(prompt: Prompt, file: Path | None) -> str:
    return f"{file}, line {prompt.index + 1}" if file else f"prompt {prompt.index}"


def read_prompt_file(path: Path) -> tuple[list[Prompt], int]:
    """(prompts, number of blank lines left out) of a UTF-8 text file with one prompt a line.

    Raises:
        PromptError: not UTF-8 (names line and byte), or no prompt in it.
    """
    lines = read_lines(path, PromptError)
    prompts = [Prompt(number, text) for number, text in enumerate(lines) if text]
    blank = len(lines) - len(prompts)
    if not prompts:
        raise PromptError(f"{path} holds no prompt ({blank} blank lines). Write one prompt a line.")
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
    given: Sequence[str],
    input_file: str | None,
    config_files: Sequence[Path],
    pictures: Pictures = FROM_TEXT,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[list[Prompt], str | None]:
    """(prompts, a line that says where they are from) of a run: `given` ones, or else those of `input_file`.

    Of several processes each has its own prompts, with their pictures.

    Raises:
        PromptError: none given and no file named, the file is missing, unreadable or empty, or pictures are amiss.
    """
    prompts, path, blank = listed(given, input_file, config_files)
    blank_lines = f", {blank} blank lines left out" if blank else ""
    note = f"{len(prompts)} prompts from {path}{blank_lines}" if path else None
    return pictures.attach(share(prompts, rank, world_size), path), note


def listed(
    given: Sequence[str], input_file: str | None, config_files: Sequence[Path]
) -> tuple[list[Prompt], Path | None, int]:
    """(prompts, their file, its blank lines) of a run, as they stand there. Raises PromptError, as `gather`."""
    if given:
        prompts = [Prompt(k, text.strip()) for k, text in enumerate(given) if text.strip()]
        if not prompts:
            raise PromptError("the prompts given are blank; write some text behind --prompt.")
        return prompts, None, 0
    if not input_file:
        raise PromptError("args.input_file is not set: name a file with one prompt a line, or give --prompt.")
    path = find_prompt_file(input_file, config_files)
    prompts, blank = read_prompt_file(path)
    return prompts, path, blank


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

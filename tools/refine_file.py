"""Refinement of a file of prompts: resumable, in order, one report a line.

Captions are kept in `OUT.progress.jsonl` as they come. `OUT` appears when every line has its caption; a run that was
stopped, or in which lines failed, is continued by the same command.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sgm.files import write_failed, write_text
from sgm.inference.prompts import Prompt, PromptError, read_prompt_file
from sgm.inference.refine import SYSTEM_PROMPT, Endpoint, RefineError

Refiner = Callable[[str, Endpoint], str]


@dataclass
class Outcome:
    """What became of a file: wishes asked for, lines taken over from an earlier run, failures by line (from 1)."""

    asked: int = 0
    reused: int = 0
    failures: dict[int, str] = field(default_factory=dict)


class Journal:
    """Captions of finished prompts on disk, keyed by prompt, model and system prompt."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self._setting = hashlib.sha256(f"{model}\n{SYSTEM_PROMPT}".encode()).hexdigest()[:12]
        self._lock = threading.Lock()
        self.captions: dict[str, str] = {}
        for line in path.read_text("ascii", "replace").split("\n") if path.is_file() else []:
            self._keep_line(line)

    def _keep_line(self, line: str) -> None:
        try:
            entry = json.loads(line)
            prompt, caption, setting = entry["prompt"], entry["caption"], entry["setting"]
        except (ValueError, KeyError, TypeError):
            return  # the last line of a run that was killed while writing it: asked for again
        if setting == self._setting and isinstance(prompt, str) and isinstance(caption, str):
            self.captions[prompt] = caption

    def add(self, prompt: str, caption: str) -> None:
        """Keep a caption; it outlives this process when this returns."""
        entry = json.dumps({"prompt": prompt, "caption": caption, "setting": self._setting})  # ASCII, one line
        with self._lock, self.path.open("a+b") as file:
            if file.tell() and not self._ends_a_line():
                file.write(b"\n")
            file.write(entry.encode() + b"\n")
            self.captions[prompt] = caption

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def refine_file(
    source: Path,
    target: Path,
    endpoint: Endpoint,
    refiner: Refiner,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Refine each line of `source` into the same line of `target`; blank lines stay blank.

    Args:
        refiner: makes one caption.
        jobs: requests at a time; the order of lines does not depend on it.
        report: called with a text for each finished line.
    Raises:
        PromptError: unreadable prompts, or a target that exists (unless `overwrite`).
        RefineError: a failure that all further lines would meet, too; what is done is kept.
        SaveError: `target` cannot be written.
    """
    prompts, _ = read_prompt_file(source)
    _refuse_target(source, target, overwrite)
    lines = [""] * len(source.read_bytes().splitlines())
    journal = Journal(target.with_name(f"{target.name}.progress.jsonl"), endpoint.model)
    first = {p.text: p for p in reversed(prompts)}  # the same wish on several lines is asked once
    todo = [p for p in prompts if first[p.text] is p and p.text not in journal.captions]
    outcome = Outcome(asked=len(todo), reused=sum(p.text in journal.captions for p in prompts))
    try:
        _ask_all(todo, endpoint, refiner, journal, outcome, jobs, report)
        if outcome.failures:
            return outcome
        for prompt in prompts:
            lines[prompt.index] = journal.captions[prompt.text]
        write_text(target, "\n".join(lines) + "\n")
    except OSError as error:
        raise write_failed(target, error) from error
    journal.path.unlink(missing_ok=True)
    return outcome


def _refuse_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise PromptError(f"{target} is the input file itself; name another output file.")
    if target.exists() and not overwrite:
        raise PromptError(f"{target} exists already; name another file, or replace it with --overwrite.")


def _ask_all(
    todo: Sequence[Prompt],
    endpoint: Endpoint,
    refiner: Refiner,
    journal: Journal,
    outcome: Outcome,
    jobs: int,
    report: Callable[[str], None],
) -> None:
    stop = threading.Event()

    def refine_one(prompt: Prompt) -> RefineError | None:
        if stop.is_set():
            return None
        try:
            journal.add(prompt.text, refiner(prompt.text, endpoint))
        except RefineError as error:
            if error.fatal:
                stop.set()
            return error
        return None

    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            for prompt, error in zip(todo, pool.map(refine_one, todo)):
                if error is not None and error.fatal:
                    raise error
                if error is not None:
                    outcome.failures[prompt.index + 1] = str(error)
                report(f"line {prompt.index + 1}: " + ("done" if error is None else f"failed: {error}"))
        finally:
            stop.set()

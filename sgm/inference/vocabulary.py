"""The words that a model knows, where its configuration names them: a prompt with others gets a note.

A YAML file of kinds of words. `told` are the names that the note lists, `words` all words and phrases of the kind;
`before` names the kinds whose words such a word stands before, so that a background's white before a shape is noticed:

    shapes: {told: [star, ring], words: [star, ring, hoop]}
    colours: {before: [shapes], told: [red], words: [red, crimson]}
    backgrounds: {before: [grounds], told: [white], words: [white, snow-white]}
    sizes: {before: [shapes, grounds], words: [small, large]}
    grounds: {words: [background, backdrop]}
    others: {words: [a, the, over]}
    adapters: [demo/i2v] # that know these words, as the model does
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sgm.config import ConfigError, merge_yaml
from sgm.inference.adapters import adapter_files
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Prompt, find_prompt_file
from sgm.places import CONFIGS

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SHOWN = 12  # words in a note


@dataclass(frozen=True)
class Kind:
    """Words of one kind; see the module."""

    name: str
    words: tuple[str, ...]
    told: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str, value: Any, place: Path) -> Kind:
        """Raises ConfigError: it is no such kind."""
        fields = value if isinstance(value, dict) else {}
        lists = [fields.get("words"), fields.get("told", []), fields.get("before", [])]
        odd = set(fields) - {"words", "told", "before"}
        if odd or not all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in lists):
            raise ConfigError(
                f"{place}: {name} must have words, and may have told and before, each a list of texts"
                + (f"; {', '.join(sorted(odd))} is none of them" if odd else "")
                + ". (YAML takes on, off, yes, no for no texts: put quotes around them.)"
            )
        words, told, before = (tuple(texts) for texts in lists if texts is not None)
        return cls(name, tuple(word.lower() for word in words), told, before)


@dataclass(frozen=True)
class Vocabulary:
    """The kinds of words of a model, and the adapters that know no others."""

    kinds: tuple[Kind, ...]
    adapters: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Raises ConfigError: unreadable, or `before` names no kind."""
        content = merge_yaml([file])
        adapters = content.pop("adapters", [])
        if not isinstance(adapters, list) or not all(isinstance(text, str) for text in adapters):
            raise ConfigError(f"{file}: adapters must be a list of paths.")
        kinds = tuple(Kind.parse(str(name), value, file) for name, value in content.items())
        names = {kind.name for kind in kinds}
        for kind in kinds:
            if missing := sorted(set(kind.before) - names):
                raise ConfigError(f"{file}: {kind.name} stands before {missing[0]!r}, which is no kind of this file.")
        return cls(kinds, tuple(adapters))

    def note(self, texts: Sequence[str]) -> str | None:
        """One note on all words of prompts that it does not know, or knows for something else; None without any."""
        unknown = list(dict.fromkeys(word for text in texts for word in self.unknown(text)))
        misplaced = list(dict.fromkeys(line for text in texts for line in self.misplaced(text)))
        if not unknown and not misplaced:
            return None
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        said = [f"the model does not know {', '.join(unknown[:_SHOWN])}{more}"] if unknown else []
        known = "; ".join(f"{kind.name}: {', '.join(kind.told)}" for kind in self.kinds if kind.told)
        return f"{'; '.join([*said, *misplaced])}. It knows {known}"

    def unknown(self, text: str) -> list[str]:
        """Words of a prompt that are of no kind, as they stand there. A compound's hyphens may be missing."""
        words, found, k = _WORD.findall(text), list[str](), 0
        while k < len(words):
            sizes = (n for n in (3, 2) if tuple(map(str.lower, words[k : k + n])) in self._compounds)
            n = next(sizes, 1)
            found += [words[k]] if n == 1 and not self._knows(words[k].lower()) else []
            k += n
        return found

    def misplaced(self, text: str) -> Iterator[str]:
        """What is said of words that stand before what words of another kind stand before."""
        run: list[tuple[Kind, str]] = []  # words that a noun of theirs may follow
        for kind, words in self._read(text):
            if kind is not None and kind.before:
                run.append((kind, words))
                continue
            if kind is not None:
                yield from filter(None, (self._said(*read, kind.name, words) for read in run))
            run.clear()

    def _said(self, kind: Kind, words: str, head: str, noun: str) -> str | None:
        """What is wrong with these words before a noun of the kind `head`."""
        if head in kind.before:
            return None
        right = next((f", not of its {other.name}" for other in self.kinds if other.before == (head,)), "")
        return f"{words} is of its {kind.name}{right} (before {noun})"

    @cached_property
    def _words(self) -> set[str]:
        """Single words of all kinds, also those of their phrases."""
        return {word for kind in self.kinds for phrase in kind.words for word in phrase.split()}

    @cached_property
    def _compounds(self) -> set[tuple[str, ...]]:
        return {tuple(word.split("-")) for word in self._words if "-" in word}

    @cached_property
    def _pieces(self) -> set[str]:
        """What compounds are made of."""
        return {piece for compound in self._compounds for piece in compound} | self._words

    def _knows(self, word: str) -> bool:
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("'s")}
        compound = "-" in word and self._pieces.issuperset(word.split("-"))
        return compound or not forms.isdisjoint(self._words)

    @cached_property
    def _phrases(self) -> dict[tuple[str, ...], Kind]:
        """Of kinds that say something of a noun, and of these nouns."""
        heads = {head for kind in self.kinds for head in kind.before}
        named = [kind for kind in self.kinds if kind.before or kind.name in heads]
        return {tuple(_WORD.findall(phrase)): kind for kind in named for phrase in kind.words}

    def _read(self, text: str) -> Iterator[tuple[Kind | None, str]]:
        """The longest known phrases of a prompt in turn, each with its kind; None of words of none."""
        longest = max(map(len, self._phrases), default=1)
        for clause in re.split(r"[,.;:!?()]", text.lower()):
            words, k = [part for word in _WORD.findall(clause) for part in self._parts(word)], 0
            while k < len(words):
                sizes = (n for n in range(min(longest, len(words) - k), 0, -1) if self._kind(words[k : k + n]))
                n = next(sizes, 1)
                yield self._kind(words[k : k + n]), " ".join(words[k : k + n])
                k += n
            yield None, ""

    def _parts(self, word: str) -> list[str]:
        """A compound that is no word of its own in its parts."""
        return [word] if self._kind([word]) else word.split("-")

    def _kind(self, words: Sequence[str]) -> Kind | None:
        if len(words) == 1 and words[0] in self._others:
            return None
        singular = (*words[:-1], words[-1].removesuffix("s"))
        return self._phrases.get(tuple(words)) or self._phrases.get(singular)

    @cached_property
    def _others(self) -> set[str]:
        """Words that a kind without nouns has as they are: a plural that is a pattern, for example."""
        named = {kind.name for kind in self._phrases.values()}
        return {word for kind in self.kinds if kind.name not in named for word in kind.words}


def words_note(args: SampleArgs, config_files: Sequence[Path], prompts: Sequence[Prompt]) -> str | None:
    """The note on prompts whose words the model does not know, where `args.vocabulary` says which it does.

    An adapter may have taught it more, and a language model writes prompts out in its own words: then nothing is said.

    Raises:
        ConfigError, PromptError: the file is unreadable, or not there.
    """
    if args.vocabulary is None or args.refine:
        return None
    # Beside the YAML files, or in configs/, from where a shipped file's name for it holds.
    vocabulary = Vocabulary.read(find_prompt_file(args.vocabulary, [CONFIGS / "any.yaml", *config_files]))
    own = {adapter_files(text) for text in (args.student, *vocabulary.adapters) if text}
    taught = any(adapter_files(text) not in own for text in args.lora)
    return None if taught else vocabulary.note([prompt.text for prompt in prompts])

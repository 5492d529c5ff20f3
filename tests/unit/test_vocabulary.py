"""Prompts whose words a model does not know: one note, which says what it does know."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from sgm.config import ConfigError, load_run_config
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Prompt
from sgm.inference.vocabulary import Vocabulary, words_note
from tests.sampling_tiny import REPO, main
from tools.demo.attributes import BACKGROUNDS, COLOURS, SHAPES
from tools.demo.vocabulary import CHANCES
from tools.demo.wordings import random_spec, reword

CONFIG = REPO / "configs" / "demo_infer.yaml"
DEMO = Vocabulary.read(REPO / "configs" / "parts" / "demo_words.yaml")
KNOWN = (
    f"It knows shapes: {', '.join(SHAPES)}; colours: {', '.join(COLOURS)}; backgrounds: {', '.join(BACKGROUNDS)}; patterns: "
    "horizontal stripes, vertical stripes, checker, dots, gradient; motions: left, right, up, "
)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("A small red star drifts to the left over a white background.", None),
        ("Two big stars and a Yellow RING bounce; dark-blue-and-white stripes", "the model does not know Two"),
        ("A fox in the snow", "the model does not know fox, snow"),
        ("a large white star", "white is of its backgrounds, not of its colours (before star)"),
        ("A dark blue ring over black", "dark blue is of its backgrounds, not of its colours (before ring)"),
        ("a star on a red background", "red is of its colours, not of its backgrounds (before background)"),
        ("a heart, a white ring and a fox", "the model does not know heart, fox; white is of its backgrounds"),
        ("white. star", None),
    ],
)
def test_one_note_names_what_it_does_not_know(prompt: str, said: str | None) -> None:
    note = DEMO.note([prompt])
    assert (note is None) == (said is None)
    assert said is None or (note is not None and note.startswith(said) and KNOWN in note)


def test_prompts_of_the_demo_need_none() -> None:
    rng = random.Random(3)
    texts = (REPO / "configs" / "demo.txt").read_text().splitlines()
    while len(texts) < 300:
        spec = random_spec(rng)
        if all(item.shape != "heart" and item.motion != "wobble" for item in spec.objects):
            spec = replace(spec, objects=tuple(replace(item, fill="plain") for item in spec.objects))
            texts.append(reword(spec, rng, CHANCES))
    assert [(text, DEMO.unknown(text)) for text in texts if DEMO.unknown(text)] == []
    misplaced = [text for text in texts if list(DEMO.misplaced(text))]
    assert len(misplaced) <= 1, misplaced  # "deep blue" is a background, and a deep blue star's blue is blue


def args(**flags: object) -> SampleArgs:
    return load_run_config([CONFIG], SampleArgs, flags=flags).args


def test_a_run_says_it_and_is_not_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = [CONFIG, "--device", "cpu", "--prompt", "A fox", "--output-dir", tmp_path, "--dry-run"]
    assert main(*run) == 0
    assert "note: the model does not know fox. It knows shapes: circle" in capfd.readouterr().err


def test_who_was_taught_more_is_not_told(tmp_path: Path) -> None:
    prompts = [Prompt(0, "a fox")]
    assert words_note(args(), [CONFIG], prompts)
    assert words_note(args(lora=[str(REPO / "demo" / "student")]), [CONFIG], prompts)
    assert words_note(args(lora=["ckpts/foxes:0.5"]), [CONFIG], prompts) is None
    pictures = REPO / "configs" / "demo_i2v_infer.yaml"
    assert words_note(load_run_config([pictures], SampleArgs).args, [pictures], prompts)
    assert words_note(args(refine=True), [CONFIG], prompts) is None
    assert words_note(replace(args(), vocabulary=None), [CONFIG], prompts) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shapes: [star]", "shapes must have words"),
        ("shapes: {words: [star, yes]}", "put quotes around them"),
        ("adapters: demo/i2v", "adapters must be a list of paths"),
        ("shapes: {words: [star], tells: [star]}", "tells is none of them"),
        ("colours: {words: [red], before: [shapes]}", "colours stands before 'shapes', which is no kind"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "words.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file}: .*{said}"):
        Vocabulary.read(file)

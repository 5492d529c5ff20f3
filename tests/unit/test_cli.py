"""Command lines as people type them, and what several ranks say of one end."""

from __future__ import annotations

import pytest

import sample_video
import train_video
from sgm import cli
from sgm.config import ConfigError
from sgm.launch import verdict


def test_files_and_options_may_be_mixed():
    options = sample_video.parse(["a.yaml", "--prompt", "A b", "c.yaml", "--image-size", "16", "32", "d.yaml"])
    assert options.configs == ["a.yaml", "c.yaml", "d.yaml"] and options.prompts == ["A b"]
    assert options.sampling_image_size == [16, 32]
    options = train_video.parse(["a.yaml", "--seed", "7", "c.yaml", "--resume"])
    assert options.configs == ["a.yaml", "c.yaml"] and options.seed == 7 and options.resume == "auto"


@pytest.mark.parametrize("program", [sample_video, train_video])
def test_the_originals_form_of_files(program):
    options = program.parse(["--base", "a.yaml", "b.yaml", "--seed", "7", "--local-rank=0"])
    assert options.base == ["a.yaml", "b.yaml"] and options.configs == [] and options.local_rank == 0
    assert program.parse([]).configs == []


@pytest.mark.parametrize("program", [sample_video, train_video])
def test_help_and_unknown_options(program, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        program.parse(["--help"])
    assert "CONFIG.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^2$"):
        program.parse(["a.yaml", "--sede", "7"])
    assert "error: unrecognized arguments: --sede 7" in capsys.readouterr().err


def test_ranks_say_the_same_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cli.SAID, str(tmp_path / "said"))

    def fail(text):
        raise ConfigError(text)

    def stop():
        raise KeyboardInterrupt

    assert [cli.exit_code(lambda text=text: fail(text)) for text in ("one", "one", "two", "one")] == [2] * 4
    assert cli.exit_code(stop, "kept") == 130  # ended because of the others: they have said why
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    (tmp_path / "said").unlink()
    assert [cli.exit_code(stop, "kept"), cli.exit_code(stop, "kept"), cli.exit_code(lambda: fail("one"))] == [
        130,
        130,
        2,
    ]
    assert capsys.readouterr().err == "\nkept\nerror: one\n"
    monkeypatch.setenv(cli.SAID, str(tmp_path / "gone" / "said"))  # with the launcher
    assert cli.exit_code(lambda: fail("one")) == 2 and capsys.readouterr().err == "error: one\n"


@pytest.mark.parametrize(
    ("codes", "lines", "code"),
    [
        ({1: 2, 0: 2}, [], 2),
        ({1: 2, 0: -15}, [], 2),
        ({1: 2, 0: 130}, [], 2),
        ({0: 143, 1: 143}, [], 143),
        ({0: 130, 1: -15}, [], 130),
        ({3: 1, 0: -15, 1: 130}, ["rank 3 ended with code 1"], 1),
        ({0: 1, 1: 2}, ["rank 0 ended with code 1"], 2),  # its peer's end was rank 0's trouble
        ({1: -9, 0: 1}, ["rank 1 was ended by SIGKILL", "rank 0 ended with code 1"], 137),
        ({1: -15, 0: -15}, ["rank 1 was ended by SIGTERM"], 143),
        ({0: -50}, ["rank 0 was ended by signal 50"], 178),
    ],
)
def test_exit_code_of_a_launch(codes, lines, code):
    assert verdict(codes) == (lines, code)

"""Command lines as people type them, and what several ranks say of one end."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import sample_video
import train_video
from sgm import cli
from sgm.config import ConfigError, option
from sgm.flags import add_flags
from sgm.inference.options import SampleArgs
from sgm.launch import verdict
from sgm.training.options import TrainArgs
from tests.conftest import REPO


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
    assert "error: unrecognized arguments: --sede 7\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^2$"):  # the original's, and a key without an option
        program.parse(["a.yaml", "--save_interval=7", "--cache_dir", "x", "--sampling-num-frames", "3"])
    said = capsys.readouterr().err
    own = "--num-frames" if program is sample_video else "--set args.save_interval=VALUE; write --cache-dir"
    assert f"; write {own}" in said


@pytest.mark.parametrize(("program", "record"), [(sample_video, SampleArgs), (train_video, TrainArgs)])
def test_flags_are_options_and_absent_ones_are_none(program, record, capsys):
    fields = {field.name: field for field in dataclasses.fields(record)}
    options = vars(program.parse([]))
    assert {name for name in fields if name in options} == set(program.FLAGS)
    assert all(options[name] is None for name in program.FLAGS)
    with pytest.raises(SystemExit):
        program.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert all(" ".join(fields[name].metadata["help"].split()) in shown for name in program.FLAGS)


def test_values_of_flags():
    line = "--prompt A --prompt B --refine --lora a:2 --lora b --steps 7 --guidance-scale 3 --image-size 16 32"
    options = sample_video.parse([*line.split(), "--placement", "lean", "--load", "50", "--num-frames", "3"])
    assert options.prompts == ["A", "B"] and options.refine is True and options.lora == ["a:2", "b"]
    assert (options.num_steps, options.sampling_num_frames, options.sampling_image_size) == (7, 3, [16, 32])
    assert options.guidance_scale == 3.0 and options.placement == "lean" and options.load == "50"
    assert train_video.parse(["--resume", "run"]).resume == "run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--placement", "all", "--seed-mode", "x"], "invalid choice: 'x' (choose from"),
        (["--image-size", "16"], "expected 2 arguments"),
        (["--seed", "1.5"], "invalid int value: '1.5'"),
        (["--refine=yes"], "ignored explicit argument 'yes'"),
    ],
)
def test_values_that_flags_refuse(words, said, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        sample_video.parse(words)
    assert said in capsys.readouterr().err


def test_a_percent_sign_may_stand_in_a_description():
    @dataclasses.dataclass
    class Record:
        share: float = option(0.1, "of the whole, 10 % as it stands")

    parser = cli.Parser()
    add_flags(parser, Record, ["share"])
    assert "10 % as it stands" in parser.format_help() and parser.parse_args(["--share", "1"]).share == 1.0


@pytest.mark.parametrize("program", ["sample_video", "train_video"])
def test_a_command_line_is_read_without_heavy_imports(program):
    code = f"import sys, {program}; {program}.parse([]); print({{'torch', 'omegaconf', 'numpy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done


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
        ({0: 3, 1: -15}, [], 3),
        ({0: 143, 1: 143}, [], 143),
        ({0: 130, 1: -15}, [], 130),
        ({3: 1, 0: -15, 1: 130}, ["rank 3 ended with code 1"], 1),
        ({0: 1, 1: 2}, ["rank 0 ended with code 1"], 2),  # its peer's end was rank 0's trouble
        ({1: -9, 0: 1}, ["rank 1 was ended by SIGKILL", "rank 0 ended with code 1"], 137),
        ({0: 143, 1: -9}, ["rank 1 was ended by SIGKILL"], 137),  # rank 0 missed rank 1, and was seen first
        ({1: -15, 0: -15}, ["rank 1 was ended by SIGTERM"], 143),
        ({0: -50}, ["rank 0 was ended by signal 50"], 178),
    ],
)
def test_exit_code_of_a_launch(codes, lines, code):
    assert verdict(codes) == (lines, code)


def test_output_that_cannot_be_written_spoils_no_exit_code():
    program = "import sgm.cli; sgm.cli.print_line('x'); sgm.cli.flush_output(); sys.exit(0)"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {program}"], stdout=full, stderr=subprocess.PIPE, cwd=REPO
        )
    assert (done.returncode, done.stderr) == (0, b"")

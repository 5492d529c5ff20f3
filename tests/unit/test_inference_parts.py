"""The small parts of a sampling run: prompts and their names, noise, options, paths."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest
import torch

from sgm.config import ConfigError, merge_yaml
from sgm.inference.noise import SampleId, StackedNoise
from sgm.inference.options import SampleArgs
from sgm.inference.progress import Progress
from sgm.inference.prompts import (
    Prompt,
    PromptError,
    ask,
    find_prompt_file,
    gather,
    read_prompt_file,
    safe_name,
    share,
)
from sgm.placeholders import choose_config, unedited, weight_paths
from sgm.places import found_path
from sgm.weights.preflight import check_paths

REPO = Path(__file__).resolve().parents[2]


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red ball, rolling.", "A_red_ball,_rolling."),  # to the letter
        ("a/b/../c", "ab..c"),
        ("../../etc/passwd", "....etcpasswd"),
        ("..", "prompt"),
        ("///", "prompt"),
        ('say "hi" <now>?', "say_hi_now"),
        ("tab\tnew\x00line", "tabnewline"),
        ("C:\\temp", "Ctemp"),
        ("x" * 300, "x" * 120),
        ("😀" * 120, "😀" * 50),  # 200 bytes
        ("汉" * 120, "汉" * 66),
        ("\ud800x", "x"),  # half a surrogate pair cannot be encoded
    ],
)
def test_names_on_disk_are_safe(text, name, tmp_path):
    assert safe_name(text) == name
    (tmp_path / Prompt(3, text).folder).mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [f"3_{name}"]


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffone\r\n\r\n  two \n\tthree\n\n".encode())
    prompts, blank = read_prompt_file(file)
    assert prompts == [Prompt(0, "one"), Prompt(2, "two"), Prompt(3, "three")] and blank == 2
    file.write_bytes("good\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"p\.txt, line 2: byte 3 \(0xef\) is not UTF-8"):
        read_prompt_file(file)


def test_prompt_files_are_looked_for_here_then_beside_the_yaml(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir(), beside.mkdir()
    monkeypatch.chdir(here)
    (beside / "p.txt").write_text("b\n")
    config = beside / "c.yaml"
    assert find_prompt_file("p.txt", [config]) == beside / "p.txt"
    assert gather([], "p.txt", [config])[0] == [Prompt(0, "b")]
    (here / "p.txt").write_text("a\n")
    assert find_prompt_file("p.txt", [config]).resolve() == here / "p.txt"
    with pytest.raises(PromptError, match=r"no prompt file 'q.txt'; looked at q.txt, .*beside/q.txt"):
        find_prompt_file("q.txt", [config])


def test_given_prompts_come_before_the_file():
    assert gather([" a ", "", "b"], "absent.txt", []) == ([Prompt(0, "a"), Prompt(2, "b")], None)
    for given, file, words in ((["  "], None, "blank"), ([], None, "input_file is not set")):
        with pytest.raises(PromptError, match=words):
            gather(given, file, [])


def test_line_k_belongs_to_rank_k_modulo_world_size():
    prompts = [Prompt(k, str(k)) for k in (0, 1, 3, 4, 5)]  # line 2 was blank
    assert [[p.index for p in share(prompts, rank, 3)] for rank in range(3)] == [[0, 3], [1, 4], [5]]


@pytest.mark.parametrize("mark", ["@@cat.png", "@@ ./Cat.JPEG ", " @@ 'https://x.org/a b.webp'", "@@x@@y.gif"])
def test_prompts_with_images_are_refused(tmp_path, mark):
    text = "a cat" + mark
    with pytest.raises(
        PromptError, match=r"prompt 1 \(and 1 more\) asks for a video .* image .*videos from text alone"
    ):
        gather(["a dog", text, text], None, [])
    (tmp_path / "p.txt").write_text(f"a dog\n\n{text}\n", encoding="utf-8")
    with pytest.raises(PromptError, match=r"p\.txt, line 3 asks .* remove the @@"):
        gather([], str(tmp_path / "p.txt"), [])


@pytest.mark.parametrize("text", ["@@ -1,3 +1,4 @@ a diff", "me@@home", "an @@", "cat.png on a wall", "a@@b.png too"])
def test_prompts_that_merely_hold_the_mark_are_text(text):
    assert gather([text], None, [])[0] == [Prompt(0, text)]


def test_asking_until_the_end_of_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n  \ntwo\n"))
    assert list(ask()) == [Prompt(0, "one"), Prompt(1, "two")]
    assert capsys.readouterr().err.count("Ctrl-D") == 4


# --- noise -------------------------------------------------------------------------------------------------------


def test_noise_of_a_sample_does_not_depend_on_its_company():
    ids = [SampleId(1, 0, k) for k in range(3)]
    together, alone = StackedNoise(ids), StackedNoise(ids[1:2])
    x = torch.zeros(3, 2, 4)
    for _ in range(3):
        a, b = together.like(x), alone.like(x[:1])
        assert a.shape == x.shape and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    draws = [
        StackedNoise([SampleId(*i)]).start((50,)).sum().item()
        for i in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (11, 0, 0)]
    ]
    assert len(set(draws)) == 5
    assert SampleId(42, 3, 1).generator().initial_seed() == 6581409535260845054  # the same video in every version
    normal = StackedNoise([SampleId(0, 0, 0)]).start((100_000,))
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    with pytest.raises(ValueError, match="batch of 2 was asked of 3"):
        together.like(x[:2])


# --- options and paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling_image_size": [480, 721]}, "multiples of 16"),
        ({"sampling_image_size": [480]}, "multiples of 16"),
        ({"sampling_image_size": [0, 16]}, "multiples of 16"),
        ({"fp16": True, "bf16": True}, "choose one"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        SampleArgs(**options)


def test_precision_by_name():
    assert [SampleArgs(fp16=a, bf16=b).dtype for a, b in ((0, 0), (1, 0), (0, 1))] == ["fp32", "fp16", "bf16"]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    content = merge_yaml([REPO / "configs" / "cogvideox_2b_infer.yaml"])
    return content["model"], content["args"]["load"]


def test_first_trial_runs_the_demo_and_says_so():
    chosen, why = choose_config(REPO / "configs" / "cogvideox_2b_infer.yaml", REPO / "configs" / "demo_infer.yaml")
    assert chosen.name == "demo_infer.yaml" and "placeholder" in why and "args.load" in why and "model_dir" in why


def test_edited_paths(shipped, tmp_path):
    model, load = shipped
    assert len(unedited(weight_paths(model, load))) == 3
    stage, embedder = (
        model["first_stage_config"]["params"],
        model["conditioner_config"]["params"]["emb_models"][0]["params"],
    )
    for name in ("transformer", "t5"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as error:
        check_paths(model, str(tmp_path / "transformer"))
    assert "2 weight paths to set" in str(error.value) and "ckpt_path is still the placeholder" in str(error.value)
    assert "args.load" not in str(error.value)
    stage["ckpt_path"], embedder["model_dir"] = str(tmp_path / "vae.pt"), str(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"(?s)vae\.pt does not exist.*make_weights"):
        check_paths(model, str(tmp_path / "transformer"))
    (tmp_path / "vae.pt").touch()
    check_paths(model, str(tmp_path / "transformer"))
    check_paths(model, str(tmp_path / "transformer"), [f"{tmp_path / 'vae.pt'}:0.5"])
    with pytest.raises(ConfigError, match="args.lora: /nowhere does not exist"):
        check_paths(model, str(tmp_path / "transformer"), ["/nowhere:2"])
    (tmp_path / "ckpts" / "fox-01-31-12-00").mkdir(parents=True)
    (tmp_path / "ckpts" / "fox-01-31-12-00" / "latest").write_text("4")
    check_paths(model, str(tmp_path / "transformer"), [f"{tmp_path / 'ckpts' / 'fox'}:0.5"])  # its newest run
    embedder["model_dir"] = "someone/some-t5"  # a hub id is asked for later
    check_paths(model, str(tmp_path / "transformer"))
    with pytest.raises(ConfigError, match="args.load: someone/transformer does not exist"):
        check_paths(model, "someone/transformer")


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("load", {"transformer.zip"}),
        ("vae", {"vae.zip"}),
        ("t5", {"text_encoder/"}),
        ("lora", {"of another trainer"}),
        ("load vae", {"transformer.zip and vae.zip"}),
        ("load lora", {"transformer.zip", "of another trainer"}),
    ],
)
def test_help_is_of_the_kind_that_is_missing(tmp_path, missing, told):
    for name in ("load", "vae", "t5", "lora"):
        if name not in missing.split():
            (tmp_path / name).mkdir()
    model = {
        "first_stage_config": {"params": {"ckpt_path": str(tmp_path / "vae")}},
        "conditioner_config": {"params": {"emb_models": [{"params": {"model_dir": str(tmp_path / "t5")}}]}},
    }
    with pytest.raises(ConfigError) as error:
        check_paths(model, str(tmp_path / "load"), [f"{tmp_path / 'lora'}:0.5"])
    text = str(error.value)
    assert text.startswith(f"{len(missing.split())} weight path") and all(words in text for words in told)
    every = {"transformer.zip", "vae.zip", "text_encoder/", "of another trainer"}
    assert not any(words in text for words in every if words not in " ".join(told))


def test_help_is_of_the_model_that_is_configured(tmp_path):
    for name in ("transformer_i2v", "transformer_t2v"):  # 1.5's release
        (tmp_path / name).mkdir()
    for name, repository in {
        "cogvideox_2b": "zai-org/CogVideoX-2b",
        "cogvideox_5b_i2v": "zai-org/CogVideoX-5b-I2V",
        "cogvideox1.5_5b": "zai-org/CogVideoX1.5-5B",
    }.items():
        model = merge_yaml([REPO / "configs" / f"{name}_infer.yaml"])["model"]
        for section in (model, {"network_config": model["network_config"]}):  # the rest is not needed beside a cache
            with pytest.raises(ConfigError) as error:
                check_paths(section, str(tmp_path / "transformer"))
            text = str(error.value)
            assert f"get_weights.py {repository}` " in text and ("transformer.zip" in text) == ("2b" in name)
            assert (
                f"transformer does not exist; there are {tmp_path}/transformer_i2v, {tmp_path}/transformer_t2v" in text
            )


def test_relative_paths_from_here_or_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found_path("configs/test.txt") == str(REPO / "configs/test.txt")
    assert found_path("demo/transformer") == str(REPO / "demo/transformer")
    assert found_path("somewhere/else") == "somewhere/else" and found_path("/abs") == "/abs"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "test.txt").touch()
    assert found_path("configs/test.txt") == "configs/test.txt"


def test_an_interrupt_that_python_drops_stops_the_next_step(monkeypatch):
    """A signal may come while a destructor runs, whose exceptions are printed and forgotten."""
    from sgm.cli import Interrupts

    class Closing:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        interrupts = Interrupts().listen()
        with Progress(False, torch.device("cpu"), interrupts.check).steps(3) as step:
            step()
            monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)
            closing = Closing()
            del closing  # raises into nothing
            with pytest.raises(KeyboardInterrupt):
                step()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_a_redirected_log_holds_lines_and_no_bar(capsys, monkeypatch):
    monkeypatch.setattr("sgm.inference.progress.LINE_SECONDS", 0.0)
    progress = Progress(True, torch.device("cpu"))
    with progress.bar(1, "prompts", "prompt") as bar:
        with progress.steps(2) as step:
            step()
            progress.line("between")
            step()
        bar.update(1)
    first, between, second, prompts = capsys.readouterr().err.splitlines()
    assert first.startswith("sampling: 1 of 2 steps, ") and between == "between"
    assert second.startswith("sampling: 2 of 2 steps, ") and second.endswith(", 0 s to go")
    assert prompts.startswith("prompts: 1 of 1 prompts, ")

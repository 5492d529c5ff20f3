"""Every command and every YAML snippet of README and docs holds, and every shipped configuration builds."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from sgm.config import check_model_section, load_run_config, merge_yaml
from sgm.inference.options import SampleArgs
from sgm.training.options import TrainArgs
from tests.sampling_tiny import REPO, main

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
GENERAL = {"mkdir", "unzip", "git", "mv", "cd", "source"}  # tools that a README may name without explanation


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("shell") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_there_are_commands_and_snippets():
    assert len(commands()) > 8 and len(blocks("yaml")) >= 2


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:70])
def test_command(words, capsys, monkeypatch):
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    program, *rest = words
    if program in GENERAL:
        return
    if program == "pip" or rest[:2] == ["-m", "pip"]:
        _installation(rest[rest.index("install") :])
        return
    if rest[:1] == ["-m"]:
        (script, *arguments) = rest[rest.index("sgm") :] if "sgm" in rest else rest[1:]
    else:
        script, *arguments = words if program == "cogvideox-sat" else rest
    if script in ("sgm", "cogvideox-sat"):
        {"sample": _sampling, "train": _training}[arguments[0]](arguments[1:])
        return
    if program == "python" and script == "venv":
        return
    assert program in ("bash", "python"), f"unknown program {program}"
    assert (REPO / script).is_file(), f"{script} is named, but not there"
    known = {"inference.sh": _sampling, "sample_video.py": _sampling, "finetune.sh": _training, "train_video.py": _training}
    if script in known:
        known[script](arguments)
    elif script.endswith(".py"):
        _tool(script, arguments, capsys)
    else:
        assert script == "tests/run.sh", f"{script}: say in this test how it is checked"


def _sampling(arguments: list[str]) -> None:
    if "--help" not in arguments:
        code = main(*arguments, *([] if "--dry-run" in arguments else ["--dry-run"]), "--device", "cpu")
        assert code == 0


def _installation(words: list[str]) -> None:
    """A requirement file that is there, this project with extras that it has, or packages with a version."""
    assert words[0] == "install"
    for word in (w for w in words[1:] if not w.startswith("-")):
        folder, _, extras = word.partition("[")
        if folder == ".":
            assert extras in ("", "test]")
        else:
            assert (REPO / word).is_file() or re.search(r"==\d", word), word


def _training(arguments: list[str]) -> None:
    import train_video

    if "--help" in arguments:
        return
    options = train_video.parse([a for a in arguments if not a.startswith("--nproc")])
    if options.configs:
        load_run_config([REPO / file for file in options.configs], TrainArgs, overrides=options.set)


def _tool(script: str, arguments: list[str], capsys) -> None:
    """Every option that is used is one that the tool's own help knows."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in (a.split("=")[0] for a in arguments if a.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", shown), f"{script} has no option {option}"
    for file in (a for a in arguments if a.startswith("configs/")):
        assert (REPO / file).is_file()


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[1].strip()[:40])
def test_snippet_is_part_of_a_configuration(text, tmp_path):
    """Laid over the shipped file of its kind it is still valid: every key exists, every target resolves."""
    (tmp_path / "snippet.yaml").write_text(text)
    content = merge_yaml([tmp_path / "snippet.yaml"])
    for name, args in (("cogvideox_2b_infer", SampleArgs), ("cogvideox_2b_sft", TrainArgs)):
        fields = args.__dataclass_fields__
        if all(key in fields for key in content.get("args") or {}):
            config = load_run_config([REPO / "configs" / f"{name}.yaml", tmp_path / "snippet.yaml"], args)
            _check_model(config.model)
            return
    raise AssertionError(f"neither kind of configuration takes all of {list(content['args'])}")


def _check_model(model: dict) -> None:
    from sgm.models.diffusion import SATVideoDiffusionEngine

    check_model_section(model, SATVideoDiffusionEngine)


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_builds(file: Path):
    """Typed, every target resolved, and the engine built on the meta device (the text encoder's files aside)."""
    from sgm.models.diffusion import SATVideoDiffusionEngine

    files = _with_base(file)
    mode = merge_yaml(files)["args"]["mode"]
    config = load_run_config(files, SampleArgs if mode == "inference" else TrainArgs)
    assert not config.notes, config.notes
    _check_model(config.model)
    model = {k: v for k, v in config.model.items() if k != "conditioner_config"}
    with torch.device("meta"):
        engine = SATVideoDiffusionEngine(**model)
    length = config.model["network_config"]["params"]["modules"]["pos_embed_config"]["params"]["text_length"]
    (embedder,) = config.model["conditioner_config"]["params"]["emb_models"]
    assert embedder["params"]["max_length"] == length
    assert engine.first_stage_model.decoder.z_channels == engine.network.out_channels


def _with_base(file: Path) -> list[Path]:
    """A file that changes another names it in the command of its first lines."""
    if "model:\n  scale_factor" in (text := file.read_text()):
        return [file]
    (named,) = re.findall(rf"^#   bash \w+\.sh ((?:configs/\S+ )+configs/{re.escape(file.name)})$", text, re.MULTILINE)
    return [REPO / name for name in named.split()]


def test_the_way_to_install_flash_attention_is_one():
    from sgm.modules.ops.flash4 import HOW_TO_INSTALL

    told = [command for command in re.findall(r"`(pip install [^`]*flash-attn-4[^`]*)`", TEXT)]
    assert told and set(told) == {HOW_TO_INSTALL.format(cuda="[cu13]")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []

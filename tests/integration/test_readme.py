"""What README and docs say holds: commands, YAML snippets, links, and the names of options, keys and files.

Every shipped configuration builds, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

import sample_video
from sgm import util
from sgm.config import AccelerateArgs, ConfigError, check_model_section, load_run_config, merge_yaml
from sgm.hub.release import MODELS
from sgm.inference.options import SampleArgs
from sgm.training.options import DistillArgs, TrainArgs
from sgm.util import get_obj_from_str
from tests.sampling_tiny import REPO, main

README = REPO / "README.md"
PAGES = [
    README,
    REPO / "CONTRIBUTING.md",
    REPO / "demo" / "README.md",
    REPO / "demo" / "student" / "README.md",
    REPO / "demo" / "i2v" / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
GENERAL = {"mkdir", "unzip", "git", "mv", "cd", "source"}  # tools that a README may name without explanation


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Each once."""
    lines = [line for block in blocks("shell") for line in block.replace("\\\n", " ").splitlines()]
    split = dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines)
    return [list(words) for words in split if words]


def test_there_are_commands_and_snippets():
    assert len(commands()) > 8 and len(blocks("yaml")) >= 2


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder with the package of docs/extending.md, from which it can be imported."""
    package = tmp_path / "my_mixins"
    package.mkdir()
    source = next(text for text in blocks("python") if "BaseMixin" in text)
    (package / "__init__.py").write_text(source)
    (package / "scaled.yaml").write_text(next(text for text in blocks("yaml") if "my_mixins" in text))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(util, "ALLOWED_PREFIXES", [*util.ALLOWED_PREFIXES, "my_mixins."])
    return tmp_path


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:70])
def test_command(words, packages):
    words = [str(packages / word) if word.startswith("my_mixins/") else word for word in words]
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    program, *rest = words
    if program in GENERAL:
        return
    if program == "docker":
        _container(rest)
        return
    if program == "pip" or rest[:2] == ["-m", "pip"]:
        _installation(rest[rest.index("install") :])
        return
    if rest[:2] == ["-m", "sgm.launch"]:
        rest = rest[next(k for k, word in enumerate(rest) if k > 1 and (word.endswith(".py") or word == "-m")) :]
    if rest[:1] == ["-m"]:
        (script, *arguments) = rest[rest.index("sgm") :] if "sgm" in rest else rest[1:]
    else:
        script, *arguments = words if program == "cogvideox-sat" else rest
    if script in ("sgm", "cogvideox-sat"):
        {"sample": _sampling, "train": _training, "serve": _serving}[arguments[0]](arguments[1:])
        return
    if script in ("sgm.serve", "serve.sh"):
        _serving(arguments)
        return
    if program == "python" and script == "venv":
        return
    assert program in ("bash", "python"), f"unknown program {program}"
    assert (REPO / script).is_file(), f"{script} is named, but not there"
    known = {
        "inference.sh": _sampling,
        "sample_video.py": _sampling,
        "finetune.sh": _training,
        "train_video.py": _training,
    }
    if script in known:
        known[script](arguments)
    elif script.endswith(".py"):
        _tool(script, arguments)
    else:
        assert script == "tests/run.sh", f"{script}: say in this test how it is checked"


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """The options that a script's help names."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    return frozenset(re.findall(r"--[\w-]*\w", shown.getvalue()))


def _sampling(arguments: list[str]) -> None:
    if "--model" in arguments:  # what is fetched at first use: tests/integration/test_get_weights.py
        options = sample_video.parse(arguments)
        assert options.model in MODELS and all((REPO / file).is_file() for file in options.configs)
    elif "--help" not in arguments:
        code = main(*arguments, *([] if "--dry-run" in arguments else ["--dry-run"]), "--device", "cpu")
        assert code == 0


def _installation(words: list[str]) -> None:
    """A requirement file that is there, this project with extras that it has, or packages with a version."""
    assert words[0] == "install"
    for word in (w for w in words[1:] if not w.startswith("-")):
        folder, _, extras = word.partition("[")
        if folder == ".":
            assert extras in ("", "serve]", "test]")
        else:
            assert (REPO / word).is_file() or re.search(r"==\d", word), word


def _container(words: list[str]) -> None:
    """A Dockerfile and build arguments that are there; the command for the image is one of the checkout."""
    if words[0] == "build":
        file = (REPO / words[words.index("-f") + 1]).read_text()
        for name in (words[k + 1].partition("=")[0] for k, word in enumerate(words) if word == "--build-arg"):
            assert f"ARG {name}=" in file, f"the Dockerfile has no argument {name}"
        return
    assert words[0] == "run"
    image = next(k for k, word in enumerate(words) if word.startswith("cogvideox-sat"))
    if command := words[image + 1 :]:
        {"inference.sh": _sampling, "serve.sh": _serving}[command[1]](command[2:])


def _training(arguments: list[str]) -> None:
    import train_video

    if "--help" in arguments:
        return
    options = train_video.parse([a for a in arguments if not a.startswith("--nproc")])
    if options.configs:
        load_run_config([REPO / file for file in options.configs], TrainArgs, overrides=options.set)


def _serving(arguments: list[str]) -> None:
    from sgm.serve.__main__ import parse

    assert all((REPO / file).is_file() for file in parse(arguments).configs)


def _tool(script: str, arguments: list[str]) -> None:
    """Every option that is used is one that the tool's own help knows."""
    for option in (a.split("=")[0] for a in arguments if a.startswith("--")):
        assert option in options_of(script), f"{script} has no option {option}"
    for file in (a for a in arguments if a.startswith("configs/")):
        assert (REPO / file).is_file()


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[1].strip()[:40])
def test_snippet_is_part_of_a_configuration(text, tmp_path, packages):
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
    """A file that changes another, and does not extend it, names it in the command of its first lines."""
    if re.search("^extends:|^model:\n  scale_factor", text := file.read_text(), re.MULTILINE):
        return [file]
    (named,) = re.findall(rf"^#   bash \w+\.sh ((?:configs/\S+ )+configs/{re.escape(file.name)})$", text, re.MULTILINE)
    return [REPO / name for name in named.split()]


def test_the_way_to_install_flash_attention_is_one():
    from sgm.modules.ops.flash4 import HOW_TO_INSTALL

    told = list(re.findall(r"`(pip install [^`]*flash-attn-4[^`]*)`", TEXT))
    assert told and set(told) == {HOW_TO_INSTALL.format(cuda="[cu13]")}


# --- links and names ---------------------------------------------------------------------------------------------------

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """Of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of every link and picture that leads into the repository."""
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not t.startswith(("http:", "https:"))]
    split = [target.partition("#") for target in targets]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in split]


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


@each_page
def test_links_lead_somewhere(page: Path):
    for file, anchor in links(page):
        assert file.is_file() and (not anchor or anchor in anchors(file)), (file.name, anchor)


def test_every_page_is_found_from_readme():
    first = {file for file, _ in links(README)}
    found = first | {file for page in first & set(PAGES) for file, _ in links(page)}
    assert set(PAGES) - found <= {README}


def test_sections_that_programs_and_configurations_name():
    globs = ("*.py", "*.sh", "sgm/**/*.py", "tools/**/*.py", "tools/**/*.sh", "tools/**/*.yaml", "configs/*.yaml")
    text = "\n".join(file.read_text(encoding="utf-8") for pattern in globs for file in REPO.glob(pattern))
    named = re.findall(r"""(README|[\w/]+\.md)(?:, ["']([^"']+)["'])?""", text)
    assert len(set(named)) > 3
    for name, title in set(named):
        page = README if name == "README" else REPO / name
        assert page in PAGES and (not title or f"# {title}\n" in page.read_text(encoding="utf-8")), (name, title)


@each_page
def test_files_that_are_named_exist(page: Path):
    words = {word for span in spans(page) for word in span.split()}
    files = [w for w in words if re.fullmatch(r"(sgm|tools|configs|tests|demo|docs|findings)/[\w/.-]+\.\w+", w)]
    assert [file for file in files if not (REPO / file).exists()] == []
    modules = [w.split("/") for w in words if re.fullmatch(r"[\w/]+\.py", w) and w not in files]
    assert ["/".join(m) for m in modules if not _is_module(*m)] == []


def _is_module(*parts: str) -> bool:
    """Some script, or a module of some package: `models/x.py` is short for `sgm/models/x.py`."""
    *packages, file = parts
    known = [*REPO.glob("*.py"), *(REPO / "tools").rglob("*.py"), *(REPO / "sgm").rglob("*.py")]
    return any(path.name == file and set(packages[:1]) <= set(path.parts) for path in known)


@each_page
def test_options_that_are_named_exist(page: Path):
    """Those beside a tool's name are its own; others belong to some entry or tool."""
    for span in spans(page):
        if span.startswith(("tensorboard ", "pip ")):
            continue
        named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span))
        script = re.search(r"\w+\.py", span)
        of = [f for f in scripts() if script and Path(f).name == script.group()] or scripts()
        assert not named or named <= {"--nproc"}.union(*map(options_of, of)), span


@functools.cache
def scripts() -> list[str]:
    """The entries, and the tools that take options."""
    tools = [f.relative_to(REPO).as_posix() for f in sorted((REPO / "tools").rglob("*.py"))]
    return [
        "sample_video.py",
        "train_video.py",
        "sgm/serve/__main__.py",
        *(f for f in tools if "def main(arguments" in (REPO / f).read_text()),
    ]


KEY = re.compile(r"\b(args|accelerate|deepspeed|data)\.([\w.]*\w)(?:(?:=|: )(\S+))?")


@each_page
def test_keys_that_are_named_exist(page: Path):
    """Those that are given a value take it; DeepSpeed's must be, since only its own check knows them."""
    for key in {found.groups() for span in spans(page) for found in KEY.finditer(span)}:
        assert _is_key(*key), key


def _is_key(section: str, name: str, value: str | None) -> bool:
    if section == "data":
        dataset = get_obj_from_str("data_video.SFTDataset")
        return name.removeprefix("params.") in {"target", *inspect.signature(dataset).parameters}
    if value is None:
        records = {"args": (TrainArgs, SampleArgs), "accelerate": (AccelerateArgs,)}.get(section, ())
        if name.startswith("distill."):
            name, records = name.removeprefix("distill."), (DistillArgs,)
        return any(name in record.__dataclass_fields__ for record in records)
    return _takes(f"{section}.{name}={value}")


def _takes(override: str) -> bool:
    from sgm.training.run import plan_deepspeed

    shipped = REPO / "configs" / "cogvideox_2b_sft.yaml"
    try:
        config = load_run_config([shipped], TrainArgs, overrides=[override, "args.cache_dir=cache"])
        plan_deepspeed(config.deepspeed, device_type="cuda")
    except ConfigError:
        return False
    return True


def test_every_way_to_be_faster_is_described():
    told = set(re.findall(r"\w+", " ".join(spans(REPO / "docs" / "speed.md"))))
    assert {field.name for field in dataclasses.fields(AccelerateArgs)} <= told

"""What errors, notes and warnings advise can be done: the commands, options, keys and files that they name are there.

The texts are read from the sources: strings of Python (f-strings with a word for each value), what shell scripts echo,
and the tools' own descriptions. Commands are parsed by the parsers of the programs that they call.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sgm.cli
from sgm.config import (
    SECTIONS,
    UPSTREAM_ARGS,
    UPSTREAM_FILES,
    AccelerateArgs,
    ConfigError,
    load_run_config,
)
from sgm.inference.options import SampleArgs
from sgm.training.options import TrainArgs
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.typed import nearest
from tests.sampling_tiny import REPO

ENTRIES = {"inference.sh": "sample_video.py", "finetune.sh": "train_video.py"}
CONVERTERS = ("tools/convert_weight_sat2hf.py", "tools/convert_weight_hf2sat.py")
# Which programs print a file's texts; an option that stands there without a program's name must be one of each.
PRINTED_BY = {
    "tools/refine_file": ("tools/convert_demo.py",),
    "sgm/inference/refine": ("sample_video.py", "tools/convert_demo.py"),
    "sgm/inference/": ("sample_video.py",),
    "sgm/training/": ("train_video.py",),
    "sgm/cache/": ("train_video.py", "tools/precompute_cache.py"),
    "sgm/convert/to_hf": CONVERTERS[:1],
    "sgm/convert/to_sat": CONVERTERS[1:],
    "sgm/convert/": CONVERTERS,
    "tools/examine_clips": ("tools/validate_dataset.py",),
    "sgm/hub/adapter": ("sample_video.py",),
    "sgm/hub/": ("tools/get_weights.py",),
    "sgm/publish/card": ("sample_video.py",),
    "sgm/publish/": ("tools/publish.py",),
    "sgm/serve/": ("sgm/serve/__main__.py",),
    "sgm/weights/release": ("sample_video.py", *CONVERTERS),  # adapters: training takes none
    "sgm/weights/": ("sample_video.py", "train_video.py"),
    "sgm/util": (
        "sample_video.py",
        "train_video.py",
        "tools/make_weights.py",
        "tools/compare_diffusers.py",
        "tools/estimate_memory.py",
        "tools/validate_dataset.py",
        "tools/precompute_cache.py",
    ),
    "sgm/": ("sample_video.py",),
    "finetune": ("train_video.py",),
    "inference": ("sample_video.py",),
    "tests/": (),
}
OTHERS_OPTIONS = {"--nproc", "--needed-by", "--local-dir"}  # of the shell scripts; of a tool that they call; of hf


@dataclass(frozen=True)
class Text:
    """A text that a program may print, and where it stands."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def printed_by(self) -> tuple[str, ...]:
        own = (self.file,) if self.file.endswith(".py") and options_of(self.file) else ()
        return own or next((programs for start, programs in PRINTED_BY.items() if self.file.startswith(start)), ())


# --- collecting --------------------------------------------------------------------------------------------------------


def sources(*patterns: str) -> list[str]:
    return sorted(p.relative_to(REPO).as_posix() for pattern in patterns for p in REPO.glob(pattern))


@functools.cache
def texts() -> list[Text]:
    python = [text for file in sources("*.py", "sgm/**/*.py", "tools/**/*.py") for text in _python_texts(file)]
    return python + [text for file in sources("*.sh", "tools/**/*.sh", "tests/*.sh") for text in _shell_texts(file)]


def _python_texts(file: str) -> Iterator[Text]:
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    described = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documented = {id(n.body[0].value) for n in described if n.body and isinstance(n.body[0], ast.Expr)}
    pieces = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in ast.walk(n) if p is not n}
    if not file.startswith("sgm/") and (shown := ast.get_docstring(tree)):  # what --help begins with
        for line in re.sub(r"\\\n *", "", shown).splitlines():
            usage = re.match(r" *((?:[A-Z_]+=\S+ +)*)(python tools/.*?)(?:  .*|#.*)?$", line)
            yield Text(file, 1, f"`{usage[2]}`" if usage else line)
    for node in ast.walk(tree):
        if id(node) not in documented | pieces and " " in (text := _text_of(node, file) or ""):
            yield Text(file, node.lineno, text)  # type: ignore[attr-defined]


def _text_of(node: ast.AST, file: str) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else _value(p.value, file) for p in node.values)
    return None


def _value(node: ast.expr, file: str) -> str:
    """A constant of the module as it is, any other value as one word."""
    if isinstance(node, ast.Name) and node.id.isupper() and file.startswith("sgm/"):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        return str(getattr(module, node.id, "X"))
    return "X"


def _shell_texts(file: str) -> Iterator[Text]:
    script = (REPO / file).read_text(encoding="utf-8").replace("\\\n", " ")
    for number, line in enumerate(script.splitlines(), 1):
        if said := re.search(r"\becho (.*)", line):
            quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', said[1])
            yield Text(file, number, re.sub(r"\$\(.*?\)+|\$\{[^}]*\}|\$\w+", "X", " ".join(quoted)))


# --- commands ----------------------------------------------------------------------------------------------------------

WORD = (
    r"(?: (?:--[\w-]+|[A-Z][A-Z_]*\b[^\s,;)`]*|X[^\s,;)`]*|\d+\b|configs/[^\s,;)`]+"
    r"|(?:args|deepspeed|model)\.[^\s,;)`]+))"
)
COMMAND = re.compile(rf"(python |bash )?\b((?:tools/(?:\w+/)?|tests/|sgm/)?\w+\.(?:py|sh))\b({WORD}*)")
LINE = re.compile(r"^`python (\S+)(.*)`$")  # a whole command


class Parsed(BaseException):
    """A parser took the arguments; what would follow does not run."""


def parse(script: str, words: list[str]) -> str | None:
    """None if the program's own parser takes `words`, else what it says."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    said = io.StringIO()

    def and_stop(parse_args):
        def parse_and_stop(self, args=None, namespace=None):
            parse_args(self, args, namespace)
            raise Parsed

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        for kind in (sgm.cli.Parser, argparse.ArgumentParser):
            patch.setattr(kind, "parse_args", and_stop(kind.parse_args))
        try:
            module.main(words)
        except Parsed:
            return None
        except SystemExit as stopped:
            return said.getvalue() if stopped.code else None
    return "it has no parser"


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """Of a program outside of `sgm/`, or a module that is one; none where it is no program."""
    said = io.StringIO()
    is_program = not script.startswith("sgm/") or script.endswith("/serve/__main__.py")
    module = importlib.import_module(script.removesuffix(".py").replace("/", ".")) if is_program else None
    if not hasattr(module, "main"):
        return frozenset()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return frozenset(re.findall(r"--[\w-]*\w", said.getvalue())) | OTHERS_OPTIONS


def commands(text: str) -> list[tuple[bool, str, list[str]]]:
    """(whether it is called as it stands, script, words behind it) of each program that a text names."""
    if whole := LINE.match(text):
        return [(True, whole[1], shlex.split(re.sub(r"\[.*?\]", "", whole[2])))]
    text = text.replace("cogvideox-sat train", "python train_video.py")
    text = text.replace("cogvideox-sat sample", "python sample_video.py")
    found = [(bool(m[1]), ENTRIES.get(m[2], m[2]), shlex.split(m[3].rstrip("."))) for m in COMMAND.finditer(text)]
    return [(called, script if called else _tool(script), words) for called, script, words in found]


@functools.cache
def _tool(script: str) -> str:
    """A tool that is named without its folder, with it."""
    return next((tool for tool in sources(f"tools/**/{script}") if not (REPO / script).exists()), script)


def wrong_commands(text: str) -> list[str]:
    found = []
    for called, script, words in commands(text):
        if called and not (REPO / script).is_file():
            found.append(f"{script} is not there")
        if not (REPO / script).is_file() or not script.endswith(".py") or script.startswith("sgm/"):
            continue
        unknown = [w for w in words if re.match(r"--\w", w) and w not in options_of(script)]
        found += [f"{script} has no {option}" for option in unknown]
        if called and words and not unknown and (said := parse(script, words)):
            found.append(f"{script} {' '.join(words)}: {said}")
    return found


def test_commands_can_be_given():
    wrong = {str(t): wrong for t in texts() if (wrong := wrong_commands(t.text))}
    assert not wrong
    assert sum(bool(commands(t.text)) for t in texts()) > 30, "the texts were found"


def test_a_wrong_command_is_seen():
    for text in (
        "use tools/precompute_cache.py --storge fp32",
        "try python tools/convert_weight_hf2sat.py --lora_only",
        "try bash finetune_all.sh",
        "try python sample_video.py --steps X --no-such-option",
    ):
        assert wrong_commands(text), text


# --- options and keys ---------------------------------------------------------------------------------------------------

OPTION = re.compile(r"(?<![\w(-])--[a-z][\w-]*\w")
SETTING = re.compile(r"(--set )?\b((?:args|accelerate|deepspeed|data|model)\.[\w.]+)=([^\s,;)`'\"]+)")
KEY = re.compile(r"(?<![\w.])(args|accelerate)\.([a-z]\w*)")
RECORDS = {"args": (SampleArgs, TrainArgs), "accelerate": (AccelerateArgs,)}


def wrong_options(text: Text) -> set[str]:
    named = set(OPTION.findall(text.text))
    scripts = [s for _, s, _ in commands(text.text) if s.endswith(".py") and (REPO / s).is_file()]
    known = [options_of(script) for script in scripts if script.split("/")[0] != "sgm"]
    if known:
        return named.difference(*known, *(options_of(s) for s in text.printed_by))
    return named - frozenset.intersection(*map(options_of, text.printed_by)) if text.printed_by else set()


def test_options_are_those_of_the_program_that_names_them():
    ours = [t for t in texts() if not re.match(r"(pip|hf|git|curl|nvidia-smi|ffmpeg) ", t.text)]
    wrong = {str(t): wrong for t in ours if (wrong := wrong_options(t))}
    assert not wrong


def wrong_keys(text: str) -> list[str]:
    found = [f"{key}={value} stands without --set" for given, key, value in SETTING.findall(text)
             if not given and "--set " in text]  # fmt: skip
    for section, name in KEY.findall(text):
        known = UPSTREAM_ARGS.union(*(record.__dataclass_fields__ for record in RECORDS[section]))
        found += [] if name in known else [f"{section}.{name} is no key"]
    for given, key, value in SETTING.findall(text):
        any_key = key.endswith(".X")  # the text is of several
        found += [f"--set {key}={value} is refused"] if given and not any_key and not _takes(f"{key}={value}") else []
    return found


@functools.cache
def _takes(override: str) -> bool:
    """Whether an override, with a number for each placeholder, suits a shipped configuration of some kind."""
    override = re.sub(r"=X$", "=1", override)
    low = ["deepspeed.fp16.enabled=false", "deepspeed.bf16.enabled=false"]
    kinds = [
        (["cogvideox_2b_infer"], SampleArgs, ["args.bf16=false", "args.fp16=false"]),
        (["cogvideox_2b_sft"], TrainArgs, ["args.cache_dir=cache", *low]),
        (["cogvideox_2b_infer", "distill"], TrainArgs, ["args.distill.prompts=FILE"]),
    ]
    for names, record, others in kinds:
        with contextlib.suppress(ConfigError):
            files = [REPO / "configs" / f"{name}.yaml" for name in names]
            config = load_run_config(files, record, overrides=[*others, override])
            if record is TrainArgs:
                plan_deepspeed(config.deepspeed, device_type="cuda")
            if record is TrainArgs or not override.startswith("deepspeed"):
                return True
    return False


def test_keys_exist_and_overrides_are_taken():
    assert wrong_keys("use --set args.fp16=false args.bf16=true") == ["args.bf16=true stands without --set"]
    assert wrong_keys("set args.batch_sze, or --set deepspeed.zero_optimization.stage=7")
    wrong = {str(t): wrong for t in texts() if (wrong := wrong_keys(t.text))}
    assert not wrong


def test_files_that_are_named_exist():
    named = {(str(t), f) for t in texts() for f in re.findall(r"\b(?:configs|docs|tools)/[\w/.-]*\w\.(?:\w+)", t.text)}
    assert len(named) > 20 and [n for n in named if not (REPO / n[1]).exists()] == []


# --- names that are nearly right -----------------------------------------------------------------------------------------


def _slips(name: str) -> set[str]:
    """A name with a letter too few or too many, or two in the wrong order."""
    at = len(name) // 2
    swapped = name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]
    return {name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], swapped}


def test_a_slip_of_the_pen_is_seen_and_nothing_else():
    records = [list(record.__dataclass_fields__) for record in (SampleArgs, TrainArgs, AccelerateArgs)]
    for known in (*records, list(SECTIONS)):
        names = [name for name in known if len(name) > 4]
        missed = {slip: name for name in names for slip in _slips(name) - set(known) if not nearest(slip, known)}
        assert not missed
    engine = ["latent_input", "input_key", "scale_factor", "log_keys"]
    for foreign in ("noised_image_input", "noised_image_dropout", "lora_train", "use_pd"):
        assert nearest(foreign, engine) == ""


def test_the_original_s_files_have_their_counterparts_named():
    for file, ours in UPSTREAM_FILES.items():
        with pytest.raises(ConfigError, match=re.escape(f"configs/{file}; its counterpart here: {ours}")):
            load_run_config([Path("configs") / file], SampleArgs)


@pytest.mark.parametrize("words", [["--num_layers", "42"], ["--i2v"], ["--scaling_factor", "0.7"], ["--typecast_fp32"]])
def test_options_of_the_original_s_converter_are_told_what_takes_their_place(words, capsys):
    from tools import convert_weight_sat2hf

    with pytest.raises(SystemExit) as stopped:
        convert_weight_sat2hf.main(["--transformer_ckpt_path", "x", "--output_path", "y", *words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith(f"error: {words[0]} is ")
    (ours,) = re.findall(r"--(?:config|fp32)\b", said)
    assert ours in options_of("tools/convert_weight_sat2hf.py")


@pytest.mark.parametrize("script", ["finetune_single_gpu.sh", "finetune_multi_gpus.sh"])
def test_the_original_s_scripts_name_ours(script):
    done = subprocess.run(["bash", REPO / script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not wrong_commands(done.stderr)
    assert "bash finetune.sh configs/cogvideox_2b_sft.yaml" in done.stderr

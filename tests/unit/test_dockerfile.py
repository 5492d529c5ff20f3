"""The Dockerfile: its grammar, and its commands in a clean clone with programs that only say what they were asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "tools" / "docker"
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "CMD"}
# Says what it was called with. pip's options are looked up in the real pip's help.
STAND_IN = '#!/bin/sh\nprintf "%s" "$(basename "$0")" >>"$CALLS"\nprintf "\\t%s" "$@" >>"$CALLS"\necho >>"$CALLS"\n'


class Instruction(NamedTuple):
    name: str
    value: str


def instructions() -> Iterator[Instruction]:
    """Lines without comments, continued ones joined, as the builder reads them."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, value = line.partition(" ")
            yield Instruction(name, value.strip())


def arguments() -> dict[str, str]:
    """Build arguments with their defaults."""
    pairs = (value.partition("=") for name, value in instructions() if name == "ARG")
    return {name: default for name, _, default in pairs}


@cache
def kept_by_ignore_file(path: str) -> bool:
    """Whether a file of the checkout is sent to the builder: the last line that matches it or a folder of it counts."""
    kept = True
    parts = path.split("/")
    for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        matches = any(
            (fnmatch("/".join(parts[: k + 1]), pattern) and pattern.count("/") == k)
            or (pattern.startswith("**/") and fnmatch(parts[k], pattern[3:]))
            for k in range(len(parts))
        )
        if line and not line.startswith("#") and matches:
            kept = line.startswith("!")
    return kept


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the builder gets of a clean clone."""
    folder = tmp_path_factory.mktemp("docker") / "clone"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(kept_by_ignore_file, filter(None, listed.stdout.split("\0"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    return folder


def run(script: str, folder: Path, tmp_path: Path, **given: str) -> tuple[int, str, list[list[str]]]:
    """(status, what it says, calls) of a RUN instruction in `folder`."""
    bin_ = tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    for program in ("apt-get", "pip", "useradd", "chown"):
        (bin_ / program).write_text(STAND_IN)
        (bin_ / program).chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = {**arguments(), **given, "PATH": f"{bin_}:/usr/bin:/bin", "CALLS": str(calls)}
    script = script.replace("/var/lib/apt", str(tmp_path / "apt"))
    done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr, [line.split("\t") for line in calls.read_text().splitlines()]


def scripts() -> list[str]:
    return [value for name, value in instructions() if name == "RUN"]


def test_it_is_a_dockerfile() -> None:
    found = list(instructions())
    assert {name for name, _ in found} <= KNOWN
    assert [name for name, _ in found][:2] == ["ARG", "FROM"] and found[-1].name == "CMD"
    declared, named = arguments(), re.findall(r"\$\{?([A-Z_]+)", "\n".join(value for _, value in found))
    assert set(named) <= declared.keys() and all(re.fullmatch("[A-Z_]+", name) for name in declared)
    assert re.fullmatch(r"3\.1[1-4]", declared["PYTHON_VERSION"])
    for name, value in found:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", value], check=True)
        elif name == "ENV":
            assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in value.split())
        elif name == "CMD":
            assert json.loads(value) == ["bash", "inference.sh"]


def test_what_is_copied_is_there_and_nothing_that_git_ignores(clone: Path) -> None:
    for value in (value for name, value in instructions() if name == "COPY"):
        *sources, target = value.split()
        assert target.endswith("/") and all((clone / source).exists() for source in sources)
    for name in (
        "inference.sh",
        "sgm/serve/requirements.txt",
        "demo/transformer/latest",
        "configs/parts/finetune.yaml",
    ):
        assert (clone / name).is_file(), name
    for name in (".venv/bin/python", "outputs/a.mp4", "weights/w/x.pt", "demo/clips/a.mp4", "sgm/__pycache__/a.pyc",
                 "ckpts/run/latest", ".git/config", "tests/run.sh"):  # fmt: skip
        assert not kept_by_ignore_file(name), name


@pytest.mark.parametrize(("device", "from_index"), [("cuda", False), ("cpu", True)])
def test_what_is_installed(clone: Path, tmp_path: Path, device: str, from_index: bool) -> None:
    system, packages, user = scripts()
    status, said, calls = run(packages, clone, tmp_path, DEVICE=device)
    assert (status, said) == (0, "")
    (torch_pin,) = re.findall(r"^torch==\S+", (REPO / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert calls[0][-1] == torch_pin and (arguments()["CPU_INDEX"] in calls[0]) == from_index
    files = [calls[1][k + 1] for k, word in enumerate(calls[1]) if word == "-r"]
    assert files == ["requirements.txt", "sgm/serve/requirements.txt"]
    assert all((clone / file).is_file() for file in files)
    assert run(packages, clone, tmp_path, DEVICE=device, EXTRAS="")[2][1][-2:] == ["-r", "requirements.txt"]
    assert run(system, clone, tmp_path)[0] == 0
    status, _, calls = run(user, clone, tmp_path, UID="1234")
    assert status == 0 and calls[0] == ["useradd", "--uid", "1234", "--create-home", "user"]
    assert (clone / "outputs").is_dir()


def test_pip_has_the_options() -> None:
    asked = set(re.findall(r"(?<=\s)--?[\w-]+", scripts()[1].partition("pip install")[2])) | {"--index-url"}
    shown = subprocess.run([sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True).stdout
    assert len(asked) == 3 and asked <= set(re.findall(r"--?[\w-]+", shown))


def test_another_device_is_an_error(clone: Path, tmp_path: Path) -> None:
    status, said, calls = run(scripts()[1], clone, tmp_path, DEVICE="rocm")
    assert status == 2 and "DEVICE is 'rocm'; it must be cuda or cpu" in said and not calls


def test_the_image_s_command_runs_from_the_clone(clone: Path) -> None:
    """As it is set up there: by its own Python, from its own folder."""
    (command,) = [json.loads(value) for name, value in instructions() if name == "CMD"]
    home = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [*command, "--dry-run", "--device", "cpu"], cwd=clone, env=home | {"PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "demo_infer" in done.stderr + done.stdout

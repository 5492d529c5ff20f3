"""The project as a package: what pip reads of it, and the console command of an installed copy, away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sgm
from sgm import cli
from sgm.data.video_io import probe
from tests.conftest import REPO

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(words, cwd=cwd, env=known | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip install .` builds it, with the tools that are here instead of downloaded ones."""
    folder = tmp_path_factory.mktemp("wheel")
    done = run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPO)], folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder of installed packages that holds the project alone; what it needs comes from this environment."""
    folder = wheel.parent / "site"
    done = run([*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], wheel.parent)
    assert done.returncode == 0, done.stderr
    return folder


def command(site: Path, *words: str) -> list[str]:
    return [sys.executable, str(site / "bin" / "cogvideox-sat"), *words]


def required(file: str) -> set[str]:
    lines = (REPO / file).read_text(encoding="utf-8").splitlines()
    return {normal(line) for line in lines if line and not line.startswith("#")}


def normal(text: str) -> str:
    requirement = Requirement(text)
    return f"{requirement.name.lower()}{requirement.specifier};{requirement.marker or ''}"


def test_pip_reads_what_the_requirement_files_say(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(name).decode())
    assert facts["Version"] == sgm.__version__ and facts["License-Expression"] == "Apache-2.0"
    told = [Requirement(text) for text in facts.get_all("Requires-Dist")]
    extras = {"serve": "sgm/serve/requirements.txt", "test": "tests/requirements.txt"}
    assert sorted(facts.get_all("Provides-Extra")) == list(extras)
    for extra, file in extras.items():
        asked = [str(r) for r in told if re.search(f"extra == .{extra}.", str(r.marker or ""))]
        assert {normal(re.sub(f"(; | and )extra == .{extra}.", "", text)) for text in asked} == required(file)
    assert {normal(str(r)) for r in told if "extra" not in str(r.marker or "")} == required("requirements.txt")


def test_the_pythons_are_the_same_everywhere():
    pythons = 'requires-python = ">=3.11,<3.15"'
    assert pythons in (REPO / "pyproject.toml").read_text()
    script = (REPO / "tools" / "setup_env.sh").read_text()
    assert script.count("(3, 11) <= sys.version_info < (3, 15)") == 2 and '_versions="3.11 to 3.14"' in script
    for page in ("README.md", "docs/installation.md"):
        assert "Python 3.11 to 3.14" in (REPO / page).read_text(), page
    assert re.search(r"3\.1\{1,2,3,4\}", (REPO / "tests" / "resolve.sh").read_text())


def test_import_from_any_folder(site, tmp_path):
    code = "import sgm, sgm.places as p; print(sgm.__file__); print(p.found_path('configs/demo_infer.yaml'))"
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(site))
    file, config = map(Path, done.stdout.splitlines())
    assert file == site / "sgm" / "__init__.py" and config == site / "sgm" / "shipped" / "configs" / "demo_infer.yaml"
    assert config.read_bytes() == (REPO / "configs" / "demo_infer.yaml").read_bytes()


def test_an_installed_copy_samples_the_demo(site, tmp_path):
    words = ["--prompt", "a small red star moves to the left", "--num-frames", "1", "--steps", "2"]
    done = run(command(site, "sample", *words), tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert "copy the file, edit these in the copy and name it" in done.stderr
    (video,) = (tmp_path / "outputs" / "demo").rglob("*.mp4")
    assert probe(video).frames == 1


def test_an_installed_copy_plans_training_and_says_what_it_lacks(site, tmp_path):
    done = run(command(site, "train", "configs/demo_lora.yaml", "--dry-run"), tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0 and "1300 iterations" in done.stdout, done.stderr
    assert "cache_dir: demo/cache/striped-heart" in done.stdout  # below the current folder, not inside the package
    done = run(command(site, "train", "configs/demo_lora.yaml"), tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "drawn by tools/" in done.stderr and "bash finetune.sh configs/demo_lora.yaml" in done.stderr
    assert not (site / "sgm" / "shipped" / "demo" / "clips").exists()


def test_help_says_how_it_was_called(site, tmp_path):
    for entry in ("sample", "train"):
        done = run(command(site, entry, "--help"), tmp_path, PYTHONPATH=str(site))
        assert done.returncode == 0 and done.stdout.startswith(f"usage: cogvideox-sat {entry} "), done.stderr
    done = run(command(site), tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 2 and "entry" in done.stderr


def test_an_editable_installation_is_the_checkout(tmp_path):
    build = f"import hatchling.build as b; print(b.build_editable({str(tmp_path)!r}))"
    done = run([sys.executable, "-c", build], REPO)
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.split()[-1]
    target = tmp_path / "site"
    done = run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], tmp_path)
    assert done.returncode == 0, done.stderr
    code = f"import site; site.addsitedir({str(target)!r}); import sgm.places as p; print(p.PROJECT, p.INSTALLED)"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.stdout.split() == [str(REPO), "False"], done.stderr


def test_a_missing_package_is_named_with_the_way_out(tmp_path):
    """With an interpreter that has nothing installed."""
    for entry in ("sample_video.py", "train_video.py"):
        done = run([sys.executable, "-S", str(REPO / entry), "--dry-run"], tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "lacks the package" in done.stderr and "bash inference.sh" in done.stderr
        assert f"pip install -r {REPO / 'requirements.txt'}" in done.stderr


def test_a_missing_package_of_the_tests_and_of_an_installed_copy(monkeypatch, capsys):
    def fail():
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    assert cli.exit_code(fail) == 2
    said = capsys.readouterr().err
    assert "`bash tests/run.sh`" in said and f"pip install -r {REPO / 'tests' / 'requirements.txt'}" in said
    monkeypatch.setattr(cli, "INSTALLED", True)
    assert cli.exit_code(fail) == 2
    said = capsys.readouterr().err
    assert "install this project again" in said and "bash" not in said

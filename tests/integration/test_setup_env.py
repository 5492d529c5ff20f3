"""tools/setup_env.sh, as inference.sh sources it: which Python it takes, and what it goes on from."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LATE_GREP = """#!/bin/bash
[[ "$1" == -v ]] || exec {grep} "$@"
lines="$(cat)"
sleep 0.5
{grep} "$@" <<<"$lines"
"""
PROGRAMS = ("bash", "cat", "cksum", "cut", "dirname", "grep", "mv", "rm")
OLD = """#!/bin/bash
says="import sys, platform; sys.version_info = (3, 10, 13, 'final', 0); platform.python_version = lambda: '3.10.13'"
if [[ "$1" == -P ]]; then
    shift
fi
if [[ "$1" == -c ]]; then
    exec {python} -c "$says
$2" "${{@:3}}"
fi
exec {python} "$@"
"""


def make_project(folder: Path) -> Path:
    """A project that requires nothing, so that its environment is made quickly."""
    (folder / "tools").mkdir(parents=True)
    shutil.copy(REPO / "tools" / "setup_env.sh", folder / "tools")
    (folder / "requirements.txt").write_text('# nothing\nabsent==1.0; sys_platform == "no system"\n')
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture(scope="module")
def first_set_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project that requires `probe` 1.0, set up, and what the script said."""
    project = make_project(tmp_path_factory.mktemp("made") / "project")
    add_package(project, "1.0")
    said = set_up(project)
    # The copies' pip passes for one that need not be renewed, which takes as long as all else.
    (pip,) = (project / ".venv").rglob("site-packages/pip/__init__.py")
    pip.write_text(re.sub(r"(?m)^__version__ = .*", '__version__ = "25.2"', pip.read_text()))
    return project, said


@pytest.fixture
def made(first_set_up: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of that project; the Python of a copied environment works in its new place."""
    return Path(shutil.copytree(first_set_up[0], tmp_path / "project", symlinks=True))


def source(project: Path, path: str | None = None, **environment: str) -> subprocess.Popen:
    """Source the script and print what it chose; only this Python's own folder is searched.

    pip asks no index: packages come from the project's folder `wheels`.
    """
    known = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    known |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels")}
    known |= {"PATH": path or f"{Path(sys.base_prefix, 'bin')}:/usr/bin:/bin"}
    script = 'set -euo pipefail; source tools/setup_env.sh; echo "$PYTHON"'
    return subprocess.Popen(
        ["bash", "-c", script], cwd=project, env=known | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def set_up(project: Path, **environment: str) -> str:
    """What it says on the way; the environment is complete after it, and if it was made now, its pip works."""
    command = source(project, **environment)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    assert out == f"{project / '.venv' / 'bin' / 'python'}\n"
    if "setting up" in err:
        subprocess.run([out.strip(), "-m", "pip", "--version"], check=True, capture_output=True)
    return err


def add_package(project: Path, version: str) -> None:
    """Require the package `probe`, of which a wheel is made."""
    (project / "wheels").mkdir(exist_ok=True)
    info = f"probe-{version}.dist-info"
    files = {
        "probe.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: probe\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(project / "wheels" / f"probe-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in (*files.items(), (f"{info}/RECORD", record)):
            wheel.writestr(name, text)
    (project / "requirements.txt").write_text(f"# what is needed\nprobe=={version}\n")


def probe(project: Path) -> str:
    words = [project / ".venv" / "bin" / "python", "-c", "import probe; print(probe.VERSION)"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def test_it_says_what_it_installs_and_does_so_once(first_set_up):
    project, said = first_set_up
    assert "setting up" in said and "with Python 3." in said and "1 packages" in said
    assert "probe-1.0" in said and "Installing collected packages: probe" in said
    assert probe(project) == "1.0" and set_up(project) == ""


def test_changed_requirements_are_installed(made):
    add_package(made, "2.0")
    assert "setting up" in set_up(made) and probe(made) == "2.0" and set_up(made) == ""


def test_what_tests_and_page_need_is_added_to_what_is_there(made):
    for folder, flag in (("tests", "WITH_TESTS"), ("sgm/serve", "WITH_SERVE")):
        (made / folder).mkdir(parents=True)
        (made / folder / "requirements.txt").write_text("# nothing\n")
        assert f"installing {folder}/requirements.txt" in set_up(made, **{flag: "1"})
        assert set_up(made, **{flag: "1"}) == set_up(made) == ""


def test_a_package_that_was_half_installed_is_installed_anew(made):
    """pip was killed while it unpacked: the package's own list of files, which it writes last, is not there yet."""
    (package,) = (made / ".venv").rglob("probe.py")
    package.write_text("")
    (package.parent / "probe-1.0.dist-info" / "RECORD").unlink()
    (made / ".venv" / ".complete").unlink()
    set_up(made)
    assert probe(made) == "1.0"


def test_a_failed_installation_is_no_environment(made, tmp_path):
    project = made
    (project / "requirements.txt").write_text("absent==1.0\n")
    late = tmp_path / "bin" / "grep"
    late.parent.mkdir()
    late.write_text(LATE_GREP.format(grep=shutil.which("grep")))
    late.chmod(0o755)
    command = source(project, f"{late.parent}:{Path(sys.base_prefix, 'bin')}:/usr/bin:/bin")
    out, err = command.communicate(timeout=120)
    assert command.returncode == 2 and out == ""
    why, said = err.rsplit("error: ", 1)
    assert "No matching distribution found for absent==1.0" in why, "pip's own lines come first, also its last ones"
    assert "the lines above say why" in said and "The same command goes on from here" in said
    add_package(project, "1.0")
    assert "setting up" in set_up(project) and probe(project) == "1.0"


def test_an_interrupted_start_is_repaired(project):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)  # killed before pip
    (project / ".venv" / "mine").write_text("")
    assert "setting up" in set_up(project)
    assert (project / ".venv" / "mine").exists()


def test_a_second_command_waits_for_the_first(made):
    complete = made / ".venv" / ".complete"
    complete.unlink()
    with (made / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first
        command = source(made)
        assert "waiting for it" in command.stderr.readline()
        assert not complete.exists()
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0 and str(made / ".venv") in out and complete.exists(), err


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A folder of programs in which `python3` says that it is Python 3.10.13."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    script = folder / "python3"
    script.write_text(OLD.format(python=sys.executable))
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize("how", ["found", "named", "absent"])
def test_an_unfit_python_is_one_line_before_anything_is_made(project, old_python, how):
    if how == "found":
        command, said = (
            source(project, str(old_python)),
            "Python 3.11 to 3.14 with its venv module is needed, and Python 3.10.13",
        )
    elif how == "named":
        command, said = source(project, PYTHON=str(old_python / "python3")), "is Python 3.10.13"
    else:
        command, said = source(project, PYTHON="/nowhere/python"), "PYTHON=/nowhere/python is not there"
    out, err = command.communicate(timeout=60)
    assert command.returncode == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert not (project / ".venv").exists()


def test_an_environment_of_an_old_python_is_named(project, old_python):
    folder = project.rename(project.with_name("my project"))
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(old_python / "python3", folder / ".venv" / "bin" / "python")
    command = source(folder)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 2 and out == ""
    assert f"{folder}/.venv has Python 3.10.13" in err and f"rm -r {project.parent}/my\\ project/.venv" in err


def test_a_package_that_is_gone_is_installed_again(made):
    subprocess.run([made / ".venv" / "bin" / "python", "-m", "pip", "uninstall", "--yes", "-q", "probe"], check=True)
    assert "setting up" in set_up(made) and probe(made) == "1.0"


def test_a_pip_that_was_half_renewed_is_made_anew(made):
    """Killed while it replaced itself: parts of two versions, and no list of files."""
    (record,) = (made / ".venv").rglob("pip-*.dist-info/RECORD")
    site = record.parents[1]
    record.parent.rename(site / f"~{record.parent.name[1:]}")
    (site / "pip" / "_internal" / "build_env").mkdir()
    (site / "pip" / "_internal" / "build_env" / "__init__.py").write_text("")
    (made / ".venv" / ".complete").unlink()
    assert "was half installed: ~ip" in set_up(made)
    assert not list(site.glob("~*")) and not (site / "pip" / "_internal" / "build_env").is_dir()


def test_the_python_of_an_environment_is_gone(made):
    (made / "mine").touch()
    for link in (made / ".venv" / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python3")
    assert "is gone; another one takes its place" in set_up(made)
    assert probe(made) == "1.0" and (made / "mine").exists()


def test_a_checkout_that_cannot_be_written(made):
    """Its environment is used if it lacks nothing. Run as root, who may write anywhere, this asks the script's own test."""
    script = made / "tools" / "setup_env.sh"
    script.write_text(script.read_text().replace('[[ -w "$_repo" &&', '[[ "" &&'))
    (made / ".venv" / ".complete").unlink()
    assert set_up(made).count("\n") == 1 and "is used as it is" in set_up(made)
    (made / "requirements.txt").write_text("probe==1.0\nabsent==1.0\n")
    command = source(made)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 2 and out == "" and "cannot be written" in err and err.count("\n") == 1


def test_the_environment_that_is_named_wins(made, tmp_path):
    """`.venv` named or activated, with another complete one about."""
    other = shutil.copytree(made / ".venv", tmp_path / "other", symlinks=True)
    inside = str(made / ".venv")
    for environment in (
        {"PYTHON": f"{inside}/bin/python", "VIRTUAL_ENV": str(other)},
        {"VIRTUAL_ENV": inside, "CONDA_PREFIX": str(other)},
        {"PYTHON": ".venv/bin/python", "CONDA_PREFIX": str(other)},
    ):
        assert set_up(made, **environment) == ""


def test_an_incomplete_interpreter_is_named_and_becomes_the_base(made, tmp_path):
    shutil.rmtree(made / ".venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = f"{tmp_path}/bare/bin/python"
    note = f"note: PYTHON={python} lacks probe, so {made}/.venv is used"
    said = set_up(made, PYTHON=python)
    assert note in said and f"({python})" in said
    assert set_up(made, PYTHON=python) == note + "\n"


def test_an_incomplete_active_environment_is_named_once(made, tmp_path):
    (made / ".venv" / ".complete").unlink()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    info = next((made / ".venv").rglob("probe-1.0.dist-info"))
    shutil.copytree(info, made / info.name)  # what lies in the current folder is not installed
    bare = str(tmp_path / "bare")
    assert f"the active environment ({bare}/bin/python) lacks probe" in set_up(made, VIRTUAL_ENV=bare)
    assert set_up(made, VIRTUAL_ENV=bare) == ""


def test_an_interpreter_with_everything_is_used_as_it_is(made, tmp_path):
    other = shutil.copytree(made / ".venv", tmp_path / "other", symlinks=True)
    shutil.rmtree(made / ".venv")
    for environment in ({"PYTHON": f"{other}/bin/python"}, {"VIRTUAL_ENV": str(other)}, {"CONDA_PREFIX": str(other)}):
        command = source(made, **environment)
        out, err = command.communicate(timeout=60)
        assert command.returncode == 0 and err == "" and out.splitlines()[0] == f"{other}/bin/python", err
    assert not (made / ".venv").exists()

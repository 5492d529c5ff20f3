"""Writers: complete or absent, readable by stock readers, no second copy of the weights, nothing that runs code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sgm.files import SaveError, atomic_write, remove_leftovers, require_space, unfinished_names, write_text
from sgm.weights.save import Deferred, save_pt, save_safetensors, size_of

REPO = Path(__file__).resolve().parents[2]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.randn(1000)
    return {
        "parameter": nn.Parameter(torch.randn(3, 4).t()),
        "view": wide[10:20].view(2, 5),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "half": torch.randn(7).half(),
        "bfloat": torch.randn(7).bfloat16(),
        "integers": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "double": torch.randn(3, dtype=torch.float64),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_a_pt_file_gives_back_what_it_was_given(tmp_path, mmap):
    plain = {"iteration": 10**20, "text": "ä", "nested": [1.5, None, (True, {"x": -1})]}
    save_pt(tmp_path / "a.pt", {"module": OrderedDict(some_tensors()), **plain})
    read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    module = read.pop("module")
    assert type(module) is OrderedDict and list(module) == list(some_tensors())
    for name, value in some_tensors().items():
        assert module[name].dtype == value.dtype and torch.equal(module[name], value), name
        assert not module[name].requires_grad
    assert read == plain
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_views_are_stored_without_the_buffer_they_come_from_and_tied_tensors_once(tmp_path):
    buffer = torch.randn(100_000)
    save_pt(tmp_path / "view.pt", {"a": buffer[:10], "b": buffer[20:30]})
    assert (tmp_path / "view.pt").stat().st_size < 4000
    save_pt(tmp_path / "tied.pt", {"a": buffer, "b": buffer})
    read = torch.load(tmp_path / "tied.pt", weights_only=True)
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert (tmp_path / "tied.pt").stat().st_size < 1.1 * buffer.nbytes
    assert size_of({"a": buffer, "b": [buffer], "c": 1}) == buffer.nbytes


@pytest.mark.parametrize("write", [save_pt, save_safetensors])
def test_deferred_tensors_are_made_in_order_and_not_kept(tmp_path, write):
    import weakref

    alive: list[weakref.ref] = []
    most = []

    def make(k: int) -> torch.Tensor:
        most.append(sum(ref() is not None for ref in alive))
        value = torch.full((1000,), float(k))
        alive.append(weakref.ref(value))
        return value

    tensors = {f"t{k}": Deferred((1000,), torch.float32, lambda k=k: make(k)) for k in range(6)}
    write(tmp_path / "file.pt", tensors)
    assert len(most) == 6 and max(most) <= 1
    if write is save_pt:
        read = torch.load(tmp_path / "file.pt", weights_only=True)
        assert [read[f"t{k}"][0].item() for k in range(6)] == list(range(6))


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path):
    with pytest.raises(SaveError, match="announced"):
        save_pt(tmp_path / "a.pt", {"a": Deferred((2,), torch.float32, lambda: torch.zeros(3))})
    assert not list(tmp_path.iterdir())


def test_safetensors_files_are_read_by_the_library(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", some_tensors(), {"rank": "4"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["rank"] == "4"
        assert set(file.keys()) == set(some_tensors())
        for name, value in some_tensors().items():
            assert torch.equal(file.get_tensor(name), value), name


@pytest.mark.parametrize("value", [torch.Size([1]), Path("x"), {1, 2}, b"x", torch.float16, nn.Linear(1, 1)])
def test_what_is_no_plain_value_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(SaveError, match=r"\['a'\]\[0\]"):
        save_pt(tmp_path / "a.pt", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_a_failing_writer_leaves_the_earlier_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "earlier")

    def full(file):
        file.write(b"half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SaveError, match="the disk is full.*unchanged.*another place"):
        atomic_write(tmp_path / "a", full)
    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "a", lambda file: 1 / 0)
    assert (tmp_path / "a").read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_no_folder_and_no_room_are_named(tmp_path):
    with pytest.raises(SaveError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "a", "x")
    with pytest.raises(SaveError, match="not enough room.*GiB"):
        require_space(tmp_path, 1 << 60)
    require_space(tmp_path, 1)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".partial-7").mkdir()
    (tmp_path / ".partial-7" / "x").write_text("x")
    (tmp_path / ".partial-9-latest").write_text("x")
    (tmp_path / "latest").write_text("3")
    assert len(remove_leftovers(tmp_path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


WORKER = """
import sys, time
from pathlib import Path
from sgm.files import unfinished_names
with unfinished_names(Path(sys.argv[1])) as prefix:
    for name in (f"{prefix}x.json", f".partial-{len(prefix)}-{prefix}x.mp4"):  # the latter while it is written
        (Path(sys.argv[1]) / "sample" / name).write_text("x")
    print(prefix, flush=True)
    time.sleep(60)
"""


def test_unfinished_files_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    command, place = [sys.executable, "-c", WORKER, str(tmp_path)], tmp_path / "sample"
    place.mkdir()
    dead, living = (subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        left, used = (process.stdout.readline().strip() for process in (dead, living))
        dead.kill()
        dead.wait()
        (place / ".partial-5-x.json").touch()  # without a lock: whoever wrote it may be at work
        with unfinished_names(tmp_path) as ours:
            assert len({left, used, ours}) == 3
            locks = {p.name for p in tmp_path.iterdir() if p.is_file()}
            assert locks == {f"{prefix.removesuffix('-')}.lock" for prefix in (used, ours)}
            kept = {f"{used}x.json", f".partial-{len(used)}-{used}x.mp4", ".partial-5-x.json"}
            assert {p.name for p in place.iterdir()} == kept
    finally:
        living.kill()
        living.wait()
    with unfinished_names(tmp_path):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["sample", ".partial-5-x.json"]


def test_a_real_write_error_of_the_system_is_reported_through_torchs_writer(tmp_path):
    """A file-size limit makes write(2) itself fail, in the middle of the archive."""
    script = """
        import resource, signal, sys
        import torch
        from sgm.files import SaveError
        from sgm.weights.save import save_pt, save_safetensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for write in (save_pt, save_safetensors):
            try:
                write(sys.argv[1], {"a": torch.zeros(9), "b": torch.randn(100_000)})
            except SaveError as error:
                print(error)
    """
    target = tmp_path / "weights"
    save_pt(target, {"a": 1})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(target)], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the file grew too large") == 2
    assert torch.load(target, weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]

"""Damage and Git LFS pointers: every file that was not written so is named, and what is whole is read as before."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.cache.dataset import FirstFrames
from sgm.cache.shards import ShardReader
from sgm.cache.store import CacheStore
from sgm.config import merge_yaml
from sgm.data.clips import caption_of
from sgm.data.sources import ListedClip, list_clips
from sgm.data.video_io import probe, read_image
from sgm.errors import SgmError
from sgm.inference.prompts import read_prompt_file
from sgm.inference.writer import read_latents, write_latents
from sgm.modules.encoders.modules import T5Tokenizer
from sgm.modules.encoders.t5 import read_config
from sgm.modules.encoders.t5_files import files_in
from sgm.weights import WeightsError, checksums, read_checkpoint
from sgm.weights.checksums import read_header, verifying
from sgm.weights.preflight import check_paths
from sgm.weights.release import read_transformer
from sgm.weights.save import save_pt, save_safetensors
from tests.sampling_tiny import REPO
from tools.inspect_weights import main as inspect_weights

STATE = {"a": torch.randn(3, 40), "empty": torch.zeros(0, 3), "b": torch.arange(5), "c": torch.ones(()).half()}
DEMO = REPO / "demo"


def listed(folder: Path) -> None:
    """Write a SHA256SUMS of what is in a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def write(kind: str, folder: Path) -> Path:
    """STATE in a file of its own folder; "listed": the plain file of another program, in a SHA256SUMS."""
    path = folder / kind / ("w.pt" if "pt" in kind else "w.safetensors")
    path.parent.mkdir()
    if kind == "listed":
        save_file(STATE, path)
        listed(path.parent)
    elif kind == "torch.pt":
        torch.save(STATE, path)
    else:
        save_pt(path, STATE) if kind == "our.pt" else save_safetensors(path, STATE, {"alpha": "4.0"})
    return path


def content_of(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    alpha = read_header(path).metadata.get("alpha") if path.suffix == ".safetensors" else None
    return read_checkpoint(path), alpha


@pytest.mark.parametrize("kind", ["our.pt", "torch.pt", "our.safetensors", "listed"])
def test_a_flipped_byte_is_seen_or_without_effect(tmp_path, kind):
    path = write(kind, tmp_path)
    whole, rng = path.read_bytes(), random.Random(kind)
    before, alpha = content_of(path)
    refused = 0
    for place in rng.sample(range(len(whole)), min(len(whole), 400)):
        path.write_bytes(flipped(whole, place, rng.randrange(8)))
        try:
            after, other = content_of(path)
        except WeightsError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
        assert other == alpha or b'"crc32"' not in path.read_bytes()  # the mark by which our files are known
    assert refused > (100 if "pt" in kind else 350)  # zip archives hold names and dates twice, and padding


def test_files_without_checksums_are_read(tmp_path):
    ours = write("our.safetensors", tmp_path)
    assert load_file(ours).keys() == STATE.keys()  # the library reads what we write
    changed = {name: t + 1 for name, t in STATE.items()}
    save_file(changed, tmp_path / "other.safetensors", {"alpha": "4.0", "crc32": "0" * 40})  # kept by another program
    torch.serialization.set_crc32_options(False)
    torch.save(changed, tmp_path / "none.pt")
    torch.serialization.set_crc32_options(True)
    torch.save(changed, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("other.safetensors", "none.pt", "legacy.pt"):
        read = read_checkpoint(tmp_path / name)
        assert all(torch.equal(read[n], changed[n]) for n in STATE), name


def test_large_parts_are_checked_while_they_are_used(tmp_path, monkeypatch):
    """At the block's end, before what the damage led to; at once where nothing overlaps."""
    monkeypatch.setattr(checksums, "_AT_ONCE", 100)
    path = write("our.safetensors", tmp_path)
    path.write_bytes(flipped(path.read_bytes(), read_header(path).begin + 200))
    with pytest.raises(WeightsError, match="w.safetensors .*a has another checksum"), verifying():
        assert read_checkpoint(path).keys() == STATE.keys()
        raise SgmError("it does not fit")
    with pytest.raises(WeightsError, match="a has another checksum"):
        read_checkpoint(path)
    with checksums.small_parts_alone():  # its facts are wanted, not its values
        assert read_checkpoint(path).keys() == STATE.keys()
    checks = checksums.Checks()
    with checks.collecting():
        assert read_checkpoint(path).keys() == STATE.keys()
    for _ in range(2):  # nobody goes on with damaged weights
        with pytest.raises(WeightsError, match="a has another checksum"):
            checks.wait()
    with verifying():
        assert read_checkpoint(write("our.pt", tmp_path)).keys() == STATE.keys()


def test_latents_and_cached_clips_are_checked(tmp_path):
    latents, cache = tmp_path / "latents.safetensors", tmp_path / "cache"
    write_latents(latents, torch.randn(2, 16, 4, 4), {"prompt": "x"})
    CacheStore(cache, {"a": 1}, "fp32").add("video", {"video:0": torch.randn(4, 2, 3, 3)})
    (shard,) = cache.glob("*.safetensors")

    def read_clips(frames: int = 4) -> torch.Tensor:
        store = CacheStore(cache, {"a": 1})
        return ShardReader(store.shards).read(FirstFrames([store.entry("video:0")], frames)[0])

    for path, read in ((latents, lambda: read_latents(latents)), (shard, read_clips), (shard, lambda: read_clips(1))):
        read()
        whole = path.read_bytes()
        for place in (whole.index(b'"data_offsets'), len(whole) - 5):
            path.write_bytes(flipped(whole, place + 2))
            with pytest.raises(SgmError, match=f"{path.name}.*(checksum|header is not|property|facts|data_)"):
                read()
        path.write_bytes(whole)


def damaged_demo(folder: Path) -> dict[str, Callable[[], object]]:
    """What reads each file of a copy of the demo that decides over a picture."""
    t5 = folder / "t5"
    readers: dict[str, Callable[[], object]] = {
        name: lambda: files_in(t5).read_weights()
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    }
    readers |= {
        "model.safetensors.index.json": lambda: files_in(t5), "config.json": lambda: read_config(t5 / "config.json"),
        "spiece.model": lambda: T5Tokenizer(t5 / "spiece.model"), "3d-vae.pt": lambda: read_checkpoint(folder / "vae" / "3d-vae.pt"),
        "latest": lambda: read_transformer(folder / "transformer"),
        "mp_rank_00_model_states.pt": lambda: read_transformer(folder / "transformer"),
    }  # fmt: skip
    return readers


def test_every_file_of_the_demo_is_checked(tmp_path, capsys):
    folder = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    assert inspect_weights(["--verify", str(folder)]) == 0
    for name, read in damaged_demo(folder).items():
        read()
        path = next(folder.rglob(name))
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, random.Random(name).randrange(len(whole))))
        with pytest.raises(WeightsError, match=f"{name} (is not what .*SHA256SUMS lists|cannot be read)"):
            read()
        assert inspect_weights(["--verify", str(path)]) == 2
        path.write_bytes(whole)
    (folder / "t5" / "spiece.model").unlink()
    assert inspect_weights(["--verify", str(folder)]) == 2
    said = capsys.readouterr().out
    assert "t5/spiece.model is missing" in said and "not verifiable" in said and "strips.jpg: no checksum" in said


# --- Git LFS pointers -------------------------------------------------------------------------------------------------

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


def cache_with(path: Path) -> CacheStore:
    CacheStore(path.parent, {"a": 1})
    path.write_text(POINTER)
    return CacheStore(path.parent, {"a": 1})


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("w.pt", read_checkpoint),
        ("w.safetensors", read_checkpoint),
        ("w.safetensors", lambda path: check_paths({}, str(path))),
        ("w.pt", lambda path: check_paths({"first_stage_config": {"params": {"ckpt_path": str(path)}}}, None)),
        ("w.safetensors", lambda path: check_paths({}, None, [f"{path}:0.5"])),
        ("latest", lambda path: read_transformer(path.parent)),
        ("mp_rank_00_model_states.pt", lambda path: check_paths({}, str(path.parent))),
        ("c.yaml", lambda path: merge_yaml([path])),
        ("prompts.txt", read_prompt_file),
        ("list.csv", list_clips),
        ("list.jsonl", list_clips),
        ("shard.tar", list_clips),
        ("shard.tar", lambda path: list_clips(path.parent)),
        ("a.mp4", probe),
        ("a.png", read_image),
        ("a.txt", lambda path: caption_of(ListedClip(str(path.with_suffix(".mp4"))))),
        ("video-1.safetensors", cache_with),
        ("cache.json", lambda path: CacheStore(path.parent, {"a": 1})),
        ("files-00000.jsonl", cache_with),
        *((f"t5/{name}", lambda path: T5Tokenizer(files_in(path.parent).vocabulary))
          for name in ("spiece.model", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")),
    ],
)  # fmt: skip
def test_pointers_are_named_with_the_way_out(tmp_path, name, read):
    if name.startswith("t5/"):
        shutil.copytree(DEMO / "t5", tmp_path / "t5")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(SgmError, match=f"{Path(name).stem}.*Git LFS pointer.*`git lfs pull`"):
        read(tmp_path / name)

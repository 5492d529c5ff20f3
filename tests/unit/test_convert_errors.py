"""Bad input of the converters: exit status 2, one clear error, nothing half-written."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sgm.convert.lazy import ConvertError
from sgm.convert.output import push_to_hub, whole_folder
from sgm.files import SaveError
from sgm.modules.encoders.modules import FrozenT5Embedder, T5Tokenizer
from sgm.weights.release import NETWORK_PREFIX
from sgm.weights.save import save_pt, save_safetensors
from tests.convert_tiny import adapter_matrices, rewrite
from tools import convert_weight_hf2sat, convert_weight_sat2hf, inspect_weights

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hf(sat_release: Path) -> Path:
    out = sat_release.parent / "hf"
    arguments = [*whole(sat_release), "--output_path", str(out), "--fp32", "--max_shard_size", "1MB"]
    assert convert_weight_sat2hf.main(arguments) == 0
    return out


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def whole(sat_release: Path) -> list[str]:
    return ["--transformer_ckpt_path", str(sat_release / "transformer"), "--vae_ckpt_path", str(sat_release / "vae/3d-vae.pt"),
            "--text_encoder_path", str(sat_release / "t5")]  # fmt: skip


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: Any, *words: str) -> None:
    """`main` exits with 2 and one error that holds `words`; the output folder and its neighbours are untouched."""
    out = Path(arguments[arguments.index("--output_path") + 1])
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 1 and "Traceback" not in printed.err and not printed.out
    assert all(word in printed.err for word in words), printed.err
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize(
    "name", ["tokenizer/spiece.model", "text_encoder/config.json", "vae/diffusion_pytorch_model-00001-of-*.safetensors"]
)
def test_git_lfs_pointers_are_not_converted(copy: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    (path,) = copy.glob(name)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    arguments = ["--input_path", str(copy), "--output_path", str(tmp_path / "o")]
    refused(convert_weight_hf2sat.main, arguments, capsys, f"{path} is a Git LFS pointer", "`git lfs pull`")


def test_a_tokenizer_json_alone_goes_along(copy: Path, tmp_path: Path) -> None:
    spiece = copy / "tokenizer" / "spiece.model"
    before = T5Tokenizer(spiece)
    before._tokenizer.save(str(spiece.with_name("tokenizer.json")))
    spiece.unlink()
    assert convert_weight_hf2sat.main(["--input_path", str(copy), "--output_path", str(tmp_path / "o")]) == 0
    made = FrozenT5Embedder(str(tmp_path / "o" / "t5-v1_1-xxl")).tokenizer
    assert made.encode("a small ﬁsh") == before.encode("a small ﬁsh")


def test_what_a_pipeline_lacks_is_named(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    refused(convert_weight_sat2hf.main, [*whole(sat_release)[:2], "--output_path", str(tmp_path / "o")], capsys,
            "--vae_ckpt_path", "--text_encoder_path", "--partial")  # fmt: skip


def test_the_demo_s_vae_is_none_of_diffusers_and_partial_leaves_it_out(tmp_path: Path, capsys: Any) -> None:
    """Its encoder and decoder differ in width, for which diffusers has one list."""
    demo, main = REPO / "demo", convert_weight_sat2hf.main
    vae = ["--vae_ckpt_path", str(demo / "vae" / "3d-vae.pt")]
    out = ["--output_path", str(tmp_path / "o")]  # of the shipped configurations one names the demo's weights
    others = ["--transformer_ckpt_path", str(demo / "transformer"), "--text_encoder_path", str(demo / "t5")]
    for arguments in ([*others, *vae, *out], [*vae, *out, "--partial"]):
        refused(main, arguments, capsys, "encoder are [32, 64, 64, 64]", "decoder [64, 64, 64, 64]",
                "AutoencoderKLCogVideoX has one list")  # fmt: skip
    refused(main, [*others, *vae, *out], capsys, "With --partial the transformer and the text encoder are converted")
    assert main([*others, *vae, *out, "--partial"]) == 0
    said = capsys.readouterr().out
    assert "vae: left out: " in said and "no pipeline: vae absent" in said
    made = tmp_path / "o"
    assert sorted(path.name for path in made.iterdir()) == ["text_encoder", "tokenizer", "transformer"]
    config = json.loads((made / "transformer" / "config.json").read_text())
    assert (config["sample_width"], config["max_text_seq_length"]) == (24, 64)


def test_wrong_family(sat_release: Path, hf: Path, tmp_path: Path, capsys: Any) -> None:
    out = ["--output_path", str(tmp_path / "o"), "--partial"]
    to_hf, to_sat = convert_weight_sat2hf.main, convert_weight_hf2sat.main
    vae = str(sat_release / "vae" / "3d-vae.pt")
    refused(to_hf, ["--transformer_ckpt_path", vae, *out], capsys, "3D VAE, not a transformer")
    refused(to_hf, ["--transformer_ckpt_path", str(hf), *out], capsys, "diffusers", "convert_weight_hf2sat.py")
    checkpoint = str(sat_release / "transformer" / "1000" / "mp_rank_00_model_states.pt")
    refused(to_hf, ["--vae_ckpt_path", checkpoint, *out], capsys, "holds no CogVideoX autoencoder")
    refused(to_hf, ["--transformer_ckpt_path", str(tmp_path / "none"), *out], capsys, "no transformer weights")
    refused(to_sat, ["--input_path", str(sat_release / "transformer"), *out], capsys, "SAT checkpoint already")
    refused(to_sat, ["--input_path", vae, *out], capsys, "is no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(to_sat, ["--input_path", str(empty), *out], capsys, "not a whole diffusers pipeline")


def test_component_of_another_model(copy: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--input_path", str(copy), "--output_path", str(tmp_path / "o")]
    file = copy / "transformer" / "config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"num_layers": 3}))
    refused(convert_weight_hf2sat.main, arguments, capsys, "missing (18)", "adaLN_modulations.2.")
    for odd in ("2", -1, 1 << 40, None, True):
        file.write_text(json.dumps(good | {"num_layers": odd}))
        refused(convert_weight_hf2sat.main, arguments, capsys, "config.json is damaged", "num_layers")
    file.write_text(json.dumps(good | {"_class_name": "FluxTransformer2DModel"}))
    refused(convert_weight_hf2sat.main, arguments, capsys, "FluxTransformer2DModel", "another kind of model")
    file.write_text(json.dumps(good)[:40])
    refused(convert_weight_hf2sat.main, arguments, capsys, "config.json cannot be read")
    file.write_text(json.dumps(good))
    text = json.loads((copy / "text_encoder" / "config.json").read_text())
    (copy / "text_encoder" / "config.json").write_text(json.dumps(text | {"num_layers": 5}))
    refused(convert_weight_hf2sat.main, arguments, capsys, "missing encoder.block.2.")
    shutil.rmtree(copy / "tokenizer")
    refused(convert_weight_hf2sat.main, arguments, capsys, "no tokenizer", "--partial")


def test_missing_and_truncated_shards(copy: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--input_path", str(copy), "--output_path", str(tmp_path / "o")]
    shards = sorted((copy / "transformer").glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    refused(convert_weight_hf2sat.main, arguments, capsys, str(shards[1]), "truncated")
    shards[1].unlink()
    refused(convert_weight_hf2sat.main, arguments, capsys, "lacks 1 of", shards[1].name)
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    placed = json.loads(index.read_text())
    placed["weight_map"][next(iter(placed["weight_map"]))] = "../../secret.safetensors"
    index.write_text(json.dumps(placed))
    refused(convert_weight_hf2sat.main, arguments, capsys, "outside its folder")


def test_truncated_and_unsafe_checkpoints(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    whole_file = (sat_release / "transformer" / "1000" / "mp_rank_00_model_states.pt").read_bytes()
    file = tmp_path / "w.pt"
    arguments = ["--transformer_ckpt_path", str(file), "--output_path", str(tmp_path / "o"), "--partial"]
    for content in (whole_file[: len(whole_file) // 2], b"", os.urandom(5000)):
        file.write_bytes(content)
        refused(convert_weight_sat2hf.main, arguments, capsys, str(file))
    file.write_bytes(pickle.dumps({"module": Hostile()}))
    refused(convert_weight_sat2hf.main, arguments, capsys, "not a file that torch.save wrote with tensors alone")
    assert not (tmp_path / "run").exists()


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch run",)


def test_incomplete_transformer_lists_what_is_missing(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    gone = NETWORK_PREFIX + "transformer.layers.1.mlp.dense_h_to_4h.bias"
    file = rewrite(
        sat_release / "transformer", tmp_path / "in" / "w.pt", lambda m: {n: t for n, t in m.items() if n != gone}
    )
    refused(convert_weight_sat2hf.main, ["--transformer_ckpt_path", str(file), "--output_path", str(tmp_path / "o"), "--partial"],
            capsys, "missing (1): transformer.layers.1.mlp.dense_h_to_4h.bias")  # fmt: skip


def test_values_beyond_half_precision(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    name = NETWORK_PREFIX + "time_embed.0.weight"

    def enlarge(module: dict[str, torch.Tensor]) -> None:
        module[name] = module[name].clone()
        module[name][0, 0] = 70000.0

    file = rewrite(sat_release / "transformer", tmp_path / "in" / "w.pt", enlarge)
    arguments = ["--transformer_ckpt_path", str(file), "--output_path", str(tmp_path / "o"), "--partial"]
    refused(convert_weight_sat2hf.main, arguments, capsys, "time_embedding.linear_1.weight", "70000", "65504", "--bf16")
    assert convert_weight_sat2hf.main([*arguments, "--bf16"]) == 0


def test_adapters_that_do_not_fit(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    out = ["--output_path", str(tmp_path / "o"), "--partial"]
    base = ["--transformer_ckpt_path", str(sat_release / "transformer"), *out]
    to_hf = convert_weight_sat2hf.main

    def adapter(name: str, matrices: dict[str, torch.Tensor], **facts: Any) -> str:
        save_pt(inputs / name, {"module": matrices, "lora": {"alpha": 1.0, **facts}})
        return str(inputs / name)

    good = adapter("good.pt", adapter_matrices(rank=4))
    refused(to_hf, ["--transformer_ckpt_path", good, *out], capsys, "without base weights", "--lora", "--lora_only")
    refused(to_hf, [*base, "--lora", adapter("rank.pt", adapter_matrices(rank=4), rank=8)], capsys, "rank 8", "rank 4")
    mixed = adapter_matrices(rank=4) | {n: t for n, t in adapter_matrices(rank=2).items() if "layers.1." in n}
    refused(to_hf, [*base, "--lora", adapter("mixed.pt", mixed)], capsys, "mixes ranks [2, 4]")
    refused(
        to_hf, [*base, "--lora", adapter("wide.pt", adapter_matrices(width=96))], capsys, "another model", "[576, 192]"
    )
    refused(
        to_hf,
        [*base, "--lora", adapter("deep.pt", adapter_matrices(layers=3))],
        capsys,
        "transformer.layers.2.",
        "lacks",
    )
    lonely = {n: t for n, t in adapter_matrices().items() if not n.endswith("dense.matrix_B.0")}
    refused(to_hf, [*base, "--lora", adapter("lonely.pt", lonely)], capsys, "each A needs its B")
    refused(to_hf, [*base, "--lora", f"{good}:strong"], capsys, "PATH:SCALE", "strong")
    refused(to_hf, [*base, "--lora_only"], capsys, "holds no LoRA matrices")
    refused(to_hf, [*base, "--lora", str(inputs / "none.pt")], capsys, "no adapter at")
    refused(to_hf, [*base, "--lora", adapter("word.pt", adapter_matrices(), alpha="two")], capsys, "no numbers", "two")
    peft = {
        f"transformer.transformer_blocks.0.attn1.to_out.0.lora_{k}.weight": torch.zeros(s)
        for k, s in (("A", (4, 192)), ("B", (192, 3)))
    }
    save_safetensors(inputs / "peft.safetensors", peft)
    refused(
        convert_weight_hf2sat.main,
        ["--lora_only", "--input_path", str(inputs / "peft.safetensors"), *out],
        capsys,
        "ranks are [4, 3]",
    )


def test_existing_output_is_kept_unless_overwrite(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o"
    arguments = ["--transformer_ckpt_path", str(sat_release / "transformer"), "--output_path", str(out), "--partial"]
    out.mkdir()
    assert convert_weight_sat2hf.main(arguments) == 0  # an empty folder is no one's
    (out / "mine.txt").write_text("mine")
    refused(convert_weight_sat2hf.main, arguments, capsys, "exists already", "--overwrite")
    assert (out / "mine.txt").read_text() == "mine"
    assert convert_weight_sat2hf.main([*arguments, "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and sorted(tmp_path.iterdir()) == [out]


def test_output_must_not_hold_the_input(sat_release: Path, capsys: Any) -> None:
    arguments = [*whole(sat_release), "--output_path", str(sat_release), "--overwrite"]
    refused(convert_weight_sat2hf.main, arguments, capsys, "lies in the output folder")
    assert (sat_release / "transformer" / "latest").is_file()


def test_full_disk_before_and_while_writing(
    sat_release: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*whole(sat_release), "--output_path", str(tmp_path / "o")]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refused(convert_weight_sat2hf.main, arguments, capsys, "not enough room", "1.0 MiB are free")
    monkeypatch.undo()
    real, synced = os.fsync, []

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 8:  # in the middle of the second component
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    refused(convert_weight_sat2hf.main, arguments, capsys, "the disk is full")
    assert len(synced) == 8


def test_unwritable_place(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    arguments = [*whole(sat_release), "--output_path", str(tmp_path / "file" / "o")]
    capsys.readouterr()
    assert convert_weight_sat2hf.main(arguments) == 2
    assert "cannot write" in capsys.readouterr().err


def test_failing_exchange_keeps_the_earlier_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "o"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def stubborn(self: Path, other: Path) -> Path:
        if self.name == ".partial-o":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(SaveError, match="Permission denied"), whole_folder(target, overwrite=True, inputs={}):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["o"] and (target / "old").read_text() == "old"


def test_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def fill(ready: Any) -> None:
        with whole_folder(tmp_path / "o", overwrite=False, inputs={}) as folder:
            (folder / "config.json").write_text("{}")
            ready.set()
            time.sleep(60)

    processes = multiprocessing.get_context("fork")
    ready = processes.Event()
    run = processes.Process(target=fill, args=(ready,))
    run.start()
    assert ready.wait(60)
    run.kill()
    run.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock-o", ".partial-o"]
    with whole_folder(tmp_path / "o", overwrite=False, inputs={}) as folder:
        assert not list(folder.iterdir())
        (folder / "new").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    (tmp_path / "o").rename(tmp_path / ".replaced-o")  # killed while the folders were exchanged: it comes back
    with pytest.raises(ConvertError, match="--overwrite"), whole_folder(tmp_path / "o", overwrite=False, inputs={}):
        pass
    assert (tmp_path / "o" / "new").is_file() and [p.name for p in tmp_path.iterdir()] == ["o"]


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "o", overwrite=True, inputs={}) as folder:
        (folder / "1").write_text("")
        with (
            pytest.raises(ConvertError, match="another command is writing .*/o just now"),
            whole_folder(tmp_path / "o", overwrite=True, inputs={}),
        ):
            raise AssertionError("it was let in")
        (folder / "2").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["1", "2"]


def test_bad_sizes_and_configurations(sat_release: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*whole(sat_release), "--output_path", str(tmp_path / "o")]
    for text in ("many", "0", "-1GB", "GB"):
        refused(convert_weight_sat2hf.main, [*arguments, f"--max_shard_size={text}"], capsys, "no size", text)
    (tmp_path / "c.yaml").write_text("args: {}\n")
    refused(convert_weight_sat2hf.main, [*arguments, "--config", str(tmp_path / "c.yaml")], capsys, "network_config")


def test_upload_that_fails_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool, private: bool | None) -> Any:
            calls.append(name)
            if name == "offline":
                raise ConnectionError("no route to host")
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, folder_path: str, repo_id: str) -> None:
            calls.append((folder_path, repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(tmp_path / "mine") == "uploaded: me/mine"
    assert calls == ["mine", (str(tmp_path / "mine"), "me/mine")]
    with pytest.raises(ConvertError, match="offline is complete, but the upload to the hub failed: no route to host"):
        push_to_hub(tmp_path / "offline")


# --- inspection ------------------------------------------------------------------------------------------------------


def inspected(capsys: Any, *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert inspect_weights.main(list(arguments)) == status
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if status else printed.out


def test_inspection_of_every_layout(sat_release: Path, hf: Path, tmp_path: Path, capsys: Any) -> None:
    import hashlib

    text = inspected(capsys, str(sat_release / "transformer"))
    file = sat_release / "transformer" / "1000" / "mp_rank_00_model_states.pt"
    assert (
        "CogVideoX transformer of width 192 with 2 layers (sine positions) in SAT's layout" in text
        and "iteration 1000" in text
    )
    assert "float32" in text and hashlib.sha256(file.read_bytes()).hexdigest() in text
    text = inspected(capsys, str(hf), "--no_hash")
    assert "in diffusers' layout" in text and "T5 text encoder" in text and "VAE in diffusers' layout" in text
    assert "sha256" not in text and "missing" not in text and "does not belong" not in text
    save_pt(tmp_path / "a.pt", {"module": adapter_matrices(rank=4), "lora": {"rank": 4, "alpha": 2.0}, "iteration": 12})
    text = inspected(capsys, str(tmp_path / "a.pt"))
    assert (
        "LoRA adapter" in text
        and "rank 4, alpha 2 (stated in the file), on attention of 2 layers" in text
        and "iteration 12" in text
    )
    peft = {f"transformer_blocks.0.attn1.to_out.0.lora_{k}.weight": torch.zeros(4, 4) for k in "AB"}
    save_safetensors(tmp_path / "p.safetensors", peft)
    assert "rank 4, alpha 4 (assumed, the file does not say), on attention of 1 layers" in inspected(
        capsys, str(tmp_path / "p.safetensors")
    )
    save_safetensors(tmp_path / "p.safetensors", peft, {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
    assert "rank 4, alpha 8 (stated in the file), on" in inspected(capsys, str(tmp_path / "p.safetensors"))
    odd = rewrite(
        sat_release / "transformer",
        tmp_path / "o.pt",
        lambda m: m.update({NETWORK_PREFIX + "odd.weight": torch.zeros(1)}),
    )
    assert "does not belong (1): odd.weight" in inspected(capsys, str(odd))
    save_safetensors(tmp_path / "x.safetensors", {"some.tensor": torch.zeros(2, dtype=torch.int8)})
    assert "unknown tensors" in inspected(capsys, str(tmp_path / "x.safetensors"))


def test_inspection_tells_a_decoder_s_own_width(capsys: Any) -> None:
    text = inspected(capsys, str(REPO / "demo" / "vae"), "--no_hash")
    assert "width 32 x [1, 2, 2, 2]" in text and "decoder's levels are [64, 64, 64, 64]" in text
    assert "missing" not in text and "wrong shape" not in text


def test_inspection_is_safe(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {"pickle.pt": pickle.dumps(Hostile()), "short.safetensors": b"\xff" * 7, "empty.pt": b"", "text.pt": b"hello",
                "header.safetensors": (1 << 60).to_bytes(8, "little") + b"{}"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert name in inspected(capsys, str(tmp_path / name), status=2)
        (tmp_path / name).unlink()
    torch.save({"module": Hostile()}, tmp_path / "zip.pt")
    assert "posix.system" in inspected(capsys, str(tmp_path / "zip.pt"), status=2) and not (tmp_path / "run").exists()
    (tmp_path / "zip.pt").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "holds no weight files" in inspected(capsys, str(tmp_path), status=2)
    assert "no file or folder" in inspected(capsys, str(tmp_path / "none"), status=2)

"""Bundling the demo: half precision in the release's layout, hashes, refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sgm.models.small_decoder import decoder_fingerprint, save_small_decoder, vae_tensors
from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes
from sgm.weights import read_checkpoint
from sgm.weights.release import read_transformer
from tests.training_tiny import T5, write_release
from tools.demo.bundle import main


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


def bundle(release: Path, out: Path, *extra: str) -> int:
    parts = [
        "--transformer",
        str(release / "transformer"),
        "--vae",
        str(release / "vae" / "3d-vae.pt"),
        "--text",
        str(T5),
    ]
    return main([*parts, "--out", str(out), *extra])


def test_parts_lie_in_the_releases_layout_in_half_precision(release, tmp_path):
    assert bundle(release, tmp_path / "demo") == 0
    before, after = read_transformer(release / "transformer"), read_transformer(tmp_path / "demo" / "transformer")
    assert after.iteration == before.iteration and after.network.keys() == before.network.keys()
    for name, value in after.network.items():
        torch.testing.assert_close(value.float(), before.network[name], atol=1e-7, rtol=1e-3, msg=name)
        assert value.dtype == torch.float16
    vae = read_checkpoint(tmp_path / "demo" / "vae" / "3d-vae.pt")["state_dict"]
    assert vae and all(t.dtype == torch.float16 for t in vae.values())
    assert (tmp_path / "demo" / "t5" / "spiece.model").read_bytes() == (T5 / "spiece.model").read_bytes()


def test_hashes_are_those_of_the_files(release, tmp_path):
    assert bundle(release, tmp_path / "demo") == 0 and bundle(release, tmp_path / "demo") == 0  # again over the first
    lines = (tmp_path / "demo" / "SHA256SUMS").read_text().splitlines()
    named = dict(reversed(line.split("  ")) for line in lines)
    assert {"transformer/latest", "vae/3d-vae.pt", "t5/config.json"} <= named.keys()
    for name, digest in named.items():
        assert hashlib.sha256((tmp_path / "demo" / name).read_bytes()).hexdigest() == digest


def test_values_beyond_half_precision_are_refused(release, tmp_path, capsys):
    file = release / "vae" / "3d-vae.pt"
    state = dict(read_checkpoint(file)["state_dict"])
    state["encoder.conv_in.conv.bias"] = torch.full_like(state["encoder.conv_in.conv.bias"], 1e6)
    torch.save({"state_dict": state}, tmp_path / "3d-vae.pt")
    arguments = ["--transformer", str(release / "transformer"), "--vae", str(tmp_path / "3d-vae.pt"), "--text", str(T5)]
    assert main([*arguments, "--out", str(tmp_path / "demo")]) == 2
    assert "encoder.conv_in.conv.bias" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "demo"), "--dtype", "bf16"]) == 0


def test_a_text_folder_without_tokenizer_is_refused(release, tmp_path, capsys):
    assert bundle(release, tmp_path / "demo", "--text", str(tmp_path)) == 2
    assert "spiece.model" in capsys.readouterr().err


def test_a_small_decoder_is_added_to_its_vae_and_to_no_other(release, tmp_path, capsys):
    out, file = tmp_path / "demo", tmp_path / "small.safetensors"
    assert bundle(release, out) == 0
    vae = decoder_fingerprint(vae_tensors(out / "vae" / "3d-vae.pt"))
    for origin, code in ((vae, 0), ("another", 2)):
        save_small_decoder(file, SmallDecoder(SmallDecoderSizes((4, 4, 4), (0, 0, 1))), origin, torch.float16)
        assert main(["--small-decoder", str(file), "--out", str(out)]) == code
    assert "was learned from another VAE" in capsys.readouterr().err
    assert "vae/small_decoder.safetensors" in (out / "SHA256SUMS").read_text()
    assert bundle(release, out) == 0 and not (out / "vae" / "small_decoder.safetensors").exists()  # of the old VAE

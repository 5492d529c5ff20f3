"""A text-to-video model learns to begin with a picture: LoRA and its patch projection, trained, saved, sampled, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample_video
from sgm.config import ConfigError, load_run_config
from sgm.convert.lazy import ConvertError
from sgm.convert.lora_files import open_adapter, write_peft
from sgm.models.loading import load_network, replace_adapters
from sgm.modules.transformer.patch_embed import PATCHES
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.util import instantiate_from_config
from sgm.weights import WeightsError
from sgm.weights.release import Adapter, read_transformer
from tests.sampling_tiny import REPO
from tests.training_tiny import configuration, write_clips, write_yaml
from tools.demo.bundle_adapter import main as bundle_adapter

OVERLAY = REPO / "configs" / "image_to_video.yaml"
RATE = 0.01


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 2)


@pytest.fixture(scope="module")
def content(release: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = configuration(
        release, clips, tmp_path_factory.mktemp("save"), lora=4, train_iters=4, save_interval=2, lora_only=True,
        save_merged=True, lr_decay_style="constant", warmup=0.0,
    )  # fmt: skip
    made["model"]["sampler_config"]["params"]["num_steps"] = 2
    made["deepspeed"]["optimizer"]["params"]["lr"] = RATE
    return made


def run(folder: Path, content: dict[str, Any], *overrides: str, overlay: Path | None = OVERLAY) -> Path:
    """Train in this process; the run's folder."""
    files = [write_yaml(folder / "config.yaml", content), *([overlay] if overlay else [])]
    assert train(load_run_config(files, TrainArgs, overrides=overrides)) == 0
    return max(Path(content["args"]["save"]).iterdir(), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def trained(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("run"), content)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "fox.png"
    Image.linear_gradient("L").resize((32, 16)).save(file)
    return file


def sample(out: Path, *words: Any) -> torch.Tensor:
    """Latents of one sample."""
    asked = [*map(str, words), "--device", "cpu", "--only-save-latents", "--output-dir", str(out)]
    assert sample_video.main(asked) == 0
    (file,) = out.rglob("*latents.safetensors")
    return load_file(file)["latents"]


def test_the_projection_is_trained_whole_and_saved_with_the_matrices(trained: Path, release: Path) -> None:
    state = read_transformer(trained).network
    parts = {name for name in state if ".matrix_" not in name}
    assert parts == {PATCHES, "mixins.patch_embed.proj.bias"} and len(parts) < len(state)
    before = read_transformer(release / "transformer").network[PATCHES]
    own, added = state[PATCHES].split(16, dim=1)
    rate = 0.1 * RATE  # also_trainable_rate, and Adam goes by about the rate in each of four steps
    assert not torch.equal(own, before) and (own - before).abs().max() < 6 * rate
    assert 0 < added.abs().max() < 6 * rate


def test_the_adapter_over_its_base_is_the_merged_network(
    trained: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [trained / "infer.yaml", "--prompt", f"a boat@@{picture}"]
    found = sample(tmp_path / "adapter", *asked)
    torch.testing.assert_close(sample(tmp_path / "again", *asked, "--merge-lora"), found, atol=1e-5, rtol=1e-4)
    merged = ["--set", "args.lora=[]", "--load", trained / "merged"]
    torch.testing.assert_close(sample(tmp_path / "merged", *asked, *merged), found, atol=1e-5, rtol=1e-4)
    other = sample(tmp_path / "other", *asked[:1], "--prompt", f"a boat@@{REPO / 'demo' / 'strips.jpg'}")
    assert not torch.equal(found, other)  # the picture counts
    assert sample_video.main([*map(str, asked), "--lora", f"{trained}:0.5", "--device", "cpu"]) == 2
    assert f"{PATCHES} was trained whole and has no scale" in capsys.readouterr().err


def test_a_network_takes_another_adapter_with_its_parts(
    content: dict[str, Any], trained: Path, release: Path, tmp_path: Path
) -> None:
    config = load_run_config([write_yaml(tmp_path / "config.yaml", content), OVERLAY], TrainArgs)
    section = config.model["network_config"]
    section["params"]["modules"].pop("lora_config")
    with torch.device("meta"):
        network = instantiate_from_config(section)
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    first, last = (Adapter(str(trained / step)) for step in ("2", "4"))
    loaded = load_network(network, release / "transformer", allow_absent=True, adapters=[first], **place)
    for adapter in (last, first):
        replace_adapters(network, loaded, release / "transformer", [adapter])
        assert torch.equal(network.get_parameter(PATCHES), read_transformer(adapter.path).network[PATCHES])
    with pytest.raises(WeightsError, match=f"{PATCHES} is .64, 16, 2, 2. in the base.*needs an adapter with that part"):
        replace_adapters(network, loaded, release / "transformer", [])
    assert torch.equal(network.get_parameter(PATCHES), read_transformer(first.path).network[PATCHES])
    with pytest.raises(WeightsError, match="was trained whole by .*; only one of them can be used"):
        replace_adapters(network, loaded, release / "transformer", [first, last])


def test_a_run_goes_on_bit_for_bit(content: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    kept = {name: value.clone() for name, value in read_transformer(trained).network.items()}
    assert run(tmp_path, content, f"args.resume={trained / '2'}") == trained
    assert all(torch.equal(value, kept[name]) for name, value in read_transformer(trained).network.items())


def test_other_tools_say_what_they_cannot_do_with_it(
    trained: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConvertError, match=f"trained whole .*{PATCHES}"):
        write_peft(tmp_path, open_adapter(trained), None, fold_scale=False)
    assert bundle_adapter(["i2v", str(trained / "4"), "--out", str(tmp_path)]) == 0
    assert read_transformer(tmp_path / "i2v").network[PATCHES].dtype == torch.float16
    assert bundle_adapter(["student", str(trained / "4"), "--out", str(tmp_path)]) == 2
    assert bundle_adapter(["i2v", str(release / "transformer"), "--out", str(tmp_path)]) == 2
    assert "no distilled adapter alone" in (said := capsys.readouterr().err) and "no adapter alone (args" in said


@pytest.mark.parametrize(
    ("overlay", "overrides", "said"),
    [
        (OVERLAY, ["args.add_image_channels=false"], "wrong shape.*args.add_image_channels: True"),
        (None, ["args.add_image_channels=true"], "args.add_image_channels is for models that begin with a picture"),
        (OVERLAY, ["model.also_trainable_prefixes=[mixins.patch_embed]"], "no trainable parameter's name begins with"),
    ],
    ids=["channels are not added unasked", "a model without pictures", "no such part"],
)
def test_wrong_wishes(
    content: dict[str, Any], tmp_path: Path, overlay: Path | None, overrides: list[str], said: str
) -> None:
    with pytest.raises((ConfigError, WeightsError), match=f"(?s){said}"):
        run(tmp_path, content, *overrides, overlay=overlay)


def test_an_adapter_is_no_base(content: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds a LoRA adapter without base weights"):
        run(tmp_path, content, f"args.load={trained}", f"args.save={tmp_path / 'save'}")
    assert list((tmp_path / "save").iterdir()) == [], "no folder of a run that did not begin"


def test_an_adapter_with_parts_of_another_shape_is_named(capsys: Any, tmp_path: Path) -> None:
    asked = ["configs/demo_infer.yaml", "--lora", "demo/i2v", "--prompt", "x", "--output-dir", str(tmp_path)]
    assert sample_video.main(asked) == 2
    said = capsys.readouterr().err
    assert "demo/i2v/lora.safetensors does not fit" in said and "demo_i2v_infer.yaml" in said

"""Which adapters a run samples with: the student under few_steps, however it is spelt, and none of them twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.inference.adapters import with_adapters
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.weights import WeightsError
from sgm.weights.hub_adapter import choose_file
from sgm.weights.preflight import with_found_paths

REPO = Path(__file__).resolve().parents[2]
FILES = [REPO / "configs" / name for name in ("demo_infer.yaml", "few_steps.yaml")]
STUDENT = REPO / "demo" / "student"


def config(**flags):
    return with_found_paths(load_run_config(FILES, SampleArgs, flags=flags))


def test_the_student_counts_wherever_a_model_is_built(monkeypatch):
    monkeypatch.chdir(REPO)
    pipeline = Pipeline(load_run_config(FILES, SampleArgs), torch.device("cpu"), with_text_encoder=False)
    assert (pipeline.num_steps, pipeline.args.lora) == (4, ["demo/student"])


@pytest.mark.parametrize(
    "spelt", [STUDENT, f"{STUDENT}/", STUDENT / "lora.safetensors", f"{STUDENT}:0.5", "demo/student"]
)
def test_a_student_that_is_named_is_not_added_again(spelt, tmp_path, monkeypatch):
    """Also from a folder where only the project's demo is found."""
    for folder in (REPO, tmp_path):
        monkeypatch.chdir(folder)
        run = with_adapters(config(lora=[str(spelt)]))
        assert len(run.args.lora) == 1 and with_adapters(run) == run
        assert with_adapters(load_run_config(FILES, SampleArgs, flags={"lora": [str(spelt)]})).args.lora == [str(spelt)]
    run = with_adapters(config(lora=["other"]))
    assert run.args.lora == [str(STUDENT), "other"] and with_adapters(run) == run


def test_no_adapter_counts_twice(tmp_path):
    (tmp_path / "link").symlink_to(STUDENT)
    with pytest.raises(ConfigError, match=f"{STUDENT} and {tmp_path}/link:0.5 are the same adapter.*name it once"):
        with_adapters(config(lora=[str(STUDENT), "other", f"{tmp_path}/link:0.5"]))
    with pytest.raises(ConfigError, match="absent and absent are the same adapter"):
        with_adapters(config(lora=["absent", "absent"]))


def test_decoding_needs_no_student():
    flags = {"decode_latents": "l", "lora": ["a", "a"]}
    assert not with_adapters(config(**flags)).args.few_steps


def test_a_scale_does_not_hide_a_path(tmp_path, monkeypatch):
    """Also where the project's folder is another one, as of an installed package."""
    (tmp_path / "project" / "adapters" / "a").mkdir(parents=True)
    monkeypatch.setattr("sgm.places.PROJECT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    found = config(lora=["adapters/a:0.5", "adapters/a", "other:2"]).args.lora
    assert found == [f"{tmp_path}/project/adapters/a:0.5", f"{tmp_path}/project/adapters/a", "other:2"]


def test_an_adapter_of_the_hub(tmp_path, monkeypatch):
    """The cache's file; a name of which a part is here is a path."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--someone--style"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (snapshot / "pytorch_lora_weights.safetensors").touch()
    run = with_adapters(config(lora=["someone/style:0.5"]))
    assert run.args.lora[1:] == [f"{snapshot}/pytorch_lora_weights.safetensors:0.5"]  # behind the student
    with pytest.raises(WeightsError, match="no adapter at someone/other: .*hf download someone/other"):
        with_adapters(config(lora=["someone/other"]))
    (tmp_path / "ckpts").mkdir()
    assert with_adapters(config(lora=["ckpts/other"])).args.lora[1:] == ["ckpts/other"]
    files = ["README.md", "a.safetensors", "b.safetensors"]
    with pytest.raises(WeightsError, match="2 .safetensors files; name one: --lora x/y/a.safetensors; --lora x/y/b"):
        choose_file("x/y", files)
    assert choose_file("x/y", files[:2]) == "a.safetensors"
    assert choose_file("x/y", [*files, "pytorch_lora_weights.safetensors"]) == "pytorch_lora_weights.safetensors"

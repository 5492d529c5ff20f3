"""The demo's training configurations, the clips they draw at first use, and runs named without their date."""

from __future__ import annotations

import os

import pytest
import yaml

import train_video
from sgm.config import load_run_config, merge_yaml
from sgm.data.report import DatasetError
from sgm.inference.preflight import choose_config
from sgm.training.options import TrainArgs, training_advice, trains_lora
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.weights.release import locate, newest_run
from tests.conftest import REPO
from tools.demo import clips
from tools.demo.sync_configs import synced

INFER = REPO / "configs" / "demo_infer.yaml"
LORA, SFT = REPO / "configs" / "demo_lora.yaml", REPO / "configs" / "demo_sft.yaml"


@pytest.mark.parametrize("path", [LORA, SFT], ids=lambda p: p.stem)
def test_model_section_is_the_sampling_demos(path):
    expected, found = merge_yaml([INFER]), merge_yaml([path])
    if path == LORA:
        assert found["model"].pop("not_trainable_prefixes") == ["all"]
        lora = found["model"]["network_config"]["params"]["modules"].pop("lora_config")
        assert lora["target"] == "sat.model.finetune.lora2.LoraMixin"
    assert found["model"] == expected["model"], "run python tools/demo/sync_configs.py"
    assert found["args"]["load"] == expected["args"]["load"]


@pytest.mark.parametrize("path", [LORA, SFT], ids=lambda p: p.stem)
def test_syncing_follows_the_sampling_demo(path):
    own, infer = path.read_text(), INFER.read_text()
    assert synced(own, infer) == own
    changed = infer.replace("max_sequence_length: 64", "max_sequence_length: 65").replace(
        "  load: ", "  load: elsewhere/"
    )
    found, expected = yaml.safe_load(synced(own, changed)), yaml.safe_load(own)
    assert found["args"].pop("load") == "elsewhere/" + expected["args"].pop("load")
    trunk = [content["model"]["network_config"]["params"]["transformer_args"] for content in (found, expected)]
    assert [part.pop("max_sequence_length") for part in trunk] == [65, 64]
    assert found == expected  # the adapter with them


@pytest.mark.parametrize("path", [LORA, SFT], ids=lambda p: p.stem)
def test_settings_are_sensible_on_a_cpu(path):
    config = load_run_config([path], TrainArgs)
    plan = plan_deepspeed(config.deepspeed, device_type="cpu")
    assert plan.dtype == "fp32" and trains_lora(config.model) == (path == LORA)
    assert not config.notes and not training_advice(config.args, config.model, plan.optimizer.lr)


@pytest.mark.parametrize(
    "stage",
    [
        ["args.cache_lengths=[1,17]", "args.lr_decay_ratio=0.2"],
        [],
        ["args.train_data=[work/clips,work/spins]", "args.train_data_weights=[0.5,0.5]"],
    ],
)
def test_pretraining_is_a_valid_overlay(stage):
    """As tools/demo/reproduce.sh lays it over the configuration of fine-tuning, with its own data alone."""
    overrides = ["args.train_data=[work/clips]", *stage]
    config = load_run_config(
        [SFT, REPO / "tools/demo/pretrain.yaml"], TrainArgs, overrides=overrides, flags={"cache_dir": "c"}
    )
    plan = plan_deepspeed(config.deepspeed, device_type="cuda", data_parallel_size=2)
    assert (config.args.mode, config.args.load, plan.dtype) == ("pretrain", None, "bf16")
    assert config.args.auto_warmup_steps == 0 and not config.args.eval_interval


def test_the_unedited_shipped_file_means_the_demo(monkeypatch):
    monkeypatch.chdir(REPO)
    chosen, why = choose_config(train_video.SHIPPED, train_video.DEMO)
    assert chosen == LORA and chosen.is_file() and "demo_lora.yaml" in why


def test_clips_are_drawn_whole_into_the_demos_folder_only(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "FOLDER", tmp_path / "clips")
    monkeypatch.setattr(clips, "COUNT", 2)
    assert clips.make_demo_clips(tmp_path / "striped-heart") is False
    assert clips.make_demo_clips(tmp_path / "clips" / "striped-heart") is True
    made = tmp_path / "clips" / "striped-heart"
    assert sorted(p.name for p in made.glob("*/*")) == ["000000.mp4", "000000.txt", "000001.mp4", "000001.txt"]
    assert all("striped" in p.read_text() for p in (made / "labels").iterdir())
    assert [p.name for p in (tmp_path / "clips").iterdir()] == ["striped-heart"]
    with pytest.raises(DatasetError, match="striped-heart"):
        clips.make_demo_clips(tmp_path / "clips" / "stripes")


def test_a_run_may_be_named_without_its_date(tmp_path):
    for k, name in enumerate(
        ["try-01-02-03-04", "try-01-02-03-05", "try-01-02-03-05-2", "try-it-01-02-03-09", "try-x"]
    ):
        part = tmp_path / name / "7"
        part.mkdir(parents=True)
        (part / "mp_rank_00_model_states.pt").touch()
        (tmp_path / name / "latest").write_text("7")
        os.utime(tmp_path / name / "latest", (k, k))
    (tmp_path / "try-01-02-03-07").mkdir()  # saved nothing yet
    assert newest_run(tmp_path / "try").name == "try-01-02-03-05-2"
    assert locate(tmp_path / "try") == locate(tmp_path / "try-01-02-03-05-2")
    assert newest_run(tmp_path / "other") is None and newest_run(tmp_path / "absent" / "try") is None

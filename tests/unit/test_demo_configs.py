"""The demo's training configurations, the clips they draw at first use, and runs named without their date."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import yaml

import train_video
from sgm.config import load_run_config, merge_yaml
from sgm.placeholders import choose_config
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


def test_the_demo_from_a_picture_is_the_demo_with_a_pictures_channels():
    """Trained as an adapter alone, with what is too little of it to stand for the new channels."""
    infer, sft = (merge_yaml([REPO / "configs" / f"demo_i2v_{kind}.yaml"]) for kind in ("infer", "sft"))
    expected = merge_yaml([INFER])["model"]
    assert infer["args"]["lora"] == ["demo/i2v"]
    for found in (infer["model"], sft["model"]):
        assert found.pop("noised_image_input") and found["network_config"]["params"].pop("in_channels") == 32
    assert expected["network_config"]["params"].pop("in_channels") == 16 and infer["model"] == expected
    own = [
        sft["model"].pop(name) for name in ("also_trainable_prefixes", "also_trainable_rate", "noised_image_dropout")
    ]
    assert "model.diffusion_model.mixins.patch_embed" in own[0]
    sft["model"]["network_config"]["params"]["modules"].pop("lora_config")
    assert sft["model"].pop("not_trainable_prefixes") == ["all"] and sft["model"] == expected
    config = load_run_config([REPO / "configs" / "demo_i2v_sft.yaml"], TrainArgs)
    plan = plan_deepspeed(config.deepspeed, device_type="cuda")
    assert plan.dtype == "bf16" and config.args.lora_only and config.args.add_image_channels
    assert not config.notes and not training_advice(config.args, config.model, plan.optimizer.lr)


def test_the_unedited_shipped_file_means_the_demo(monkeypatch):
    monkeypatch.chdir(REPO)
    chosen, why = choose_config(train_video.SHIPPED, train_video.DEMO)
    assert chosen == LORA and chosen.is_file() and "demo_lora.yaml" in why


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The demo's clips, few and in a folder of the test; gives their folder."""
    monkeypatch.setattr(clips, "FOLDER", tmp_path / "clips")
    monkeypatch.setattr(clips, "COUNT", 2)
    monkeypatch.setattr(clips, "PLAIN_COUNT", 1)
    return tmp_path / "clips"


def test_clips_are_drawn_whole_into_the_demos_folder_only(drawn, capsys):
    assert clips.main([str(drawn / "striped-heart")]) == 0
    made = drawn / "striped-heart"
    assert sorted(p.name for p in made.glob("*/*")) == ["000000.mp4", "000000.txt", "000001.mp4", "000001.txt"]
    assert all("striped" in p.read_text() for p in (made / "labels").iterdir())
    assert [p.name for p in drawn.iterdir()] == ["striped-heart"]
    capsys.readouterr()
    assert clips.main([str(made)]) == 0 and capsys.readouterr().err == ""  # they are there
    for folder, said in ((drawn / "stripes", "striped-heart"), (drawn.parent / "striped-heart", "is not below")):
        assert clips.main([str(folder)]) == 2 and said in capsys.readouterr().err


def test_clips_that_a_training_needs_are_drawn(drawn, capsys):
    folders = [f"args.train_data=[{drawn}/striped-heart]", f"args.valid_data=[{drawn.parent}/mine]"]
    folders = [str(LORA), "--set", folders[0], "--set", f"args.prior_data=[{drawn}/plain]", "--set", folders[1]]
    for nothing in (["--dry-run"], ["--help"], ["--sede=1"], ["--set", "args.train_iters=many"]):
        assert clips.main(["--needed-by", *folders, *nothing]) == 0
        assert capsys.readouterr() == ("", "") and not drawn.exists()  # training says what is wrong
    assert clips.main(["--needed-by", *folders, "--resume"]) == 0
    assert sorted(p.name for p in drawn.iterdir()) == ["plain", "striped-heart"]
    assert capsys.readouterr().err.count("drawing") == 2 and not (drawn.parent / "mine").exists()


@pytest.mark.parametrize("arguments", [[], [str(LORA)]], ids=["none named", "demo_lora.yaml"])
def test_the_demo_needs_its_clips(arguments, monkeypatch):
    monkeypatch.chdir(REPO)
    assert clips.demo_folders(arguments) == [REPO / "demo" / "clips" / name for name in ("striped-heart", "plain")]


def test_the_demos_page_says_how_many_clips_there_are():
    page = " ".join((REPO / "docs" / "demo.md").read_text().split())
    assert (
        f"draws {clips.COUNT} clips of striped hearts" in page and f"and {clips.PLAIN_COUNT} of what it knows" in page
    )


def test_training_says_how_the_clips_are_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    folder = REPO / "demo" / "clips" / "no-style"
    assert train_video.main([str(LORA), "--set", f"args.train_data=[{folder}]", "--device", "cpu"]) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "clips.py" in line)
    command = shlex.split(said.partition("without it: ")[2])
    assert command[:3] == [sys.executable, str(REPO / "tools" / "demo" / "clips.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no-style is no demo data set; there are plain, striped-heart" in done.stderr


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

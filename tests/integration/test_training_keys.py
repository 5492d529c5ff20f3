"""Every key of a training file reaches the part that it is meant for: runs prepared in this process, up to training."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_video
from sgm.config import ConfigError, load_run_config
from sgm.training import trainer as trainer_module
from sgm.training.checkpoints.load import load_state
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.faults import TrainingStopped
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.training.step import StepOutcome
from sgm.training.trainer import Trainer
from sgm.training.watch.timing import PhaseClock
from sgm.util import TargetError
from sgm.weights import WeightsError
from tests.training_tiny import configuration, write_clips, write_release, write_yaml


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(release, two clips, one clip)"""
    root = tmp_path_factory.mktemp("parts")
    return write_release(root / "release"), write_clips(root / "two", 2), write_clips(root / "one", 1)


@pytest.fixture
def prepared(parts, tmp_path, monkeypatch):
    """The trainer of a configuration, just before its first iteration."""
    release, two, _ = parts
    caught: list[Trainer] = []
    monkeypatch.setattr(Trainer, "fit", lambda self: caught.append(self) or 0)

    def prepare(*overrides: str, **args: Any) -> Trainer:
        path = write_yaml(tmp_path / "config.yaml", configuration(release, two, args.pop("save", None), **args))
        assert train(load_run_config([path], TrainArgs, overrides=overrides)) == 0
        return caught[-1]

    return prepare


def test_data_keys(prepared, parts):
    _, two, one = parts
    run = prepared(
        "deepspeed.train_micro_batch_size_per_gpu=2", train_data=[str(two), str(one)], train_data_weights=[1.0, 3.0],
        data_order="sequential", num_workers=2, prefetch_factor=3, seed=11,
    )  # fmt: skip
    sampler, loader = run.loader.sampler, run.loader._build()
    assert (sampler.sizes, sampler.weights, sampler.order, sampler.seed) == ([2, 1], [1.0, 3.0], "sequential", 11)
    assert (loader.batch_size, loader.num_workers, loader.prefetch_factor) == (2, 2, 3)
    assert torch.initial_seed() == 11


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("fps=0", ["frame rate is 0"]),
        ("fps=x", ["fps"]),
        ("max_num_frames=6", ["max_num_frames is 6", "choose 5 or 9"]),
        ("max_num_frames=97", ["97x16x32", "25 latent frames", "max_num_frames and video_size"]),
        ("video_size=[16]", ["expected [height, width]"]),
        ("video_size=[20,40]", ["5x20x40", "multiples of 16"]),
        ("video_size=[64,128]", ["a side is 4 times", "16x32"]),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_clips_that_cannot_be_are_refused_before_anything_is_loaded(parts, tmp_path, setting, words, dry_run):
    made = configuration(*parts[:2], tmp_path / "save")
    config = load_run_config([write_yaml(tmp_path / "c.yaml", made)], TrainArgs, overrides=[f"data.params.{setting}"])
    with pytest.raises((ConfigError, TargetError)) as error:
        train(config, dry_run=dry_run)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "save").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(parts, tmp_path, monkeypatch):
    release, two, _ = parts
    monkeypatch.setattr("sgm.training.run.load_engine", None)
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:  # full
        patch.setattr("tempfile.TemporaryFile", lambda dir: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"))
        with pytest.raises(CheckpointError, match=f"cannot write in {tmp_path}: the disk is full"):
            train(load_run_config([write_yaml(tmp_path / "c.yaml", configuration(release, two, tmp_path))], TrainArgs))
    for save in ("/proc/none", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        path = write_yaml(tmp_path / "c.yaml", configuration(release, two, save))
        with pytest.raises(CheckpointError, match=f"cannot write in {save}: .*Set args.save"):
            train(load_run_config([path], TrainArgs))


def test_a_changed_key_is_an_error_whose_ways_out_work(parts, tmp_path, capsys):
    """A run by name and a search alike; without any checkpoint a search begins."""
    release, two, _ = parts
    path = write_yaml(tmp_path / "c.yaml", configuration(release, two, tmp_path / "save", train_iters=2))
    assert train_video.main([str(path), "--resume"]) == 0
    assert f"no run {tmp_path}/save/tiny-* has a checkpoint: starting a new one\n" in capsys.readouterr().out
    (run,) = (tmp_path / "save").iterdir()
    text = "model.conditioner_config.params.emb_models.0.ucg_rate=0.2"
    changed = ["--set", "deepspeed.optimizer.params.lr=0.002", "--set", "args.log_interval=7", "--set", text]
    for resume in (["--resume"], ["--resume", str(run)]):
        assert train_video.main([str(path), *changed, *resume]) == 2
        said = capsys.readouterr().err
        assert f"  {run / '2'} (then -> now)\n" in said and "log_interval" not in said
        assert "    deepspeed.optimizer.params.lr: 0.001 -> 0.002\n" in said
        assert "    model.conditioner_config.params.emb_models.0.ucg_rate: 0.1 -> 0.2\n" in said
    back = shlex.split(re.search("go on with it: (.*)", said)[1])
    assert train_video.main([str(path), *changed, *back]) == 0
    assert train_video.main([str(path), *changed, *shlex.split(re.search("without --resume: (.*)", said)[1])]) == 0
    assert len(list((tmp_path / "save").iterdir())) == 2


@pytest.mark.parametrize("lora", [None, 4])
def test_a_run_is_made_longer(parts, tmp_path, capsys, monkeypatch, lora):
    """From another folder, with other spellings of all paths: with its moments, and a rate that falls to the new end."""
    release, two, _ = parts
    made = configuration(release, two, tmp_path / "save", lora=lora, train_iters=2, warmup=0.0, valid_data=[str(two)])
    assert train_video.main([str(write_yaml(tmp_path / "c.yaml", made))]) == 0
    (run,) = (tmp_path / "save").iterdir()
    (tmp_path / "link").symlink_to(release.parent)
    monkeypatch.chdir(tmp_path)
    made["args"] |= {"load": f"link/{release.name}/transformer", "train_data": [f"{tmp_path}/./link/{two.name}"], "save": "save",
                     "valid_data": [f"{tmp_path}/link/../{release.parent.name}/{two.name}"], "train_iters": 4}  # fmt: skip
    made["model"]["first_stage_config"]["params"]["ckpt_path"] = f"link/{release.name}/vae/3d-vae.pt"
    capsys.readouterr()
    assert train_video.main([str(write_yaml(tmp_path / "other.yaml", made)), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert f"resumed {run / '2'} at iteration 2 of 4\n" in shown
    assert "note: changed since: args.train_iters: 2 -> 4\n" in shown
    assert (
        "the run's end moves from iteration 2 to 4: the learning rate goes on with 0.00025 and falls until step 4"
        in shown
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if row["kind"] == "train"] == pytest.approx([5e-4, 0, 2.5e-4, 0])
    state = load_state(run / "4")
    assert int(state.optimizer["states"][0]["step"]) == 4 and state.optimizer["states"][0]["exp_avg"].any()
    assert train_video.main(["other.yaml", "--resume", "--set", "args.train_iters=3"]) == 2
    assert "at iteration 4, beyond the 3 asked for" in capsys.readouterr().err


def test_epochs_are_added(parts, tmp_path, capsys):
    release, two, _ = parts
    path = write_yaml(tmp_path / "c.yaml", configuration(release, two, tmp_path / "save", epochs=1, log_interval=1))
    for more in ([], ["--resume", "--set", "args.epochs=2"], ["--resume", "--set", "args.epochs=2"]):
        assert train_video.main([str(path), *more]) == 0
    shown = capsys.readouterr().out
    assert "resumed" in shown and "iteration 3/4" in shown and "end moves from iteration 2 to 4" in shown
    assert shown.count("changed since") == 1
    batch = ["--set", "args.epochs=3", "--set", "deepspeed.gradient_accumulation_steps=2"]
    assert train_video.main([str(path), "--resume", *batch]) == 2
    assert "took 1 clips a step, now it would be 2" in capsys.readouterr().err
    assert train_video.main([str(path), "--resume", *batch, "--set", "deepspeed.train_batch_size=2"]) == 0
    assert (
        "1 processes, ZeRO 0, 1 clips a step -> 1 processes, ZeRO 0, 2 clips a step"
        in (shown := capsys.readouterr().out)
        and "iteration 5/5" in shown
    )  # 2 clips were left


def test_videos_left_out_are_counted_and_named(prepared, tmp_path, capsys):
    folder = write_clips(tmp_path / "clips", 2)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    (folder / "labels" / "1.txt").unlink()
    prepared(train_data=[str(folder)], save=str(tmp_path / "save"))
    (report,) = (tmp_path / "save").glob("tiny-*/train_data_0.jsonl")
    shown = capsys.readouterr().out
    assert f"warning: {folder}: 2 of 3 videos are left out, all named in {report}" in shown
    assert "broken.mp4" in report.read_text() and "1.mp4" in report.read_text()


def test_evaluation_keys(prepared, parts):
    _, two, one = parts
    common = dict(valid_data=[str(one), str(two)], eval_interval=5, only_log_video_latents=True, log_image=True)
    some = prepared(**common, eval_iters=4, eval_batch_size=2).evaluation
    assert (some.batches, some.batch_size, some.latents_only, some.log_video) == (4, 2, True, True)
    assert [len(d) for d in some.datasets] == [1, 2]
    every = prepared(**common, strict_eval=True).evaluation
    assert (every.batches, every.batch_size) == (3, 1)  # three clips, one a batch


def test_split_is_for_runs_without_validation_data(prepared):
    held = prepared(eval_interval=5, split="1,1,0")
    assert held.loader.sampler.sizes == [1] and [len(d) for d in held.evaluation.datasets] == [1]
    whole = prepared(eval_interval=5, split="1,0,0")
    assert whole.loader.sampler.sizes == [2] and whole.evaluation is None


def test_optimizer_and_schedule_keys(prepared):
    run = prepared(
        "deepspeed.optimizer={type: AdamW, params: {lr: 0.02, betas: [0.8, 0.9], eps: '1e-7', weight_decay: 0.5}}",
        "deepspeed.gradient_accumulation_steps=3", "deepspeed.gradient_clipping=0.7", warmup=0.5, lr_decay_ratio=0.2,
        lr_decay_style="cosine", lr_decay_iters=40, auto_warmup_steps=7, auto_warmup_rate=0.3, max_skipped_steps=9,
    )  # fmt: skip
    asked, optimizer = run.schedule.settings, run.ds_engine.basic_optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["eps"] == 1e-7
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert (asked.base_lr, asked.total_steps, asked.warmup, asked.style) == (0.02, 40, 0.5, "cosine")
    assert (asked.decay_ratio, asked.hold_steps, asked.hold_rate) == (0.2, 7, 0.3)
    assert (run.guard.limit, run.plan.clipping, run.ds_engine.gradient_accumulation_steps()) == (9, 0.7, 3)
    assert prepared(mode="pretrain", auto_warmup_steps=7).schedule.settings.hold_steps == 0


def test_memory_keys(prepared):
    plain = prepared().ds_engine.module
    assert not plain.network.transformer.checkpoint_activations
    lean = prepared(vae_low_memory=True, checkpoint_activations=True).ds_engine.module
    assert lean.first_stage_model.memory.slice_bytes < plain.first_stage_model.memory.slice_bytes
    assert lean.network.transformer.checkpoint_activations
    place = "model.network_config.params.transformer_args.checkpoint_activations=true"
    assert prepared(place).ds_engine.module.network.transformer.checkpoint_activations


def test_force_train_permits_only_what_the_configuration_determines(prepared, parts, tmp_path):
    release, _, _ = parts  # without the position table, as published
    with pytest.raises(WeightsError, match="args.force_train: True"):
        prepared(force_train=False)
    assert prepared(force_train=True)
    content = torch.load(release / "transformer" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    del content["module"]["model.diffusion_model.time_embed.0.bias"]
    torch.save(content, tmp_path / "lacking.pt")
    with pytest.raises(WeightsError, match="time_embed.0.bias"):
        prepared(f"args.load={tmp_path / 'lacking.pt'}", force_train=True)


def test_an_adapter_in_the_loaded_file_is_trained_further(prepared, parts, tmp_path, capsys):
    release, _, _ = parts
    content = torch.load(release / "transformer" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    linear = "model.diffusion_model.transformer.layers.0.attention.dense"
    width = len(content["module"][f"{linear}.weight"])
    content["module"] |= {f"{linear}.matrix_A.0": torch.ones(2, width), f"{linear}.matrix_B.0": torch.ones(width, 2)}
    torch.save(content, tmp_path / "both.pt")
    prepared(f"args.load={tmp_path / 'both.pt'}", lora=4)
    assert "in this file is trained further: rank 2, factor 0.5, whatever lora_config" in capsys.readouterr().out


def test_pretraining_needs_no_weights(prepared):
    drawn = prepared("args.load=null", mode="pretrain", seed=5).ds_engine.module.network.state_dict()
    again = prepared("args.load=null", mode="pretrain", seed=5).ds_engine.module.network.state_dict()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


@pytest.mark.parametrize("device", ["cuda:1", "gpu"])
def test_a_device_is_cpu_or_cuda(prepared, device):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        prepared(device=device)


def test_full_memory_names_the_switches_that_help(parts, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trainer_module, "training_step", full)
    path = write_yaml(tmp_path / "config.yaml", configuration(parts[0], parts[1], None))
    with pytest.raises(TrainingStopped, match=r"ran out of memory(.|\n)*optimizer.type=AdamW8bit: saves about"):
        train(load_run_config([path], TrainArgs))


# --- what the loop does at which iteration -------------------------------------------------------------------------


class Recorder(SimpleNamespace):
    """Stands for log and evaluation; `calls` lists what happened."""

    def __getattr__(self, name):
        return lambda *values, **named: self.calls.append((name, values, named)) or (0.5, None)


def test_intervals(monkeypatch):
    monkeypatch.setattr(trainer_module, "training_step", lambda *_: StepOutcome(1.0, 1.0, True))
    log = Recorder(calls=[], interval=Recorder(calls=[]), aside=nullcontext)
    saved, evaluation = list[int](), Recorder(calls=[])
    monkeypatch.setattr(Trainer, "_state", lambda self: self.iteration)
    monkeypatch.setattr(trainer_module, "save_checkpoint", lambda folder, engine, state, **_: saved.append(state))
    engine = SimpleNamespace(train=lambda: None, device=torch.device("cpu"), fp16_enabled=lambda: False)
    loader = SimpleNamespace(consumed=0)
    args = TrainArgs(
        train_data=["x"], load="x", train_iters=9, log_interval=2, save_interval=3, eval_interval=4, exit_interval=7
    )
    schedule = SimpleNamespace(current=0.1, step=lambda: None)
    config = SimpleNamespace(args=args, model={})
    plan = SimpleNamespace(clipping=0.0, dtype="fp32", clips_per_step=lambda replicas: replicas)
    run = Trainer(engine, loader, schedule, config, plan, log, PhaseClock(), Path("run"), evaluation)
    assert run.fit() == 0
    assert [values[0] for name, values, _ in log.calls if name == "train"] == [2, 4, 6]
    assert [values[1] for _, values, _ in evaluation.calls] == [4]
    assert saved == [3, 6, 7] and run.iteration == 7  # the last one where it stopped

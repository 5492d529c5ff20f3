"""Whole training runs of a tiny model in this process: learning, evaluation, refusals, what is written."""

from __future__ import annotations

import json
import math
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml

import sample_video
from sgm.config import load_run_config
from sgm.data.frames import DatasetError
from sgm.training import trainer
from sgm.training import trainer as saver
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.faults import TrainingStopped
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.training.step import StepOutcome
from sgm.training.watch.timing import PHASES
from sgm.weights import WeightsError, read_checkpoint
from sgm.weights.release import read_transformer
from tests.training_tiny import configuration, write_clips, write_yaml

EVERYWHERE = {"targets": ["attention", "mlp", "adaln"]}


@pytest.fixture(scope="module")
def one_clip(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("four"), 4)


def run(content: dict, folder: Path, *overrides: str) -> Path:
    """Train in this process; the run's folder."""
    path = write_yaml(folder / "config.yaml", content)
    assert train(load_run_config([path], TrainArgs, overrides=overrides)) == 0
    (found,) = (folder / "save").iterdir()
    return found


def records(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def evaluated(release: Path, clips: Path, folder: Path, lora: int | None, **args) -> dict:
    """A configuration that evaluates at its end: 8 batches, and a sample's latents."""
    iterations = args["train_iters"]
    content = configuration(
        release, clips, folder / "save", lora=lora, valid_data=[str(clips)], eval_iters=8, lr_decay_style="constant",
        only_log_video_latents=True, log_image=True, warmup=0.0, **{"eval_interval": iterations, **args},
    )  # fmt: skip
    if lora:
        content["model"]["network_config"]["params"]["modules"]["lora_config"]["params"] |= EVERYWHERE
    return content


def sample_of(folder: Path, iteration: int) -> torch.Tensor:
    path = folder / "video" / "latents" / f"latents_gs-{iteration:06d}" / "latent.pt"
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def untrained(release, one_clip, tmp_path_factory) -> Path:
    """A run at learning rate 0."""
    folder = tmp_path_factory.mktemp("untrained")
    content = evaluated(release, one_clip, folder, None, train_iters=2, eval_interval=1)
    return run(content, folder, "deepspeed.optimizer.params.lr=0")


def test_learning_rate_0_changes_nothing(untrained, release):
    before = read_transformer(release / "transformer").network
    after = read_transformer(untrained).network
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(sample_of(untrained, 1), sample_of(untrained, 2))
    first, second = records(untrained, "valid")  # same clips, noise and timesteps
    assert first["loss"] == second["loss"] and first["loss_by_timestep"] == second["loss_by_timestep"]


@pytest.mark.parametrize("lora, rate, iterations", [(None, 5e-3, 80), (16, 2e-2, 130)])
def test_one_clip_is_learnt_by_heart(untrained, release, one_clip, tmp_path, lora, rate, iterations):
    content = evaluated(release, one_clip, tmp_path, lora, train_iters=iterations)
    folder = run(content, tmp_path, f"deepspeed.optimizer.params.lr={rate}", "deepspeed.gradient_clipping=0")
    before, after = records(untrained, "valid")[-1]["loss"], records(folder, "valid")[-1]["loss"]
    assert after < before / 2  # same clip, noise and timesteps
    assert not torch.allclose(sample_of(folder, iterations), sample_of(untrained, 2), atol=0.1)


def test_a_run_writes_the_originals_layout(release, clips, tmp_path):
    content = configuration(
        release, clips, tmp_path / "save", valid_data=[str(clips)], eval_iters=1, eval_interval=2, log_image=True,
        save_interval=2, experiment_name="my-run", eval_prompts=["a boat", "a fox"],
    )  # fmt: skip
    folder = run(content, tmp_path)
    assert folder.name.startswith("my-run-") and len(folder.name.split("-")) == 6
    for name in ("inputs", "reconstructions", "samples"):
        assert (folder / "video" / f"{name}_gs-000002" / "000000.mp4").stat().st_size > 0
    assert sorted(p.name for p in (folder / "video" / "samples_gs-000004").iterdir()) == [
        f"{k:06d}.mp4"
        for k in range(3)  # the clip's caption, then the prompts
    ]
    assert (folder / "video_texts" / "00000004").read_text() == "clip number 0 of a moving gradient\n"
    assert yaml.safe_load((folder / "training_config.yaml").read_text())["args"]["train_iters"] == 4
    assert (folder / "latest").read_text().strip() == "4" and (folder / "2").is_dir()
    steps = records(folder, "train")
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["seconds_per_step"] > 0 for line in steps)
    assert [line["samples"] for line in steps] == [1, 2, 3, 4]
    assert all(set(line["phases"]) == set(PHASES) and min(line["phases"].values()) > 0 for line in steps)
    assert all(sum(mean is not None for mean in line["loss_by_timestep"]) == 1 for line in steps)  # one clip a step
    assert all(line["samples_per_second"] > 0 and line["data_wait"] > 0 and line["rss_bytes"] > 0 for line in steps)
    assert steps[0]["loss_average"] == steps[0]["loss"] and steps[3]["loss_average"] != steps[3]["loss"]
    assert records(folder, "valid")[0]["loss"] != records(folder, "valid")[1]["loss"]
    assert (folder / "loss.png").stat().st_size > 0 and len(list((folder / "tensorboard").iterdir())) == 1


def test_zero_3_trains_from_a_cache(release, clips, tmp_path):
    content = configuration(release, clips, tmp_path / "save", train_iters=1, cache_dir=str(tmp_path / "cache"))
    assert (run(content, tmp_path, "deepspeed.zero_optimization.stage=3") / "1").is_dir()


def test_epochs_replace_iterations(release, clips, tmp_path, capsys):
    content = configuration(release, clips, tmp_path / "save", epochs=2, log_image=False)
    content["deepspeed"] |= {"gradient_accumulation_steps": 2, "wall_clock_breakdown": True}
    folder = run(content, tmp_path, "args.tensorboard=false")
    assert not (folder / "tensorboard").exists() and "seconds a step: data" in capsys.readouterr().out
    assert [line["iteration"] for line in records(folder, "saved")] == [2, 4]  # 4 clips, 2 a step: 2 an epoch
    assert records(folder, "train")[-1]["samples"] == 8


def test_activation_checkpointing_changes_no_loss(release, clips, tmp_path):
    losses = []
    for switch in ("false", "true", "selective"):
        folder = tmp_path / switch
        folder.mkdir()
        found = run(configuration(release, clips, folder / "save"), folder, f"args.checkpoint_activations={switch}")
        losses.append([line["loss"] for line in records(found, "train")])
    assert losses[0] == losses[1] == losses[2]


def test_runs_without_a_finite_loss_stop_with_a_reason(release, clips, tmp_path):
    state = read_checkpoint(release / "transformer" / "1000" / "mp_rank_00_model_states.pt")
    state["module"]["model.diffusion_model.time_embed.0.bias"] = torch.full((32,), float("nan"))
    torch.save(state, tmp_path / "bad.pt")
    content = configuration(release, clips, None, train_iters=50, max_skipped_steps=3)
    content["args"]["load"] = str(tmp_path / "bad.pt")
    path = write_yaml(tmp_path / "config.yaml", content)
    with pytest.raises(WeightsError, match=r"bad.pt: time_embed.0.bias is not finite, 32 of 32 values"):
        train(load_run_config([path], TrainArgs))


@pytest.fixture
def steps_that_fail(monkeypatch):
    """Lets the named iterations be skipped, as those of a NaN loss are."""

    def arrange(*failing: int) -> None:
        step, count = trainer.training_step, iter(range(1, 99))

        def one(*args):
            if next(count) in failing:
                return StepOutcome(math.nan, None, False, "the loss is not finite")
            return step(*args)

        monkeypatch.setattr(trainer, "training_step", one)

    return arrange


@pytest.mark.parametrize(
    "failing, code, kept, last_words",
    [
        ((4, 5), 0, ["2", "6", "7"], "note: 2 of 7 steps were skipped"),  # what is due at 4 waits
        ((3, 4, 5, 6, 7), 3, ["2"], "warning: 5 of 7 steps were skipped"),
        ((6, 7), 0, ["2", "4"], "note: 2 of 7 steps were skipped"),
        ((7,), 0, ["2", "4", "6", "7"], "note: 1 of 7 steps were skipped"),  # one bad clip: kept, and nothing deleted
        (range(1, 8), 3, [], "warning: 7 of 7 steps were skipped"),
    ],
)
def test_what_is_kept_of_a_run_that_skips_steps(
    release, clips, tmp_path, capsys, steps_that_fail, failing, code, kept, last_words
):
    steps_that_fail(*failing)
    content = configuration(release, clips, tmp_path / "save", train_iters=7, save_interval=2, keep_last=3)
    path = write_yaml(tmp_path / "config.yaml", content)
    assert train(load_run_config([path], TrainArgs)) == code
    (run_folder,) = (tmp_path / "save").iterdir()
    assert sorted(p.name for p in run_folder.iterdir() if p.name.isdigit()) == kept
    said = capsys.readouterr().out
    assert f"\n{last_words}" in said
    assert ("is not saved: its last" in said) == (kept[-1:] != ["7"])


def test_a_run_that_turns_bad_keeps_what_was_good_and_says_so_of_its_samples(
    release, clips, tmp_path, monkeypatch, capsys
):
    step, count = trainer.training_step, iter(range(1, 99))

    def spoiled(engine, *args):
        if next(count) == 5:
            next(p for p in engine.module.parameters() if p.requires_grad).data[0] = math.nan
        return step(engine, *args)

    monkeypatch.setattr(trainer, "training_step", spoiled)
    content = configuration(
        release, clips, tmp_path / "save", train_iters=30, save_interval=2, keep_last=2, max_skipped_steps=6,
        valid_data=[str(clips)], eval_iters=1, eval_interval=4, log_image=True,
    )  # fmt: skip
    path = write_yaml(tmp_path / "config.yaml", content)
    with pytest.raises(TrainingStopped, match=r"6 steps in a row were skipped up to iteration 10(.|\n)*are intact"):
        train(load_run_config([path], TrainArgs))
    (run_folder,) = (tmp_path / "save").iterdir()
    assert sorted(p.name for p in run_folder.iterdir() if p.name.isdigit()) == ["2", "4"]
    assert all(t.isfinite().all() for t in read_transformer(run_folder).network.values())
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "NaN" in line)
    assert told.startswith("warning: iteration 8: the latents of the evaluation contain NaN")
    assert "so there is no video/samples_gs-000008/000000.mp4;" in told and "lower the learning rate" in told
    assert {p.name for p in (run_folder / "video").iterdir() if "samples" in p.name} == {"samples_gs-000004"}
    assert (run_folder / "video" / "reconstructions_gs-000008" / "000000.mp4").is_file()


def test_a_state_that_is_not_finite_is_not_resumed(release, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.training.checkpoints.save.require_finite", lambda *_: None)  # as earlier versions saved
    content = configuration(release, clips, tmp_path / "save", train_iters=2)
    save = saver.save_checkpoint

    def spoiled(folder, engine, state, **options):
        state.optimizer["states"][0]["exp_avg"].view(-1)[0] = math.nan
        return save(folder, engine, state, **options)

    monkeypatch.setattr(saver, "save_checkpoint", spoiled)
    run_folder = run(content, tmp_path)
    config = load_run_config([tmp_path / "config.yaml"], TrainArgs, flags={"resume": str(run_folder)})
    with pytest.raises(WeightsError, match=r"resume/rank_00000.pt: optimizer.states\[0\].exp_avg is not finite, 1 of"):
        train(config)


@pytest.mark.parametrize("gone", ["the run's folder", "the folder of runs"])
def test_a_folder_that_disappears(release, clips, tmp_path, monkeypatch, capsys, gone):
    """A run's folder is made again; where what it lies in is gone, too, the last save is one error."""
    step, count, save, away = trainer.training_step, iter(range(1, 99)), tmp_path / "save", tmp_path / "away"

    def disturbed(*args):
        if next(count) == 4:
            (next(save.iterdir()) if gone == "the run's folder" else save).rename(away)
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", disturbed)
    content = configuration(release, clips, save, train_iters=7, save_interval=3)
    config = load_run_config([write_yaml(tmp_path / "config.yaml", content)], TrainArgs)
    if gone == "the run's folder":
        assert train(config) == 0
        (folder,) = save.iterdir()
        assert {"6", "7", "latest", "training_config.yaml"} <= {p.name for p in folder.iterdir()}
        old = away
    else:
        with pytest.raises(CheckpointError, match=f"cannot write {save}/tiny-.*: No such file or directory"):
            train(config)
        assert not save.exists()
        (old,) = away.iterdir()
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl is not written") == 1 and "iteration 7/7" in said
    assert (old / "latest").read_text() == "3" and read_transformer(old).iteration == 3


def test_a_signal_saves_and_leaves(release, clips, tmp_path, monkeypatch):
    step, handler = trainer.training_step, signal.getsignal(signal.SIGTERM)
    calls = []

    def interrupted(*args):
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 1 else None)  # during the second step
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", interrupted)
    path = write_yaml(tmp_path / "config.yaml", configuration(release, clips, tmp_path / "save", train_iters=50))
    assert train(load_run_config([path], TrainArgs)) == 128 + signal.SIGTERM
    (folder,) = (tmp_path / "save").iterdir()
    assert (folder / "latest").read_text().strip() == "3"  # seen before the third, which is finished
    assert signal.getsignal(signal.SIGTERM) is handler


def test_unusable_data_is_an_error_before_training(release, tmp_path):
    (tmp_path / "data" / "videos").mkdir(parents=True)
    (tmp_path / "data" / "videos" / "broken.mp4").write_bytes(b"no video")
    path = write_yaml(tmp_path / "config.yaml", configuration(release, tmp_path / "data", tmp_path / "save"))
    with pytest.raises(DatasetError, match="usable"):
        train(load_run_config([path], TrainArgs))


@pytest.mark.parametrize(
    "override, message",
    [
        ("args.load='{your_CogVideoX-2b-sat_path}/transformer'", "args.load is still the placeholder"),
        ("args.train_data=['your train data path']", "args.train_data.0 is still the placeholder"),
        ("args.train_data=[/nowhere/at/all]", "no folder /nowhere/at/all"),
        ("model.not_trainable_prefixes=[all]", "leaves nothing to train"),
        ("deepspeed.fp16.enabled=true", "--set deepspeed.fp16.enabled=false"),
        ("data.params.fsp=8", "fps"),
        ("deepspeed.data_types={grad_accum_dtype: bf16}", "does not start with this deepspeed section: NotImpl"),
    ],
)
def test_wrong_configurations_are_refused(release, clips, tmp_path, override, message):
    path = write_yaml(tmp_path / "config.yaml", configuration(release, clips, None))
    config = load_run_config([path], TrainArgs, overrides=[override])
    with pytest.raises(ValueError, match=message):
        train(config)
    if override.startswith("deepspeed"):
        with pytest.raises(ValueError, match=message):
            train(config, dry_run=True)


def test_dry_run_prints_configuration_plan_and_memory(release, clips, tmp_path, capsys):
    path = write_yaml(tmp_path / "config.yaml", configuration(release, clips, tmp_path / "save", lora=4))
    assert train(load_run_config([path], TrainArgs), dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "experiment_name: tiny" in shown and "plan: 4 iterations of 1 clips" in shown and "memory estimate" in shown
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("lora", [None, 4])
def test_a_resumed_run_goes_on_bit_for_bit(release, clips, tmp_path, lora):
    def content(folder: Path) -> dict:
        made = configuration(release, clips, folder / "save", lora=lora, save_interval=2)
        made["deepspeed"]["gradient_accumulation_steps"] = 2
        return made

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = run(content(whole), whole)
    stopped = run(content(parts), parts, "args.exit_interval=2")
    assert len(records(stopped, "train")) == 2
    resumed = run(content(parts), parts, "args.resume=auto")
    assert resumed == stopped
    assert [line["loss"] for line in records(resumed, "train")] == [line["loss"] for line in records(expected, "train")]
    for part in ("4", "4-ema"):
        files = [folder / part / "mp_rank_00_model_states.pt" for folder in (expected, resumed)]
        first, second = (read_checkpoint(file)["module"] for file in files)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), part


def test_lora_saves_alone_and_folded_in(release, clips, tmp_path):
    content = configuration(release, clips, tmp_path / "save", lora=4, lora_only=True, save_merged=True)
    folder = run(content, tmp_path, "deepspeed.optimizer.params.lr=0.01")
    saved = read_checkpoint(folder / "4" / "mp_rank_00_model_states.pt")["module"]
    assert saved and all("matrix_" in name for name in saved)
    merged = read_transformer(folder / "merged").network
    base = read_transformer(release / "transformer").network
    changed = {name for name, value in base.items() if not torch.equal(merged[name], value)}
    adapted = ("attention.dense.weight", "attention.query_key_value.weight")
    assert changed == {f"transformer.layers.{i}.{name}" for i in (0, 1) for name in adapted}


@pytest.mark.parametrize("kind", ["whole", "lora", "adapter"])
def test_the_command_at_the_end_samples_from_the_run(release, one_clip, tmp_path, capsys, kind):
    args = {"train_iters": 1, "experiment_name": "it's new", "lora_only": kind == "adapter"}
    run(configuration(release, one_clip, tmp_path / "save", lora=None if kind == "whole" else 2, **args), tmp_path)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to sample: "))
    program, script, *arguments = shlex.split(said.removeprefix("to sample: "))
    assert program == "bash" and Path(script).is_file() and Path(script).name == "inference.sh"
    out = tmp_path / "videos"
    short = ["--num-frames", "1", "--steps", "2", "--device", "cpu", "--output-dir", str(out)]
    assert sample_video.main([*arguments, *short]) == 0
    (record,) = (json.loads(file.read_text()) for file in out.rglob("000000.json"))
    assert "it's new" in json.dumps(record["weights"]) and list(out.rglob("*.mp4"))

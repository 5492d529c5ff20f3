"""args.stream_frozen and offload_activations in whole runs: the same files as without them; and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.training.setup.model import checked_engine, stream_obstacles, streams_frozen, training_model_section
from tests.integration.test_training_runs import records
from tests.training_tiny import configuration, write_clips, write_release, write_yaml

STREAM = "args.stream_frozen=true"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("stream")
    return SimpleNamespace(release=write_release(folder / "release"), clips=write_clips(folder / "clips", 2))


def start(parts, save: Path | None, *overrides: str, lora: int | None = 4, **args) -> Path | None:
    """Train in this process; the run's folder."""
    args = {"train_iters": 2, "tensorboard": False, "checkpoint_activations": True, **args}
    content = configuration(parts.release, parts.clips, save, lora=lora, **args)
    content["deepspeed"]["gradient_accumulation_steps"] = 2
    content["model"]["sampler_config"]["params"]["num_steps"] = 2
    config = write_yaml((save or parts.clips).parent / "config.yaml", content)
    assert train(load_run_config([config], TrainArgs, overrides=overrides)) == 0
    return next(save.iterdir()) if save else None


def weights_of(run: Path) -> dict[Path, dict[str, torch.Tensor]]:
    files = sorted(file.relative_to(run) for file in run.rglob("mp_rank_*.pt"))
    return {file: torch.load(run / file, weights_only=True)["module"] for file in files}


def test_a_run_is_the_same_to_the_bit(parts, tmp_path, capsys):
    """Several clips a step, one to be kept; validation with a sampled clip; saved whole and merged; resumed; ZeRO 2."""
    zero = "deepspeed.zero_optimization.stage=2"
    common = {
        "save_merged": True, "eval_interval": 2, "eval_iters": 1, "valid_data": [str(parts.clips)], "log_image": True,
        "only_log_video_latents": True, "prior_data": [str(write_clips(tmp_path / "known", 1))],
    }  # fmt: skip
    plain = start(parts, tmp_path / "plain", zero, **common)
    lean = [zero, STREAM, "args.offload_activations=true"]
    start(parts, tmp_path / "streamed", *lean, **common, exit_interval=1)
    streamed = start(parts, tmp_path / "streamed", *lean, "args.resume=auto", **common)
    assert capsys.readouterr().out.count("two blocks of them") == 2
    for kind in ("train", "valid"):
        found, expected = ([line["loss"] for line in records(run, kind)] for run in (streamed, plain))
        assert found == expected and len(found) == (2 if kind == "train" else 1)
    found, expected = weights_of(streamed), weights_of(plain)
    assert {str(file.parent) for file in expected} == {"2", "2-ema", "merged/2"} < {str(file.parent) for file in found}
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys() and any("layers.1" in name for name in tensors)
        assert all(torch.equal(found[file][name], value) for name, value in tensors.items())
    (before, after) = (torch.load(run / "video" / "latents" / "latents_gs-000002" / "latent.pt", weights_only=True)
                       for run in (plain, streamed))  # fmt: skip
    assert torch.equal(before, after)


def test_it_has_no_effect_where_all_weights_learn(parts, capsys):
    start(parts, None, STREAM, "args.checkpoint_activations=false", lora=None, train_iters=1)
    assert capsys.readouterr().out.count("args.stream_frozen has no effect") == 1


def test_what_does_not_go_with_it_is_refused(parts):
    content = configuration(parts.release, parts.clips, None, lora=4, stream_frozen=True)
    config = load_run_config([write_yaml(parts.clips.parent / "config.yaml", content)], TrainArgs)
    zero_2, zero_3 = (SimpleNamespace(dtype="fp32", stage=stage) for stage in (2, 3))

    def refused(plan: SimpleNamespace = zero_2, prefixes: tuple[str, ...] = (), **changes) -> str:
        args = dataclasses.replace(config.args, checkpoint_activations=True)
        engine = checked_engine(training_model_section(config.model, args), args, zero_2)
        engine.network.transformer.checkpoint_activations = changes.pop("checkpoint_activations", True)
        engine.also_trainable_prefixes = prefixes
        with pytest.raises(
            ConfigError, match="^args.stream_frozen does not go with .*; leave one of them out$"
        ) as told:
            streams_frozen(dataclasses.replace(args, **changes), plan, engine)
        return str(told.value)

    assert "checkpoint_activations: false and args.cuda_graphs;" in refused(
        checkpoint_activations=False, cuda_graphs=True
    )
    assert "deepspeed.zero_optimization.stage: 3" in refused(zero_3)
    assert "args.model_parallel_size above 1" in refused(model_parallel_size=2)
    wished = dataclasses.replace(config.args, checkpoint_activations=True, stream_frozen="auto")
    engine = checked_engine(training_model_section(config.model, wished), wished, zero_2)
    assert streams_frozen(wished, zero_2, engine)
    assert not streams_frozen(wished, zero_3, engine) and stream_obstacles(wished, zero_3, engine) == [
        "deepspeed.zero_optimization.stage: 3"
    ]
    assert "where more than LoRA learns" in refused(
        prefixes=("model.diffusion_model.final_layer",), prior_data=[str(parts.release)]
    )
    for switch in ("stream_frozen", "offload_activations"):
        args = dataclasses.replace(config.args, **{"stream_frozen": False, switch: True})
        with pytest.raises(ConfigError, match=f"^args.{switch} does not go with checkpoint_activations: false; leave"):
            train(dataclasses.replace(config, args=args))

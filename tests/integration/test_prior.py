"""Clips that keep what the model knows (args.prior_data): their target, who gives it, and what does not go with it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.modules.diffusionmodules.loss import Loss
from sgm.modules.transformer.lora import lora_layers
from sgm.training.options import TrainArgs
from sgm.training.prior import BaseNetwork
from sgm.training.run import train
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.estimate import planned_needs
from sgm.training.setup.model import check_switches, checked_engine, load_engine, training_model_section
from sgm.weights.release import read_transformer
from tests.integration.test_training_runs import records
from tests.training_tiny import configuration, write_clips, write_release, write_yaml

PLAN = SimpleNamespace(dtype="fp32", stage=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("prior")
    write_release(folder / "release")
    return SimpleNamespace(
        release=folder / "release", new=write_clips(folder / "new", 2), known=write_clips(folder / "known", 3)
    )


def content_of(parts, save: Path | None, lora: int | None, **args) -> dict:
    content = configuration(parts.release, parts.new, save, lora=lora, prior_data=[str(parts.known)], **args)
    content["deepspeed"]["optimizer"]["params"]["weight_decay"] = 0.0
    return content


def config_of(parts, folder: Path, lora: int | None, *overrides: str):
    return load_run_config(
        [write_yaml(folder / "c.yaml", content_of(parts, None, lora))], TrainArgs, overrides=overrides
    )


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lora", [None, 4])
def test_what_the_model_knows_costs_nothing(parts, tmp_path, lora, cached):
    """As long as the network is its base, known clips have no loss, however far it is from the clips themselves."""
    extra = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    content = content_of(parts, tmp_path / "save", lora, train_iters=10, **extra)
    content["deepspeed"]["optimizer"]["params"]["lr"] = 0.0
    assert train(load_run_config([write_yaml(tmp_path / "c.yaml", content)], TrainArgs)) == 0
    (folder,) = (tmp_path / "save").iterdir()
    losses = sorted(line["loss"] for line in records(folder, "train"))  # two passes over three known and two new clips
    assert max(losses[:6]) < 1e-10 and min(losses[6:]) > 0.05
    assert not any("base" in name or "copied" in name for name in read_transformer(folder).network)


@pytest.mark.parametrize("lora", [None, 4])
def test_the_base_stays_what_it_was(parts, tmp_path, lora):
    engine, _ = load_engine(config_of(parts, tmp_path, lora), PLAN, CPU)
    assert isinstance(engine.base, BaseNetwork)
    alone, _ = load_engine(config_of(parts, tmp_path, lora, "args.prior_data=[]"), PLAN, CPU)
    assert [name for name, _ in engine.named_parameters()] == [name for name, _ in alone.named_parameters()]
    x, t, cond = torch.randn(1, 2, 16, 2, 4), torch.tensor([500]), {"crossattn": torch.randn(1, 12, 32)}
    before = engine.base(x, t, cond)
    torch.testing.assert_close(before, engine.model(x, t, cond))
    with torch.no_grad():
        for p in engine.parameters():
            if p.requires_grad:
                p.add_((1.0 if lora else 0.05) * torch.randn_like(p))
    assert torch.equal(engine.base(x, t, cond), before)
    assert not torch.allclose(engine.model(x, t, cond), before, atol=1e-2)
    scales = {layer.adapter_scale for layer in lora_layers(engine.model).values()}
    assert scales <= {1.0}


def test_a_layer_beside_the_adapters_makes_a_copy(parts, tmp_path):
    engine, _ = load_engine(config_of(parts, tmp_path, 4, "args.prior_data=[]"), PLAN, CPU)
    assert BaseNetwork(engine.model).copied is None
    next(p for p in engine.model.parameters() if not p.requires_grad).requires_grad_(True)
    assert BaseNetwork(engine.model).copied is not None


def test_only_marked_samples_have_the_base_for_their_target(parts, tmp_path):
    engine, _ = load_engine(config_of(parts, tmp_path, None), PLAN, CPU)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    z, noise, idx = torch.randn(3, 2, 16, 2, 4), torch.randn(3, 2, 16, 2, 4), torch.tensor([50, 500, 900])
    batch = {"txt": ["a", "b", "c"], "prior": torch.tensor([False, True, False])}
    cond = {"crossattn": torch.randn(3, 12, 32)}

    def losses(model, base, weight=1.0):
        return engine.loss_fn.detailed(model, engine.denoiser, lambda _: cond, z, batch, idx, noise, base, weight).loss

    plain, mixed = losses(engine.model, None), losses(engine.model, engine.base)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(mixed[1], plain[1], rtol=0.05)
    torch.testing.assert_close(losses(engine.model, engine.base, 3.0), mixed * torch.tensor([1.0, 3.0, 1.0]))
    at_home = copy.copy(engine.base).copied
    assert losses(at_home, engine.base)[1] < 1e-10


def test_full_fine_tuning_counts_the_copy(parts, tmp_path):
    plan = load_run_config([write_yaml(tmp_path / "c.yaml", content_of(parts, None, None))], TrainArgs)
    needs = {}
    for folders in ([str(parts.known)], []):
        config = dataclasses.replace(plan, args=dataclasses.replace(plan.args, prior_data=folders))
        needs[len(folders)] = planned_needs(config, plan_deepspeed(config.deepspeed, device_type="cpu"), 1)
    network = sum(v.numel() for v in read_transformer(parts.release / "transformer").network.values())
    assert needs[1].frozen - needs[0].frozen >= network


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("args.load=null", "args.prior_data keeps what a loaded model knows; set args.load"),
        ("args.train_data_weights=[1]", "one positive number for each of the 2 folders of train_data and prior_data"),
        ("args.prior_data=[/nowhere]", "args.prior_data: no folder /nowhere"),
        ("args.cuda_graphs=true", "args.prior_data does not go with args.cuda_graphs"),
        ("deepspeed.zero_optimization.stage=3", "args.prior_data does not go with deepspeed.zero_optimization.stage: 3"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(parts, tmp_path, override, message):
    path = write_yaml(tmp_path / "c.yaml", content_of(parts, None, None))
    overrides = [override, "args.mode=pretrain"] if "load" in override else [override]
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        train(load_run_config([path], TrainArgs, overrides=overrides))


def test_a_loss_that_takes_no_other_target_is_refused(parts, tmp_path):
    class OwnLoss(Loss):
        def __call__(self, network, denoiser, conditioner, z, batch, idx=None, noise=None):
            return z.flatten(1).mean(1)

    config = config_of(parts, tmp_path, None)
    engine = checked_engine(training_model_section(config.model, config.args), config.args, PLAN)
    engine.loss_fn = OwnLoss()
    with pytest.raises(ConfigError, match="args.prior_data does not go with the loss_fn_config OwnLoss"):
        check_switches(config.args, PLAN, engine)


def test_a_folder_is_new_or_known(parts, tmp_path):
    path = write_yaml(tmp_path / "c.yaml", content_of(parts, None, None))
    with pytest.raises(ConfigError, match="both name .*new; a folder is one or the other"):
        load_run_config([path], TrainArgs, overrides=[f"args.prior_data=[{parts.new}]"])

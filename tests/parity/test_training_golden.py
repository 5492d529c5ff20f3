"""Loss, gradients, trainable parameters, groups, optimizer and a whole training step against the original's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.optimizers.ema_adam import FusedEmaAdam
from sgm.training.optimizers.spec import parameter_groups
from sgm.training.step import batch_latents
from sgm.weights import assign_state
from tests.dit_tiny import load_tiny, tiny_config
from tests.training_tiny import model_section

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def recorded(golden):
    facts = json.loads((golden / "training_facts.json").read_text())
    return SimpleNamespace(**facts, io=load_file(golden / "training_io.safetensors"))


def engine(golden, lora: bool) -> SATVideoDiffusionEngine:
    """The reference network in an engine without text encoder and VAE."""
    section = model_section(golden)
    built = SATVideoDiffusionEngine(
        network_config=tiny_config(lora={"r": 4} if lora else None),
        denoiser_config=section["denoiser_config"],
        loss_fn_config=section["loss_fn_config"],
        not_trainable_prefixes=["all"] if lora else ["first_stage_model", "conditioner"],
    )
    load_tiny(built.network, lora=lora)
    built.freeze_untrained()
    return built.train()


def recorded_loss(built, recorded):
    """Per-sample loss (b,) at the recorded latents, text, timesteps and noise."""
    io = recorded.io
    conditioner = lambda batch: {"crossattn": io["loss.context"]}  # noqa: E731
    idx = torch.tensor(recorded.idx)
    return built.loss_fn(built.model, built.denoiser, conditioner, io["loss.x"], {}, idx=idx, noise=io["loss.noise"])


def check_gradients(built, names, norms):
    parameters = {n.removeprefix(PREFIX): p for n, p in built.named_parameters()}
    for name, expected in zip(names, norms, strict=True):
        if expected > 1e-8:  # key biases: a softmax does not feel them, their gradient is rounding
            assert float(parameters[name].grad.norm()) == pytest.approx(expected, rel=1e-4), name


def test_loss_and_every_gradient(golden, recorded):
    built = engine(golden, lora=False)
    loss = recorded_loss(built, recorded)
    torch.testing.assert_close(loss, torch.tensor(recorded.per_sample), rtol=1e-5, atol=0)
    loss.mean().backward()
    check_gradients(built, recorded.names, recorded.grad_norm)
    total = torch.stack([p.grad.norm() for p in built.parameters() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(recorded.grad_norm_total, rel=1e-4)


def test_lora_loss_and_every_gradient(golden, recorded):
    built = engine(golden, lora=True)
    loss = recorded_loss(built, recorded)
    torch.testing.assert_close(loss, torch.tensor(recorded.lora["per_sample"]), rtol=1e-5, atol=0)
    loss.mean().backward()
    check_gradients(built, recorded.lora["names"], recorded.lora["grad_norm"])


def test_what_is_trained_and_how_it_is_grouped(golden, recorded):
    built = engine(golden, lora=False)
    assert [n.removeprefix(PREFIX) for n in built.freeze_untrained()] == recorded.names
    trained = [(n.removeprefix(PREFIX), p) for n, p in built.named_parameters() if p.requires_grad]
    names = {id(p): recorded.names.index(n) for n, p in trained}
    groups = parameter_groups(built)
    assert [sorted(names[id(p)] for p in g["params"]) for g in groups] == [sorted(g) for g in recorded.groups]
    assert [g.get("weight_decay") for g in groups] == [None, 0.0]

    lora = engine(golden, lora=True)
    assert [n.removeprefix(PREFIX) for n in lora.freeze_untrained()] == recorded.lora["names"]
    (group,) = parameter_groups(lora)
    assert len(group["params"]) == len(recorded.lora["names"])


def test_optimizer_steps(recorded):
    io = recorded.io
    parameter = torch.nn.Parameter(io["opt.p0"].clone())
    optimizer = FusedEmaAdam([parameter], lr=2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    for k in range(1, 6):
        parameter.grad = io[f"opt.g{k}"].clone()
        optimizer.step()
        # two units in the last place: torch applies weight decay first, the original adds it to the update
        torch.testing.assert_close(parameter.data, io[f"opt.p{k}"], rtol=0, atol=2.5e-7)
        torch.testing.assert_close(optimizer.state[parameter]["shadow"], io[f"opt.shadow{k}"], rtol=0, atol=2.5e-7)


def test_whole_training_step(shared_golden, golden, monkeypatch):
    """Clip and captions to loss and gradient, with the recorded random draws in the original's order."""
    facts = json.loads((shared_golden / "engine_facts.json").read_text())["step"]
    io = load_file(shared_golden / "engine_io.safetensors")
    text = (shared_golden / "tiny_engine.yaml").read_text().replace("T5_DIR_PLACEHOLDER", str(golden / "t5_tiny"))
    built = SATVideoDiffusionEngine(**yaml.safe_load(text)["model"])
    load_tiny(built.network)
    stage = load_file(shared_golden / "vae_state_fp16.safetensors")
    assign_state(built.first_stage_model, {k: v.float() for k, v in stage.items()}, source="the reference VAE")
    built.freeze_untrained()
    built.train()

    gaussians = iter([io["step.posterior_noise"], io["step.noise"]])
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: next(gaussians).to(like))
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: torch.tensor(facts["keep"]).to(p))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(facts["idx"]))
    batch = {"mp4": io["step.mp4"].float(), "txt": facts["txt"]}
    z = batch_latents(built, batch, torch.device("cpu"))
    expected = io["step.latent_b_c_t_h_w"].transpose(1, 2)
    torch.testing.assert_close(z, expected, rtol=0, atol=5e-5)
    loss, logged = built(z, batch)
    assert float(loss.detach()) == pytest.approx(facts["loss"], rel=1e-5)
    # What the original logs, and what only we tell of each sample.
    assert list(logged) == [*facts["dict_keys"], "sample_loss", "timestep_share"]
    assert logged["loss"] == loss and float(logged["sample_loss"].mean()) == pytest.approx(facts["loss"], rel=1e-5)
    assert logged["timestep_share"].tolist() == pytest.approx([k / 1000 for k in facts["idx"]], abs=2e-3)
    loss.backward()
    total = torch.stack([p.grad.norm() for p in built.parameters() if p.grad is not None]).norm()
    assert float(total) == pytest.approx(facts["grad_norm_total"], rel=1e-4)

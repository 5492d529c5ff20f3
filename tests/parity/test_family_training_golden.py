"""Training 5B, 5B-I2V, 1.5 and 1.5-I2V against the original at tiny sizes: the loss alone, and whole steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.step import engine_inputs
from tests.family_tiny import KINDS, cases_of, engine_of, facts

PREFIX = "model.diffusion_model."
CPU = torch.device("cpu")


def trained(folder: Path, case: str) -> SATVideoDiffusionEngine:
    engine = engine_of(folder, case)
    engine.freeze_untrained()
    return engine.train()


def check_loss_and_gradients(engine: SATVideoDiffusionEngine, loss: Tensor, expected: Any, folder: Path, run: str):
    """Mean loss, every gradient's norm, the norm of all together, and the gradients that were recorded."""
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    recorded, cases = facts(folder)["grads"][run], cases_of(folder, run.partition(".")[0])
    found = {name: p.grad for name, p in engine.named_parameters() if p.grad is not None}
    assert set(found) == set(recorded["norm"])
    for name, norm in recorded["norm"].items():
        if norm > 1e-8:  # key biases: a softmax does not feel them, their gradient is rounding
            assert float(found[name].norm()) == pytest.approx(norm, rel=1e-4), name
    assert float(torch.stack([grad.norm() for grad in found.values()]).norm()) == pytest.approx(
        recorded["total"], rel=1e-4
    )
    start = f"{run}.grad."
    kept = [name for name in cases if name.startswith(start)]
    assert len(kept) >= 6
    for name in kept:
        grad = found[name.removeprefix(start).removesuffix(".rows0_4")]
        part = grad[:4] if name.endswith(".rows0_4") else grad[:, ::7] if "pos_embedding" in name else grad
        torch.testing.assert_close(part, cases[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", KINDS)
def test_loss_and_every_gradient(family_golden: Path, case: str) -> None:
    engine, cases, known = trained(family_golden, case), cases_of(family_golden, case), facts(family_golden)
    text = cases.get(f"{case}.loss.crossattn", cases.get(f"{case}.step.crossattn"))
    images = {"concat_images": cases[name]} if (name := f"{case}.loss.concat_images") in cases else {}
    loss = engine.loss(
        engine.model, engine.denoiser, lambda _: {"crossattn": text}, cases[f"{case}.loss.x"], images,
        idx=torch.tensor(known["idx"]), noise=cases[f"{case}.loss.noise"],
    )  # fmt: skip
    per_sample = known["train"][f"{case}.loss"]["per_sample"]
    torch.testing.assert_close(loss, torch.tensor(per_sample), rtol=1e-5, atol=0)
    check_loss_and_gradients(engine, loss.mean(), sum(per_sample) / 2, family_golden, f"{case}.loss")


class Text(torch.nn.Module):
    """Stands for the conditioner."""

    def __init__(self, crossattn: Tensor):
        super().__init__()
        self.crossattn = crossattn

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"crossattn": self.crossattn}


@pytest.mark.parametrize("case", ["i2v_5b", "i2v_15"])
@pytest.mark.parametrize("step", ["step", "step_dropped"])
def test_whole_step(family_golden: Path, case: str, step: str, monkeypatch) -> None:
    """From the clip's pixels to loss and gradients, with the recorded draws in the original's order.

    Of the step without pictures, whose draws were others, order and zeros are recorded.
    """
    engine, cases, known = trained(family_golden, case), cases_of(family_golden, case), facts(family_golden)
    recorded = known["train"][f"{case}.{step}"]
    calls: list[Any] = []

    def drawn(name: str, value: Any) -> Any:
        calls.append(name)
        return value

    gaussians = iter(f"{case}.step.{name}" for name in ("image_noise", "image_posterior", "video_posterior", "noise"))

    def randn_like(like: Tensor) -> Tensor:
        value = cases[next(gaussians)].to(like)
        return drawn("randn_like", value.view_as(like))

    log_sigma = cases[f"{case}.step.image_log_sigma"]
    monkeypatch.setattr(torch, "normal", lambda *_, size, **__: drawn("normal", log_sigma[: size[0]]))
    monkeypatch.setattr(random, "random", lambda: drawn("random.random", recorded["random_random"]))
    monkeypatch.setattr(torch, "randn_like", randn_like)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn("randint", torch.tensor(recorded["idx"])))
    engine.conditioner = Text(cases[f"{case}.step.crossattn"])

    z, batch = engine_inputs(engine, {"mp4": cases[f"{case}.step.mp4"].float()}, CPU)
    torch.testing.assert_close(z, cases[f"{case}.step.latents"], rtol=0, atol=2e-5)
    images = cases[f"{case}.step.concat_images"]
    images = torch.zeros_like(images) if step == "step_dropped" else images
    torch.testing.assert_close(batch["concat_images"], images, rtol=0, atol=2e-5)
    loss, _ = engine(z, batch)
    assert calls == [call[0] for call in recorded["random_calls"]]
    if step == "step":
        check_loss_and_gradients(engine, loss, recorded["loss"], family_golden, f"{case}.step")

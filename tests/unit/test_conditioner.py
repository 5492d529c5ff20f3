"""The conditioner: sorting, joining, dropout, guidance, and what its entries may say."""

from __future__ import annotations

import pytest
import torch

from sgm.modules.conditioner import AbstractEmbModel, GeneralConditioner, drop_samples
from sgm.typed import ConfigError
from sgm.util import TargetError, instantiate_from_config


class Constant(AbstractEmbModel):
    """Ones of a shape, b times the batch entry's number."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, *values):
        return self.weight * sum(v.view(-1, *[1] * len(self.shape)) for v in values) * torch.ones(self.shape)


@pytest.fixture
def constants(monkeypatch):
    """Conditioners of `Constant` embedders, which stand outside the packages that a YAML may name."""

    def build(*entries):
        monkeypatch.setattr("sgm.modules.conditioner.instantiate_from_config", lambda c: Constant(**c["params"]))
        return GeneralConditioner([{"target": "Constant", **entry} for entry in entries])

    return build


def entry(shape, **more):
    return {"params": {"shape": shape}, "input_key": "n", **more}


BATCH = {"n": torch.tensor([2.0, 3.0]), "m": torch.tensor([10.0, 20.0])}


def test_outputs_are_sorted_by_rank(constants):
    out = constants(entry([4]), entry([5, 6]), entry([3, 7, 2, 2]))(BATCH)
    assert {key: tuple(value.shape) for key, value in out.items()} == {
        "vector": (2, 4),
        "crossattn": (2, 5, 6),
        "concat": (2, 3, 7, 2, 2),
    }


def test_outputs_of_one_kind_are_joined(constants):
    kinds = ([4], [5, 6], [3, 7, 2, 2])
    out = constants(*(entry(shape) for shape in kinds), *(entry(shape) for shape in kinds))(BATCH)
    assert [tuple(out[key].shape) for key in ("vector", "crossattn", "concat")] == [
        (2, 8),
        (2, 5, 12),
        (2, 3, 14, 2, 2),
    ]


def test_several_inputs(constants):
    out = constants({"params": {"shape": [1]}, "input_keys": ["n", "m"]})(BATCH)
    assert out["vector"].flatten().tolist() == [12.0, 23.0]


def test_forced_zeros_are_by_input_key(constants):
    conditioner = constants(entry([1]), entry([1, 1], input_key="m"))
    cond, uncond = conditioner.get_unconditional_conditioning(BATCH, force_uc_zero_embeddings=["n"])
    assert cond["vector"].any() and not uncond["vector"].any() and uncond["crossattn"].any()


def test_dropout_zeroes_whole_samples_without_rescaling():
    embedding = torch.randn(1000, 3, 2)
    out = drop_samples(embedding, 0.25)
    kept = out.flatten(1).any(1)
    assert torch.equal(out[kept], embedding[kept])
    assert 0.68 < kept.float().mean().item() < 0.82
    assert drop_samples(embedding.half(), 0.25).dtype == torch.float16


def test_rates_are_restored_after_an_error(constants):
    conditioner = constants(entry([1], ucg_rate=0.3))
    with pytest.raises(ConfigError, match="needs n from the batch, which holds txt"):
        conditioner.get_unconditional_conditioning({"txt": 1})
    assert conditioner.embedders[0].ucg_rate == 0.3


def test_guidance_is_without_dropout(constants):
    conditioner = constants(entry([1], ucg_rate=1.0))
    assert not conditioner(BATCH)["vector"].any()
    assert all(part["vector"].all() for part in conditioner.get_unconditional_conditioning(BATCH))


def test_what_is_known_is_not_embedded_again(constants):
    conditioner = constants(entry([1]), entry([1, 1], input_key="m"))
    calls = []
    for embedder in conditioner.embedders:
        embedder.register_forward_hook(lambda *_: calls.append(1))
    other = {name: value + 1 for name, value in BATCH.items()}
    _, uncond = conditioner.get_unconditional_conditioning(BATCH, other, force_uc_zero_embeddings=["n"])
    assert len(calls) == 3 and torch.equal(uncond["crossattn"], conditioner(other)["crossattn"])
    assert torch.equal(uncond["vector"], torch.zeros_like(conditioner(other)["vector"]))
    calls.clear()
    longer = {name: torch.cat([value, value]) for name, value in BATCH.items()}
    _, uncond = conditioner.get_unconditional_conditioning(BATCH, longer, force_uc_zero_embeddings=["n", "m"])
    assert len(calls) == 4 and len(uncond["vector"]) == len(longer["n"])
    calls.clear()
    cond, uncond = conditioner.get_unconditional_conditioning(BATCH)
    assert len(calls) == 2 and torch.equal(cond["vector"], uncond["vector"])


def test_frozen_embedders_stay_in_eval_without_gradients(constants):
    frozen, trained = constants(entry([1]), entry([1], is_trainable=True)).train().embedders
    assert not frozen.training and not frozen.weight.requires_grad
    assert trained.training and trained.weight.requires_grad
    out = constants(entry([1], is_trainable=True))(BATCH)
    assert out["vector"].requires_grad


T5 = "sgm.modules.encoders.modules.FrozenT5Embedder"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"target": T5, "input_key": "txt", "ucg_rate": 1.5},
            r"emb_models\[0\].ucg_rate: must be .*at most 1, got 1.5",
        ),
        ({"target": T5, "legacy_ucg_value": ""}, "legacy_ucg_value stands beside"),
        ({"target": "torch.nn.Identity", "input_key": "txt"}, f"another role; choose {T5}"),
    ],
)
def test_entries_are_checked(entry, message):
    with pytest.raises(TargetError, match=message):
        instantiate_from_config({"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [entry]}})


def test_an_entry_names_what_it_embeds(constants):
    with pytest.raises(ConfigError, match="set input_key"):
        constants({"target": "x", "params": {"shape": [1]}})


def test_useless_rank(constants):
    with pytest.raises(ConfigError, match="gave shape"):
        constants(entry([]))(BATCH)

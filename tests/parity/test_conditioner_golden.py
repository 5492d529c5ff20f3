"""Tokens, T5 embeddings, unconditional conditions and caption dropout against the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from sgm.modules.conditioner import GeneralConditioner
from sgm.modules.encoders.modules import FrozenT5Embedder

CASES = (
    "plain",
    "short",
    "empty",
    "blank",
    "spaces",
    "long",
    "unknown",
    "fullwidth",
    "digits",
    "special_in_text",
    "punct",
)


@pytest.fixture(scope="module")
def facts(golden: Path) -> dict:
    return json.loads((golden / "cond_facts.json").read_text())


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "cond_io.safetensors")


@pytest.fixture(scope="module")
def embedder(golden: Path) -> FrozenT5Embedder:
    """The weights are exact in float16, as the file holds them; the references were computed in float32."""
    return FrozenT5Embedder(str(golden / "t5_tiny"), max_length=12).float()


@pytest.fixture
def conditioner(golden: Path) -> GeneralConditioner:
    entry = {
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(golden / "t5_tiny"), "max_length": 12, "device": "cpu"},
        "is_trainable": False,
        "input_key": "txt",
        "ucg_rate": 0.1,
    }
    return GeneralConditioner([entry]).float()


@pytest.mark.parametrize("case", CASES)
def test_tokens(embedder, facts, case):
    probe = facts["ids"][case]
    assert embedder.tokenize([probe["text"]]).ids[0].tolist() == probe["ids"]


def test_every_recorded_text_is_covered(facts):
    assert set(facts["ids"]) == set(CASES)


@pytest.mark.parametrize("case", ["plain", "short", "empty", "long", "digits", "punct"])
def test_embeddings(embedder, facts, tensors, case):
    out = embedder([facts["ids"][case]["text"]])
    assert (out - tensors[f"emb.{case}.out"]).abs().max() <= 1e-5


def test_embeddings_of_a_batch(embedder, facts, tensors):
    out = embedder([facts["ids"]["plain"]["text"], facts["ids"]["short"]["text"]])
    assert (out - tensors["emb.batch.out"]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_mask_would_be_seen(embedder, facts, tensors, golden):
    ids = embedder.tokenize([facts["ids"]["short"]["text"]]).ids
    theirs = transformers.T5EncoderModel.from_pretrained(golden / "t5_tiny", dtype=torch.float32)
    assert torch.equal(theirs(input_ids=ids).last_hidden_state, embedder.transformer(ids))
    masked = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert (masked - tensors["emb.short.out"]).abs().max() > 0.5


def test_unconditional_is_zero_when_forced_and_the_empty_text_otherwise(conditioner, facts, tensors):
    text = facts["ids"]["plain"]["text"]
    cond, uncond = conditioner.get_unconditional_conditioning({"txt": [text]}, {"txt": [""]}, ["txt"])
    assert list(cond) == list(uncond) == ["crossattn"]
    assert (cond["crossattn"] - tensors["emb.plain.out"]).abs().max() <= 1e-5
    assert torch.equal(uncond["crossattn"], tensors["cond.uc"]) and bool((uncond["crossattn"] == 0).all())
    _, unforced = conditioner.get_unconditional_conditioning({"txt": [text]}, {"txt": [""]})
    assert (unforced["crossattn"] - tensors["emb.empty.out"]).abs().max() <= 1e-5
    assert conditioner.embedders[0].ucg_rate == facts["ucg_rate_restored"]


@pytest.mark.parametrize("training", [True, False])
def test_caption_dropout(conditioner, facts, tensors, training):
    """Whole samples become zero, by the original's random draws, in training and in eval mode; the rest stays."""
    conditioner.train(training)
    conditioner.embedders[0].ucg_rate = 0.5
    torch.manual_seed(4321)
    out = conditioner({"txt": [facts["ids"]["plain"]["text"]] * 16})["crossattn"]
    kept = facts["ucg_kept_seed4321_rate0.5"]
    assert out.flatten(1).any(1).int().tolist() == kept
    wanted = tensors["emb.plain.out"] * torch.tensor(kept).view(16, 1, 1)
    assert (out - wanted).abs().max() <= 1e-5


def test_engine_keys(conditioner, shared_golden):
    wanted = json.loads((shared_golden / "cond_facts.json").read_text())["engine_keys"]
    ours = {f"conditioner.{name}": list(value.shape) for name, value in conditioner.state_dict().items()}
    assert ours == wanted


def test_full_reference_folder(embedder, shared_golden):
    """The float32 file of the reference set gives the same module."""
    other = FrozenT5Embedder(str(shared_golden / "t5_tiny"), max_length=12)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), embedder.parameters()))

"""T5's encoder against transformers' own, to the bit."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from sgm.modules.encoders.t5 import T5Config, T5EncoderModel, distance_buckets
from sgm.modules.encoders.t5_files import EncoderFilesError

SIZES = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_heads": 4}
GATED = T5Config(**SIZES, feed_forward_proj="gated-gelu")
FIRST = T5Config(**SIZES, relative_attention_num_buckets=16, relative_attention_max_distance=40)


def pair(config: T5Config, dtype: torch.dtype = torch.float32, scale: float = 3.0):
    """(ours, theirs) with the same random weights, in eval mode."""
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel as TheirModel

    torch.manual_seed(0)
    theirs = TheirModel(TheirConfig(**asdict(config)))
    for weight in theirs.parameters():
        weight.data.mul_(scale)
    ours = T5EncoderModel(config)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [GATED, FIRST], ids=["gated", "first"])
def test_values(config, dtype):
    ours, theirs = pair(config, dtype)
    ids = torch.randint(50, (3, 226))
    with torch.no_grad():
        found = ours(ids)
        assert found.isfinite().all() and same(found, theirs(input_ids=ids).last_hidden_state)


def test_names_and_order_are_the_same():
    ours, theirs = pair(GATED)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_float16_is_held_in_its_range_alike():
    """Where a sum leaves the range it is set to the range's end, less 1000."""
    ours, theirs = pair(GATED, torch.float16)
    for model in (ours, theirs):
        model.shared.weight.data[0] = 60000.0
        model.encoder.block[0].layer[0].SelfAttention.o.weight.data.fill_(20000.0)
    ids = torch.arange(12)[None]
    seen = []
    ours.encoder.block[0].layer[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        assert same(ours(ids), theirs(input_ids=ids).last_hidden_state)
    assert seen[0].abs().max() == torch.tensor(65504.0 - 1000).half()


def test_dropout_in_training_is_drawn_alike():
    ours, theirs = pair(GATED)
    ids = torch.randint(50, (2, 9))
    torch.manual_seed(7)
    found = ours.train()(ids)
    torch.manual_seed(7)
    assert same(found, theirs.train()(input_ids=ids).last_hidden_state)
    assert not same(found, ours(ids))


def test_buckets_of_distances():
    """Arithmetic of the reference's 32 buckets up to 128: a token's own is 0, later ones have the upper half."""
    found = distance_buckets(torch.tensor([0, -1, -7, -8, -127, -1000, 1, 7, 8, 128]), 32, 128)
    assert found.tolist() == [0, 1, 7, 8, 15, 15, 17, 23, 24, 31]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        (json.dumps({"d_model": "wide"}), "d_model 'wide'"),
        (json.dumps({"num_layers": 0, "feed_forward_proj": "gated-tanh"}), "num_layers 0, feed_forward_proj 'gated-tanh'"),
    ],
)
def test_damaged_configurations(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(EncoderFilesError, match=message):
        T5Config.read(path)


def test_a_configuration_as_transformers_writes_it(tmp_path):
    from transformers import T5Config as TheirConfig

    path = tmp_path / "config.json"
    path.write_text(json.dumps(TheirConfig(**asdict(GATED)).to_dict(), default=str))
    assert T5Config.read(path) == GATED
    path.write_text("{}")
    theirs = TheirConfig()
    assert T5Config.read(path) == T5Config(**{name: getattr(theirs, name) for name in asdict(GATED)})

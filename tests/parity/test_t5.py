"""Our T5 encoder and tokenizer against transformers': the same numbers to the bit, the same ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from sgm.modules.encoders.modules import FrozenT5Embedder, T5Tokenizer
from sgm.modules.encoders.t5 import T5Config, T5Encoder
from tests.convert_tiny import make_release
from tests.sampling_tiny import REPO
from tools.random_release import config_json

SIZES = {"vocab_size": 300, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 3, "num_heads": 4}
OTHERS = {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-4}


def pair(**changes) -> tuple[transformers.T5EncoderModel, T5Encoder]:
    """Theirs and ours, with the same weights, which are larger than at the start of training."""
    config = T5Config(**{**SIZES, "feed_forward_proj": "gated-gelu", **changes})
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**config_json(config))).eval()
    ours = T5Encoder(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "relu"}, OTHERS], ids=["v1.1", "v1.0", "other sizes"])
@torch.no_grad()
def test_embeddings_are_the_same_to_the_bit(changes, dtype):
    theirs, ours = (model.to(dtype) for model in pair(**changes))
    for length in (1, 17, 226):
        ids = torch.randint(SIZES["vocab_size"], (2, length))
        assert torch.equal(ours(ids), theirs(input_ids=ids).last_hidden_state)


@torch.no_grad()
def test_beyond_the_range_of_float16():
    theirs, ours = pair()
    for model in (theirs, ours):
        for name, weight in model.half().named_parameters():
            weight.mul_(300 if name.endswith((".o.weight", ".wo.weight")) else 1)
    largest = []
    for block in ours.encoder.block:
        block.register_forward_hook(lambda _, __, out: largest.append(float(out[0].abs().max())))
    ids = torch.randint(SIZES["vocab_size"], (2, 40))
    out, expected = ours(ids), theirs(input_ids=ids).last_hidden_state
    assert max(largest) == 64512 and torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_training_draws_the_same_dropout():
    theirs, ours = (model.train() for model in pair())
    ids = torch.randint(SIZES["vocab_size"], (2, 40))
    torch.manual_seed(3)
    expected = theirs(input_ids=ids).last_hidden_state
    torch.manual_seed(3)
    assert torch.equal(ours(ids), expected)


def test_names_of_tensors_and_their_order():
    for changes in ({}, {"feed_forward_proj": "relu"}):
        theirs, ours = pair(**changes)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path):
    """A random release's text encoder, read by both."""
    make_release(tmp_path)
    embedder = FrozenT5Embedder(str(tmp_path / "t5"), max_length=20)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    tokens = transformers.T5Tokenizer.from_pretrained(tmp_path / "t5")(
        "a small cat", padding="max_length", max_length=20
    )
    expected = theirs(input_ids=torch.tensor([tokens.input_ids])).last_hidden_state
    assert theirs.config.d_model == embedder.transformer.config.d_model
    assert torch.equal(embedder(["a small cat"]), expected)


# --- tokenizer --------------------------------------------------------------------------------------------------------

SPECIAL = ("</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<s>", "</S>", "▁", "▁▁")
BLANKS = (" ", "  ", "\n", "\t", "\r\n", "\x85", "\xa0", "\u2003", "\u200b", "\u2028", "\u3000", "\ufeff", "\0", "\xad")
RANGES = {
    "ascii": (0x20, 0x7F), "latin": (0xA0, 0x250), "combining": (0x300, 0x370), "arabic": (0x600, 0x700),
    "devanagari": (0x900, 0x980), "thai": (0xE01, 0xE5B), "jamo": (0x1100, 0x1200), "signs": (0x2000, 0x2C00),
    "kana": (0x3041, 0x3100), "cjk": (0x4E00, 0x4F00), "hangul": (0xAC00, 0xAD00), "wide": (0xFF01, 0xFFEF),
    "mathematical": (0x1D400, 0x1D500), "emoji": (0x1F1E6, 0x1F6FF), "any": (0x10000, 0x110000),
}  # fmt: skip
TEXTS = (
    "", " ", "\n", " leading", "trailing ", "two  spaces", "tab\tand\nnew line", "a</s>b", "a <extra_id_5> b", "ﬁne ²",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪", "红色的小船漂过平静的湖面。", "Zürich, naïve café, e\u0301", "-" * 200, "word " * 900,
)  # fmt: skip


def written(rng: random.Random) -> str:
    """A text of one script, now and then of another, with blanks and special tokens in it."""
    scripts = rng.choices(list(RANGES.values()), k=2)

    def part() -> str:
        kind = rng.random()
        if kind < 0.16:
            return rng.choice(BLANKS if kind < 0.13 else SPECIAL)
        return chr(rng.randrange(*scripts[kind > 0.8]))

    return "".join(part() for _ in range(rng.choice((1, 2, 5, 20, 60))))


def typed_texts() -> list[str]:
    """Captions and other lines of this repository."""
    files = [
        *(REPO / "configs").glob("*.txt"),
        *(REPO / "docs").glob("*.md"),
        *(REPO / "tools" / "demo").glob("*.jsonl"),
    ]
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["demo/t5", "tests/golden/t5_tiny"])
def tokenizers(request) -> tuple[transformers.T5Tokenizer, T5Tokenizer]:
    folder = REPO / request.param
    options = {"legacy": True, "clean_up_tokenization_spaces": False}
    return transformers.T5Tokenizer.from_pretrained(folder, **options), T5Tokenizer(folder / "spiece.model")


def test_ids_are_the_same(tokenizers):
    theirs, ours = tokenizers
    rng = random.Random(7)
    texts = [*TEXTS, *SPECIAL, *BLANKS, *typed_texts(), *(written(rng) for _ in range(3000))]
    assert len(texts) > 3400
    assert [text for text in texts if ours.encode(text) != theirs(text, verbose=False).input_ids] == []


def test_decoded_text_is_the_same(tokenizers):
    theirs, ours = tokenizers
    for text in typed_texts()[:400]:
        ids = ours.encode(text)
        for end in (ids, ids[1:], ids[len(ids) // 2 :]):
            assert ours.decode(end) == theirs.decode(end, skip_special_tokens=True)


def test_the_tokenizers_other_files_change_nothing(tmp_path):
    """The release's folder lists the sentinels with flags of their own."""
    folder = Path(shutil.copytree(REPO / "demo" / "t5", tmp_path / "t5"))
    ours = T5Tokenizer(folder / "spiece.model")
    flags = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    listed = json.loads((folder / "added_tokens.json").read_text())
    decoder = {str(k): {"content": name, **flags} for name, k in listed.items()}
    content = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    theirs = transformers.T5Tokenizer.from_pretrained(folder, clean_up_tokenization_spaces=False)
    for text in ("a  <extra_id_3> b <extra_id_99>", *TEXTS):
        assert ours.encode(text) == theirs(text, verbose=False).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("changes", [{}, {"pre_tokenizer": None}, {"normalizer": None}, {"normalizer": "more"}])
def test_a_folder_that_transformers_saved_has_the_same_ids(tmp_path, changes):
    """tokenizer.json alone; transformers builds T5's own pipeline, whatever the file says of one."""
    transformers.T5Tokenizer.from_pretrained(REPO / "demo" / "t5").save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if changes.get("normalizer") == "more":
        changes = {"normalizer": {"type": "Sequence", "normalizers": [content["normalizer"], {"type": "Lowercase"}]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
    for name in (
        "config.json",
        "model.safetensors.index.json",
        *(f"model-0000{k}-of-00002.safetensors" for k in (1, 2)),
    ):
        shutil.copy(REPO / "demo" / "t5" / name, tmp_path)
    theirs, ours = transformers.T5Tokenizer.from_pretrained(tmp_path), FrozenT5Embedder(str(tmp_path)).tokenizer
    rng = random.Random(8)
    texts = [*TEXTS, *SPECIAL, *BLANKS, *(written(rng) for _ in range(300))]
    assert [text for text in texts if ours.encode(text) != theirs(text, verbose=False).input_ids] == []

"""The T5 embedder: file layouts, damaged files, the hub, number types, truncated texts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgm.modules.encoders import t5_files
from sgm.modules.encoders.modules import FrozenT5Embedder, NonFiniteEmbeddingError, T5Tokenizer, text_is_local
from sgm.modules.encoders.t5 import read_config
from sgm.modules.encoders.t5_files import EncoderFilesError, wanted_files
from sgm.util import TargetError, instantiate_from_config
from sgm.weights import WeightsError
from tools.random_release import train_sentencepiece

LAST_BLOCK = "encoder.block.1.layer.1.DenseReluDense.wo.weight"


@pytest.fixture(scope="module")
def release(golden: Path) -> Path:
    return golden / "t5_tiny"


@pytest.fixture
def folder(release: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(release, tmp_path / "t5"))


@pytest.fixture(scope="module")
def embedder(release: Path) -> FrozenT5Embedder:
    return FrozenT5Embedder(str(release), max_length=12)


def load(folder: Path, **params) -> FrozenT5Embedder:
    return FrozenT5Embedder(str(folder), max_length=12, **params)


def same_weights(a: FrozenT5Embedder, b: FrozenT5Embedder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def shard(folder: Path) -> None:
    """Rewrite the single file as two shards with an index, the release's form."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


# --- file layouts -----------------------------------------------------------------------------------------------------


def test_shards(folder, embedder):
    shard(folder)
    assert same_weights(load(folder), embedder)


def test_diffusers_layout(folder, embedder, tmp_path):
    for sub, names in (
        ("text_encoder", ["config.json", "model.safetensors"]),
        ("tokenizer", ["spiece.model", "tokenizer_config.json", "special_tokens_map.json"]),
    ):
        (tmp_path / "repo" / sub).mkdir(parents=True)
        for name in names:
            shutil.move(folder / name, tmp_path / "repo" / sub / name)
    assert same_weights(load(tmp_path / "repo"), embedder)


def test_tokenizer_files_of_the_release(folder, embedder):
    """The release's folder also lists T5's 100 sentinel tokens, in three files; nothing changes by that."""
    sentinels = {f"<extra_id_{k}>": 459 - k for k in range(100)}
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special["additional_special_tokens"] = list(sentinels)
    flags = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    plain = {**flags, "lstrip": False, "rstrip": False}
    decoder = {str(k): {"content": token, **plain} for k, token in enumerate(("<pad>", "</s>", "<unk>"))}
    decoder |= {str(k): {"content": token, **flags} for token, k in sentinels.items()}
    config = {
        **special,
        "added_tokens_decoder": decoder,
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": True,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    for name, content in (
        ("added_tokens.json", sentinels),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
    ):
        (folder / name).write_text(json.dumps(content))
    shard(folder)
    assert len(list(folder.iterdir())) == 8
    texts = ["A small red boat.", "", "  two   spaces ", "end <extra_id_0>", "left </s> right <pad>", "a cat " * 20]
    assert torch.equal(load(folder).tokenize(texts).ids, embedder.tokenize(texts).ids)


def test_pickled_weights(folder, embedder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same_weights(load(folder), embedder)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_one_name_of_the_embedding_is_enough(folder, embedder, name):
    def keep_one(state):
        table = state.pop("shared.weight", None)
        other = state.pop("encoder.embed_tokens.weight", None)
        state[name] = other if table is None else table

    rewrite(folder, keep_one)
    loaded = load(folder)
    assert same_weights(loaded, embedder)
    assert loaded.transformer.shared.weight is loaded.transformer.encoder.embed_tokens.weight


def test_decoder_of_a_full_checkpoint_is_left_out(folder, embedder):
    rewrite(
        folder,
        lambda state: state.update(
            {"decoder.final_layer_norm.weight": torch.ones(32), "lm_head.weight": torch.ones(4, 32)}
        ),
    )
    assert same_weights(load(folder), embedder)


def test_loading_is_silent_and_offline(release):
    """Nor are transformers and torch's compiler imported, each of which takes longer to import than torch."""
    code = (
        "import sys; from sgm.modules.encoders.modules import FrozenT5Embedder; "
        "e = FrozenT5Embedder(sys.argv[1], max_length=12); e(['a cat ' * 600]); "
        "assert 'tokenizers' in sys.modules; assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(release)],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- damaged or incomplete folders ------------------------------------------------------------------------------------


def test_absent_folder():
    with pytest.raises(EncoderFilesError, match=r"folder ./no/such/t5 does not exist.*text_encoder/ and tokenizer/"):
        FrozenT5Embedder("./no/such/t5")


def test_everything_missing_is_listed_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    for part in ("config.json", "spiece.model", "model.safetensors", "To get the folder"):
        assert part in str(caught.value)


def test_missing_vocabulary(folder):
    (folder / "spiece.model").unlink()
    with pytest.raises(EncoderFilesError, match="missing: .*spiece.model"):
        load(folder)


def test_missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EncoderFilesError, match=r"model-00002-of-00002.safetensors \(named in model.safetensors.index"):
        load(folder)


def change_config(folder: Path, **changes) -> None:
    """Other values in config.json; None leaves a field out."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"d_kv": None, "num_heads": None},
            r"2 problems in .*config\.json:\n.*d_kv is missing\n.*num_heads is missing",
        ),
        ({"d_model": "wide"}, "config.d_model: expected a whole number, got 'wide'"),
        ({"num_layers": 0, "layer_norm_epsilon": -1}, "2 problems(.|\n)*config.num_layers: must be at least 1, got 0"),
        ({"feed_forward_proj": "gated-silu"}, "'gated-silu' is not one of 'relu', 'gated-gelu'"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance must exceed"),
        ({"d_model": 64}, "wrong shape(.|\n)*The configuration is .*config.json"),
    ],
)
def test_wrong_configuration(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_fields_that_a_configuration_may_lack(folder, embedder):
    others = ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate")
    change_config(folder, **dict.fromkeys(others), strange=[1])
    assert torch.equal(load(folder)(["a cat"]), embedder(["a cat"]))
    change_config(folder, feed_forward_proj=None)
    with pytest.raises(WeightsError, match=r"DenseReluDense.wi.weight"):  # the ungated one of T5 1.0
        load(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "config.json cannot be read"), ("[]", "it holds a list")])
def test_unreadable_configuration(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=message):
        load(folder)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_truncated_vocabulary(folder, share):
    content = (folder / "spiece.model").read_bytes()
    (folder / "spiece.model").write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="spiece.model is no sentencepiece model .*copy or download it again"):
        load(folder)


def test_empty_or_foreign_vocabulary(folder):
    foreign = train_sentencepiece(["a cat", "a dog"] * 20, 12).replace(b"<pad>", b"<bos>")
    for content in (b"", foreign):
        (folder / "spiece.model").write_bytes(content)
        with pytest.raises(WeightsError, match="spiece.model is no whole vocabulary of T5"):
            load(folder)


@pytest.mark.parametrize("name", ["config.json", "spiece.model", "tokenizer.json"])
def test_damage_without_checksums_is_refused_or_read(folder, name):
    """Bytes flipped, lost and doubled: whatever the libraries raise, or panic with, becomes one error."""
    if name == "tokenizer.json":
        T5Tokenizer(folder / "spiece.model")._tokenizer.save(str(folder / name))
    path, rng = folder / name, random.Random(3)
    whole = path.read_bytes()
    for k in range(60):
        place = rng.randrange(len(whole))
        end = place + (1, 40, 0, 1)[k % 4]
        middle = (bytes([whole[place] ^ 1 << k % 8]), b"", whole[place : place + 90], b"\xff")[k % 4]
        path.write_bytes(whole[:place] + middle + whole[end:])
        with contextlib.suppress(WeightsError):
            tokenizer = T5Tokenizer(path if name != "config.json" else folder / "spiece.model")
            tokenizer.decode(tokenizer.encode("A ﬁne ① naïve cat <extra_id_3> ---- 月"))
            read_config(folder / "config.json")


def test_unreadable_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="no index of weight shards"):
        load(folder)


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="model.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(LAST_BLOCK), "missing from the file"),
        (lambda state: state.update({"stray": torch.ones(1)}), "not of this model"),
        (lambda state: state.update({LAST_BLOCK: torch.ones(3, 3)}), "wrong shape"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_code_in_a_pickle_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Path}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="was not loaded"):
        load(folder)


# --- hub --------------------------------------------------------------------------------------------------------------


def test_hub_without_network_or_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderFilesError, match=r"'google/t5-v1_1-xxl' is neither.*text_encoder/ and tokenizer/"):
        FrozenT5Embedder("google/t5-v1_1-xxl", cache_dir=str(tmp_path))


def hub_cache(release, folder) -> None:
    """As the hub's library leaves someone/t5 behind."""
    repo = folder / "models--someone--t5"
    for place in ("blobs", "refs", "snapshots/abc123"):
        (repo / place).mkdir(parents=True)
    for file in release.iterdir():
        content, is_large = file.read_bytes(), file.suffix == ".safetensors"
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
        blob = repo / "blobs" / (hashlib.sha256(content) if is_large else git).hexdigest()
        blob.write_bytes(content)
        (repo / "snapshots" / "abc123" / file.name).symlink_to(blob)
    (repo / "refs" / "main").write_text("abc123")


def model_with_texts(*params) -> dict:
    target = "sgm.modules.encoders.modules.FrozenT5Embedder"
    return {"conditioner_config": {"params": {"emb_models": [{"target": target, "params": p} for p in params]}}}


def test_whether_the_text_encoder_is_local(release, tmp_path):
    here, cache = {"model_dir": str(release)}, str(tmp_path / "cache")
    hub_cache(release, tmp_path / "cache")
    hub = {"model_dir": "someone/t5"}
    assert text_is_local(model_with_texts(here)) and text_is_local(model_with_texts(hub | {"cache_dir": cache}))
    assert not text_is_local(model_with_texts(hub | {"cache_dir": str(tmp_path)}))
    assert not text_is_local(model_with_texts(here, {"model_dir": str(tmp_path / "absent" / "t5")}))
    assert text_is_local({})  # nothing to be read


def test_hub_cache_is_used_without_network(release, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_cache(release, tmp_path)
    found = FrozenT5Embedder("someone/t5", max_length=12, cache_dir=str(tmp_path))
    assert same_weights(found, embedder)
    for name in ("config.json", "spiece.model", "model.safetensors"):  # each damaged where it still can be read
        blob = next(tmp_path.rglob(f"snapshots/*/{name}")).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if name == "model.safetensors" else whole + b"\n")
        with pytest.raises(WeightsError, match=f"{name} is not what .*blobs/{blob.name} lists.*: delete .*{blob.name}"):
            FrozenT5Embedder("someone/t5", max_length=12, cache_dir=str(tmp_path))
        blob.write_bytes(whole)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            ["config.json", "spiece.model", "pytorch_model.bin", "tf_model.h5", "README.md"],
            ["config.json", "pytorch_model.bin", "spiece.model"],
        ),
        (
            [
                "model_index.json",
                "text_encoder/config.json",
                "text_encoder/model.safetensors.index.json",
                "text_encoder/model-00001-of-00002.safetensors",
                "text_encoder/model-00002-of-00002.safetensors",
                "tokenizer/spiece.model",
                "tokenizer/added_tokens.json",
                "transformer/diffusion_pytorch_model.safetensors",
            ],
            [
                "text_encoder/config.json",
                "text_encoder/model-00001-of-00002.safetensors",
                "text_encoder/model-00002-of-00002.safetensors",
                "text_encoder/model.safetensors.index.json",
                "tokenizer/added_tokens.json",
                "tokenizer/spiece.model",
            ],
        ),
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "spiece.model"],
            ["config.json", "model.safetensors", "spiece.model"],
        ),
    ],
)
def test_only_what_is_needed_is_downloaded(names, wanted):
    assert wanted_files(names) == wanted


# --- embedder ---------------------------------------------------------------------------------------------------------


def test_meta_construction_reads_no_weights(release, embedder, monkeypatch):
    monkeypatch.setattr(t5_files.T5Files, "read_weights", lambda self: pytest.fail("weights were read"))
    with torch.device("meta"):
        empty = load(release)
    assert all(p.is_meta for p in empty.parameters()) and empty.state_dict().keys() == embedder.state_dict().keys()
    with pytest.raises(ValueError, match="holds no weights yet"):
        empty(["a cat"])
    monkeypatch.undo()
    empty.load_weights(dtype=torch.float32)
    assert not any(p.is_meta for p in empty.parameters()) and not empty.training
    assert not any(p.requires_grad for p in empty.parameters())
    assert torch.equal(empty(["a cat"]), load(release).float()(["a cat"]))


def test_types(release, embedder):
    assert {p.dtype for p in embedder.parameters()} == {torch.float16}  # the file's own
    with torch.device("meta"):
        brain = load(release)
    brain.load_weights(dtype=torch.bfloat16)
    assert {p.dtype for p in brain.parameters()} == {torch.bfloat16}
    out = brain(["a small cat"])
    assert out.dtype == torch.bfloat16
    reference = load(release).float()(["a small cat"])
    assert (out.float() - reference).abs().max() < 0.1 * reference.abs().max()


def test_reloading_repairs_changed_weights(release, embedder):
    other = load(release).float()
    with torch.no_grad():
        other.transformer.shared.weight.zero_()
    other.load_weights()
    assert other.transformer.shared.weight.dtype == torch.float32
    assert torch.equal(other.transformer.shared.weight, embedder.transformer.shared.weight.float())


def test_inf_in_the_embedding_is_an_error(release):
    broken = load(release).float()
    broken.transformer.encoder.final_layer_norm.weight = torch.nn.Parameter(torch.full((32,), torch.inf))
    with pytest.raises(NonFiniteEmbeddingError, match="bf16"):
        broken(["a cat"])


def test_truncation_is_told(embedder):
    long = "A small red boat drifts across a quiet lake."
    tokens = embedder.tokenize(["A cat.", long, ""])
    assert tokens.ids.shape == (3, 12) and tokens.ids.dtype == torch.int64
    assert tokens.truncated[0] == tokens.truncated[2] == ""
    assert tokens.truncated[1] and long.endswith(tokens.truncated[1].strip())
    assert tokens.ids[1, -1] == 1 and tokens.ids[2].tolist() == [1] + [0] * 11


def test_a_script_that_the_vocabulary_lacks_is_warned_of(embedder, caplog):
    for text in ("一只猫在雨中奔跑", "a cat in the rain", "一只猫在雨中奔跑"):
        embedder.tokenize(text)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "50% of the tokens of '一只猫在雨中奔跑' are unknown to the text encoder" in warning


def test_exact_fit_is_not_truncated(embedder):
    text = "a a a a"
    count = len(embedder.tokenizer.encode(text))
    fitting, short = (FrozenT5Embedder(str(embedder.files.tokenizer), max_length=k) for k in (count, count - 1))
    assert fitting.tokenize([text]).truncated == [""] and fitting.tokenize([text]).ids.shape == (1, count)
    assert short.tokenize([text]).truncated != [""] and short.tokenize([text]).ids[0, -1] == 1


def test_one_string_is_one_text(embedder):
    assert torch.equal(embedder("a cat"), embedder(["a cat"]))


def test_blocks_are_the_encoders_in_order(embedder):
    seen = []
    handles = [block.register_forward_hook(lambda *_, k=k: seen.append(k)) for k, block in enumerate(embedder.blocks())]
    embedder(["a cat"])
    for handle in handles:
        handle.remove()
    assert seen == [0, 1]


def test_frozen_by_default_trainable_on_request(release):
    assert not load(release).train().training and not load(release)(["a cat"]).requires_grad
    free = load(release, freeze=False).float()
    assert free(["a cat"]).requires_grad


def test_bad_length(release):
    params = {"model_dir": str(release), "max_length": 0}
    with pytest.raises(TargetError, match="max_length: must be at least 1"):
        instantiate_from_config({"target": f"{FrozenT5Embedder.__module__}.FrozenT5Embedder", "params": params})


def test_no_warnings(release, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        load(release)(["a cat"])
    assert not caplog.records

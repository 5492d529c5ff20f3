"""A complete release folder with random weights, for any configuration from tiny to full size.

Same files, names, shapes and types as a real release: `transformer/latest` and
`transformer/1000/mp_rank_00_model_states.pt` (the transformer alone, without the computed position table, as
published), `vae/3d-vae.pt` and a text-encoder folder.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.files import atomic_write, write_text
from sgm.modules.encoders.modules import EXTRA_IDS
from sgm.modules.encoders.t5 import T5Config, T5Encoder
from sgm.places import CONFIGS
from sgm.util import instantiate_from_config
from sgm.weights.files import WeightsError
from sgm.weights.release import NETWORK_PREFIX
from sgm.weights.save import Deferred, save_pt, save_safetensors

logger = logging.getLogger(__name__)

ITERATION = 1000
_SHARDS = 2


def write_random_release(
    model: Mapping[str, Any],
    out: Path,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    t5_name: str = "t5",
) -> None:
    """Write `out/transformer`, `out/vae/3d-vae.pt` (float32) and `out/{t5_name}` for a `model:` section.

    Values are scaled so that activations keep a sensible size in half precision at every depth.

    Raises:
        WeightsError: `out/transformer` exists already.
    """
    if (out / "transformer").exists():
        raise WeightsError(f"{out / 'transformer'} exists already; choose another folder or remove it.")
    generator = torch.Generator(device).manual_seed(seed)
    _write_text_encoder(model, out / t5_name, dtype, generator)
    vae = _meta(model["first_stage_config"])
    save_pt(_made(out / "vae") / "3d-vae.pt", {"state_dict": _random_state(vae, torch.float32, generator)})
    network = _meta(model["network_config"])
    absent = set(network.computed_state())
    state = _random_state(network, dtype, generator, leave_out=absent)
    folder = _made(out / "transformer" / str(ITERATION))
    save_pt(folder / "mp_rank_00_model_states.pt", {"module": {NETWORK_PREFIX + n: t for n, t in state.items()}})
    write_text(out / "transformer" / "latest", str(ITERATION))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _meta(config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return instantiate_from_config(config)


def _random_state(
    module: nn.Module, dtype: torch.dtype, generator: torch.Generator, leave_out: Iterable[str] = ()
) -> dict[str, Tensor]:
    skipped = set(leave_out)
    return {
        name: random_tensor(name, tuple(t.shape), generator).to(dtype).cpu()
        for name, t in module.state_dict().items()
        if name not in skipped
    }


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights with variance 1/fan-in (He-like sizes keep), gains near one, small biases."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("bias") and len(shape) == 1:
        return values * 0.02
    if len(shape) == 1:
        return 1.0 + values * 0.02
    return values * (torch.Size(shape[1:]).numel() ** -0.5)


# --- text encoder ------------------------------------------------------------------------------------------------


def _write_text_encoder(model: Mapping[str, Any], folder: Path, dtype: torch.dtype, generator: torch.Generator) -> None:
    width = model["network_config"]["params"]["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    spiece = train_sentencepiece(_corpus())
    config = _t5_config(width, piece_count(spiece) + EXTRA_IDS)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in T5Encoder(config).named_parameters()}

    def make(name: str) -> Tensor:
        return _t5_tensor(name, shapes[name], generator).to(dtype).cpu()

    tensors = {n: Deferred(shape, dtype, partial(make, n)) for n, shape in shapes.items()}
    write_text_encoder(folder, config, spiece, tensors, max_length=226)


def write_text_encoder(
    folder: Path, config: T5Config, spiece: bytes, tensors: Mapping[str, Tensor | Deferred], *, max_length: int
) -> None:
    """Write a T5 encoder as the release has it: two shards with their index, config, spiece.model, tokenizer's JSON.

    Args:
        config: its `vocab_size` is at least pieces + EXTRA_IDS.
        spiece: the bytes of a sentencepiece model.
        tensors: by the names of `T5Encoder`, the tied embedding once as `shared.weight`.
        max_length: tokens of a caption, as told to others who load the tokenizer.
    Raises:
        SaveError: a file cannot be written.
    """
    _made(folder)
    names = list(tensors)
    index: dict[str, str] = {}
    for k in range(_SHARDS):
        file = f"model-{k + 1:05d}-of-{_SHARDS:05d}.safetensors"
        part = names[k * len(names) // _SHARDS : (k + 1) * len(names) // _SHARDS]
        save_safetensors(folder / file, {n: tensors[n] for n in part}, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_text(folder / "model.safetensors.index.json", json.dumps(content, indent=1))
    write_text(folder / "config.json", json.dumps(config_json(config), indent=1))
    atomic_write(folder / "spiece.model", lambda file: file.write(spiece))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_text(folder / "special_tokens_map.json", json.dumps(special, indent=1))
    extra = {f"<extra_id_{i}>": piece_count(spiece) + EXTRA_IDS - 1 - i for i in range(EXTRA_IDS)}
    write_text(folder / "added_tokens.json", json.dumps(extra, indent=1))
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": EXTRA_IDS, "model_max_length": max_length, **special}
    write_text(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=1))


def config_json(config: T5Config) -> dict[str, Any]:
    """The content of a config.json, with what transformers reads beside the sizes."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **asdict(config),
        "is_gated_act": config.gated,
        "dense_act_fn": "gelu_new" if config.gated else "relu",
        "num_decoder_layers": config.num_layers,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_factor": 1.0,
        "classifier_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def _t5_config(width: int, vocabulary: int) -> T5Config:
    """T5 v1.1 XXL's sizes for width 4096, small ones otherwise."""
    if width == 4096:
        sizes = {"vocab_size": 32128, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    else:
        sizes = {"vocab_size": vocabulary, "d_kv": max(8, width // 4), "d_ff": width * 5 // 2, "num_layers": 2}
        sizes["num_heads"] = 4
    return T5Config(d_model=width, **sizes, feed_forward_proj="gated-gelu")


def _t5_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = random_tensor(name, shape, generator)
    if name.endswith(".q.weight"):  # T5 does not divide scores by sqrt(d_kv)
        return values * 8**-0.5
    if "shared" in name or "relative_attention_bias" in name:
        return torch.randn(shape, generator=generator, device=generator.device)
    return values


def _corpus() -> list[str]:
    from string import ascii_letters, digits, punctuation

    text = (CONFIGS / "test.txt").read_text(encoding="utf-8").splitlines()
    return [*text, *(" ".join(ascii_letters + digits + punctuation) for _ in range(2))]


def train_sentencepiece(lines: Iterable[str], vocabulary: int = 400, *, fold_case: bool = False) -> bytes:
    """A unigram model with T5's special ids (pad 0, eos 1, unk 2, no bos), as the bytes of a spiece.model.

    `fold_case`: capitals are read as small letters, which T5's own vocabulary does not do.
    """
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=vocabulary, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
        normalization_rule_name="nmt_nfkc_cf" if fold_case else "nmt_nfkc",
    )  # fmt: skip
    return written.getvalue()


def piece_count(spiece: bytes) -> int:
    """The vocabulary of a spiece.model's bytes."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()

"""The text encoder: captions to embeddings by a frozen T5 (Raffel et al. 2020, arXiv 1910.10683; v1.1).

Shape letters: b batch, l tokens, d width of the encoder (4096 for XXL).
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from sgm.errors import SgmError
from sgm.modules.conditioner import AbstractEmbModel, GeneralConditioner
from sgm.modules.encoders import t5_files
from sgm.modules.encoders.t5 import DECODER, SHARED, TIED, T5Encoder, read_config
from sgm.typed import PathText, Range
from sgm.util import get_obj_from_str
from sgm.weights import WeightsError, assign_state
from sgm.weights.checksums import AGAIN, read_bytes, read_json
from sgm.weights.save import is_finite

FIRST = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2: padding, end of sequence, unknown
EXTRA_IDS = 100  # sentinels <extra_id_N> of T5's pre-training, after the model's pieces, the last one first
UNKNOWN_SHARE = 0.1  # of a text's tokens, from which on it is warned of; a script without pieces gives half and more
_SPACE = "▁"


class T5Tokenizer:
    """Text to ids by a unigram model of sentencepiece (Kudo 2018, arXiv 1804.10959): those of transformers 5.

    It runs such a model with the package `tokenizers`, as here. Sentencepiece's own runtime gives others where two ways
    to split are equally likely (long rows of dashes), and for some combining marks.

    Args: vocabulary: a spiece.model, or a tokenizer.json, of which transformers 5 too takes no more than pieces and
    character map; nothing else decides over ids.

    Raises:
        WeightsError: the file is damaged, or no model of T5's.
    """

    pad_token_id = 0
    eos_token_id = 1

    def __init__(self, vocabulary: Path) -> None:
        self.vocabulary = vocabulary
        read = _of_json if vocabulary.suffix == ".json" else _of_spiece
        try:
            pieces, charsmap = read(vocabulary)
            if tuple(name for name, _ in pieces[: len(FIRST)]) != FIRST:
                raise WeightsError(f"{vocabulary} is no whole vocabulary of T5; {AGAIN}.")
            self._tokenizer = _tokenizer(pieces, charsmap)
        except WeightsError:
            raise
        except Exception as error:  # tokenizers and protobuf have errors of their own
            raise WeightsError(f"{vocabulary} is no sentencepiece model or tokenizer ({error}); {AGAIN}.") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the end of sequence. Raises WeightsError: the vocabulary is damaged after all."""
        try:
            return [*self._tokenizer.encode(text).ids, self.eos_token_id]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's, which has no other name in Python
                raise
            raise WeightsError(f"{self.vocabulary} has a damaged map of characters ({error}); {AGAIN}.") from error

    def unknown_share(self, ids: Sequence[int]) -> float:
        """How many of a text's tokens, the end of sequence aside, stand for what the vocabulary has no piece for."""
        return list(ids).count(FIRST.index("<unk>")) / max(1, len(ids) - 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids)


def _tokenizer(pieces: Sequence[tuple[str, float]], charsmap: bytes) -> Any:
    """`tokenizers.Tokenizer` of pieces with scores, and of a map of characters, empty where there is none."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    sentinels = [f"<extra_id_{k}>" for k in reversed(range(EXTRA_IDS))]
    pieces = [piece for piece in pieces if piece[0] not in sentinels] + [(name, 0.0) for name in sentinels]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=FIRST.index("<unk>")))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace(_SPACE, "always")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*FIRST, *sentinels)])
    return tokenizer


def _of_spiece(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto.FromString(read_bytes(path))  # type: ignore[attr-defined]
    whole = model.HasField("normalizer_spec")  # the last field that ids need
    return [(p.piece, p.score) for p in model.pieces if whole], model.normalizer_spec.precompiled_charsmap


def _of_json(path: Path) -> tuple[list[tuple[str, float]], bytes]:
    content = read_json(path)
    normalizer = content["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    charsmap = next((step["precompiled_charsmap"] for step in steps if "precompiled_charsmap" in step), "")
    return [(name, score) for name, score in content["model"]["vocab"]], base64.b64decode(charsmap)


__all__ = ["FrozenT5Embedder", "GeneralConditioner", "NonFiniteEmbeddingError", "TokenizedPrompts", "text_is_local"]

logger = logging.getLogger(__name__)

UNKNOWN_TOLD = 10  # texts that are named
T5_XXL = "google/t5-v1_1-xxl"
Tokens = Annotated[int, Range(1, 65536)]


class NonFiniteEmbeddingError(SgmError):
    """A text embedding holds inf or nan."""


@dataclass(frozen=True)
class TokenizedPrompts:
    """Token ids of prompts, and what did not fit.

    Attributes:
        ids: int64 (b, max_length): tokens, end-of-sequence (1), then padding (0).
        truncated: one text a prompt: the end that was cut off, "" where all of it fits.
    """

    ids: Tensor
    truncated: list[str]


class FrozenT5Embedder(AbstractEmbModel):
    """The T5 encoder, every caption padded or cut to the same length.

    No attention mask is used: padding is attended to and has embeddings of its own, which the transformer was trained
    to see.

    Args:
        model_dir: folder with config.json, safetensors (sharded with an index) or pytorch_model.bin, and spiece.model;
            or one with the subfolders text_encoder/ and tokenizer/; or a hub id.
        device: where the weights are loaded to; None for the CPU. Sampling and training move the module as they need.
        max_length: tokens a caption, with the end-of-sequence token (226 for CogVideoX).
        cache_dir: the hub's cache folder; None for its default.
    Raises:
        EncoderFilesError: files are missing.
        WeightsError: files are damaged or do not fit the configuration.

    Weights are loaded on construction, except under `torch.device("meta")`; then `load_weights` fills the module, or a
    checkpoint that contains it.
    """

    def __init__(
        self,
        model_dir: PathText = T5_XXL,
        device: torch.device | str | None = None,
        max_length: Tokens = 77,
        freeze: bool = True,
        cache_dir: PathText | None = None,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.files = t5_files.resolve(str(model_dir), cache_dir)
        self.tokenizer = T5Tokenizer(self.files.vocabulary)
        self._unknown: set[str] = set()  # texts that were warned of
        with torch.device("meta"):
            self.transformer = T5Encoder(read_config(self.files.config))
        self.frozen = freeze
        if freeze:
            self.freeze()
        if not torch.empty(0).is_meta:
            self.load_weights(device=device)

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenT5Embedder:
        super().train(mode and not self.frozen)
        return self

    def load_weights(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Fill the module from its files, one tensor at a time, straight to `device` and `dtype`.

        Args:
            device: None for where the module lives; a new one is filled on the CPU, with tensors that stay mapped from
                the file as long as nothing casts or moves them.
            dtype: None for the files' own (a module filled before keeps its own). float16 is what `.half()` of the
                loaded module gives.
        Raises:
            WeightsError: damaged files; missing, unexpected or wrongly shaped tensors (decoder tensors of a full T5
                are left out by name).
        """
        state = self.files.read_weights()
        for name, other in ((SHARED, TIED), (TIED, SHARED)):
            if other in state:
                state.setdefault(name, state[other])
        assign_state(
            self.transformer,
            state,
            source=", ".join(str(path) for path in self.files.weights),
            device=device,
            dtype=dtype,
            ignore_prefixes=DECODER,
            hint=f"The configuration is {self.files.config}.",
        )

    @property
    def device(self) -> torch.device:
        """Where token ids must go: the device of the token embedding."""
        return self.transformer.shared.weight.device

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks in order, for a memory manager that brings them to the device one by one."""
        return list(self.transformer.encoder.block)

    def tokenize(self, texts: str | Sequence[str]) -> TokenizedPrompts:
        """Ids of b texts on the CPU. Texts over max_length - 1 tokens are cut there; the result says what was lost."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.full((len(texts), self.max_length), self.tokenizer.pad_token_id, dtype=torch.long, device="cpu")
        truncated = []
        for row, text, tokens in zip(ids, texts, map(self.tokenizer.encode, texts)):
            self._warn_of_unknown(text, self.tokenizer.unknown_share(tokens))
            cut: list[int] = []
            if len(tokens) > self.max_length:
                *kept, end = tokens
                cut, tokens = kept[self.max_length - 1 :], [*kept[: self.max_length - 1], end]
            row[: len(tokens)] = torch.tensor(tokens, device="cpu")
            truncated.append(self.tokenizer.decode(cut) if cut else "")
        return TokenizedPrompts(ids, truncated)

    def _warn_of_unknown(self, text: str, share: float) -> None:
        if share < UNKNOWN_SHARE or text in self._unknown or len(self._unknown) >= UNKNOWN_TOLD:
            return
        self._unknown.add(text)
        logger.warning(
            "%.0f%% of the tokens of %r are unknown to the text encoder, which reads them all alike; write it in a "
            "language that it knows%s", 100 * share, text[:60],
            " (further texts of this kind are not named)" if len(self._unknown) == UNKNOWN_TOLD else "",
        )  # fmt: skip

    def encode(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings (b, l, d) of b texts, in the weights' type and on their device.

        Raises:
            ValueError: the weights were not loaded.
            NonFiniteEmbeddingError: inf or nan in the result (float16 has a small range).
        """
        if self.device.type == "meta":
            raise ValueError("the text encoder holds no weights yet: call load_weights() or load a checkpoint.")
        ids = self.tokenize(texts).ids.to(self.device)
        no_grad = torch.no_grad() if self.frozen else nullcontext()
        with no_grad, torch.autocast(self.device.type, enabled=False):
            embedding = self.transformer(ids)
        if not is_finite(embedding):
            raise NonFiniteEmbeddingError(
                f"the text encoder gave inf or nan in {embedding.dtype}. T5 can leave the range of float16: run in "
                "bfloat16 (sampling: --set args.fp16=false --set args.bf16=true; training: --set "
                "deepspeed.fp16.enabled=false --set deepspeed.bf16.enabled=true), and check that the weight files are "
                "whole."
            )
        return embedding

    def forward(self, texts: str | Sequence[str]) -> Tensor:
        """Same as `encode`."""
        return self.encode(texts)


def text_is_local(model: Mapping[str, Any]) -> bool:
    """Whether the files of every text encoder of a model section can be read here and now; nothing is fetched."""
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    texts = [e for e in embedders if issubclass(get_obj_from_str(e["target"]), FrozenT5Embedder)]
    params = [{"model_dir": T5_XXL, **(e.get("params") or {})} for e in texts]
    return all(t5_files.is_local(str(p["model_dir"]), p.get("cache_dir")) for p in params)

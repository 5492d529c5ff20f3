"""T5's tokenizer: text to ids by a unigram model of sentencepiece (Kudo 2018, arXiv 1804.10959).

The ids are those of transformers 5, which runs such a model with the package `tokenizers`. Sentencepiece's own runtime
gives others where two ways to split are equally likely (long rows of dashes), and for some combining marks.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgm.weights import WeightsError
from sgm.weights.checksums import AGAIN, read_bytes, read_json

FIRST = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2: padding, end of sequence, unknown
EXTRA_IDS = 100  # sentinels <extra_id_N> of T5's pre-training, after the model's pieces, the last one first
UNKNOWN_SHARE = 0.1  # of a text's tokens, from which on it is warned of; a script without pieces gives half and more
_SPACE = "▁"


class T5Tokenizer:
    """Args: vocabulary: a spiece.model, or a tokenizer.json, of which transformers 5 too takes no more than pieces and
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

"""T5's tokenizer: text to ids by a unigram model of sentencepiece (Kudo 2018, arXiv 1804.10959).

The ids are those of transformers 5, which runs such a model with the package `tokenizers`. Sentencepiece's own runtime
gives others where two ways to split are equally likely (long rows of dashes), and for some combining marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgm.weights import WeightsError

FIRST = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2: padding, end of sequence, unknown
EXTRA_IDS = 100  # sentinels <extra_id_N> of T5's pre-training, after the model's pieces, the last one first
_SPACE = "▁"


class T5Tokenizer:
    """Args: spiece: a spiece.model; nothing else decides over ids.

    Raises:
        WeightsError: the file is damaged, or no model of T5's.
    """

    pad_token_id = 0
    eos_token_id = 1

    def __init__(self, spiece: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

        model = _read_model(spiece)
        sentinels = [f"<extra_id_{k}>" for k in reversed(range(EXTRA_IDS))]
        vocabulary = [(piece.piece, piece.score) for piece in model.pieces] + [(name, 0.0) for name in sentinels]
        self._tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=FIRST.index("<unk>")))
        if model.normalizer_spec.precompiled_charsmap:
            self._tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always")]
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        self._tokenizer.decoder = decoders.Metaspace(_SPACE, "always")
        self._tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*FIRST, *sentinels)])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the end of sequence."""
        return [*self._tokenizer.encode(text).ids, self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids)


def _read_model(path: Path) -> Any:
    """A `ModelProto`, which protobuf makes without a type."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2 as messages

    try:
        model = messages.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    except (OSError, DecodeError) as error:
        raise WeightsError(f"{path} is no sentencepiece model ({error}); copy or download it again.") from error
    first = tuple(piece.piece for piece in model.pieces[: len(FIRST)])
    if first != FIRST or not model.HasField("normalizer_spec"):
        raise WeightsError(f"{path} is no whole vocabulary of T5; copy or download it again.")
    return model

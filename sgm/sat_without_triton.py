"""SwissArmyTransformer where there is no Triton (macOS).

`import sat` reaches for Triton because of one class, `FastRotaryEmbedding`, that language models of SAT use and this
project does not. Where Triton is absent, that module of SAT is taken by a stand-in, before anything imports `sat`.
"""

from __future__ import annotations

import importlib.util
import sys
import types

MODULE = "sat.model.position_embedding.triton_rotary_embeddings"


class FastRotaryEmbedding:
    """In place of SAT's: what asks for it is told what is missing."""

    def __init__(self, *_: object, **__: object):
        raise ModuleNotFoundError("SAT's FastRotaryEmbedding needs Triton, which has no release for this platform")


def stand_in() -> None:
    """Put the stand-in where SAT looks for its module, if Triton is not installed."""
    if importlib.util.find_spec("triton") is None and MODULE not in sys.modules:
        module = types.ModuleType(MODULE, __doc__)
        module.FastRotaryEmbedding = FastRotaryEmbedding  # type: ignore[attr-defined]
        sys.modules[MODULE] = module

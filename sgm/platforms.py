"""What SwissArmyTransformer and DeepSpeed need to be told on a Mac, before anything imports them.

`import sat` reaches for Triton, which has no release there, because of one class, `FastRotaryEmbedding`, that language
models of SAT use and this project does not: a stand-in takes the place of that module of SAT. DeepSpeed
0.19.8 takes the GPU of a Mac (its `accelerator/real_accelerator.py`), which nothing here uses.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

ROTARY = "sat.model.position_embedding.triton_rotary_embeddings"


class FastRotaryEmbedding:
    """In place of SAT's: what asks for it is told what is missing."""

    def __init__(self, *_: object, **__: object):
        raise ModuleNotFoundError("SAT's FastRotaryEmbedding needs Triton, which has no release for this platform")


def prepare() -> None:
    """Put the stand-in where SAT looks for its module, if there is no Triton; on a Mac keep DeepSpeed to the CPU."""
    if not _has_triton() and ROTARY not in sys.modules:
        module = types.ModuleType(ROTARY, __doc__)
        module.FastRotaryEmbedding = FastRotaryEmbedding  # type: ignore[attr-defined]
        sys.modules[ROTARY] = module
    if sys.platform == "darwin":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _has_triton() -> bool:
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None

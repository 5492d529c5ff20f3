"""Joint attention over text and video tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sgm.errors import SgmError


class AttentionError(SgmError):
    """An implementation of attention does not run here; the message says why."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v without a mask; all tensors (b, heads, n, hd), strided views welcome.

    Every token sees every other: the text's padding takes part as well, as in the original (Vaswani et al. 2017,
    eq. 1; CogVideoX, arXiv:2408.06072, section 2.2).
    """
    return F.scaled_dot_product_attention(query, key, value)

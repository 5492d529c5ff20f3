"""Reading and writing model weights: safe readers, the release's folder layout, strict assignment into modules.

Nothing here knows a particular network; `sgm.models` and `sgm.inference` say which file goes where.
"""

import torch

from sgm.weights.assign import assign_state
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, weights_fingerprint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

__all__ = ["DTYPES", "WeightsError", "WeightsNotFoundError", "assign_state", "read_checkpoint", "weights_fingerprint"]

"""Reading and writing model weights: safe readers, the release's folder layout, strict assignment into modules.

Nothing here knows a particular network; `sgm.models` and `sgm.inference` say which file goes where.
"""

from sgm.weights.assign import assign_state
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, weights_fingerprint

__all__ = ["WeightsError", "WeightsNotFoundError", "assign_state", "read_checkpoint", "weights_fingerprint"]

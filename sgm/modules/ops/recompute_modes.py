"""What of a layer is recomputed in the backward pass, by name. Needs nothing: options import it, too."""

from __future__ import annotations

MODES = (False, True, "selective", "products")

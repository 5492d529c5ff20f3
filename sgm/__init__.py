"""CogVideoX in SAT style: a YAML-driven text-to-video diffusion engine. Start reading at `sgm/models/diffusion.py`."""

import os
import sys

from sgm import lean_sat

__version__ = "0.1.0"

lean_sat.install()
if sys.platform == "darwin":
    # DeepSpeed 0.19.8 takes the GPU of a Mac (its accelerator/real_accelerator.py), which nothing here uses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

"""CogVideoX in SAT style: a YAML-driven text-to-video diffusion engine. Start reading at `sgm/models/diffusion.py`."""

import os
import sys

from sgm import lean_sat

__version__ = "0.1.0"

lean_sat.install()
# Threads that wait for one another soon sleep. By default those of PyTorch's OpenMP spin for milliseconds, which keeps
# the one that they wait for from its core as soon as other programs run, too. Read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if sys.platform == "darwin":
    # DeepSpeed 0.19.8 takes the GPU of a Mac (its accelerator/real_accelerator.py), which nothing here uses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

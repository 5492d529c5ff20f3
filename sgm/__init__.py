"""CogVideoX in SAT style: a YAML-driven text-to-video diffusion engine. Start reading at `sgm/models/diffusion.py`."""

from sgm.sat_without_triton import stand_in

__version__ = "0.1.0"

stand_in()

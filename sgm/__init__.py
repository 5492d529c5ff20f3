"""CogVideoX in SAT style: a YAML-driven text-to-video diffusion engine. Start reading at `sgm/models/diffusion.py`."""

from sgm.platforms import prepare

__version__ = "0.1.0"

prepare()

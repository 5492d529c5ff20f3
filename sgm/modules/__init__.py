"""The parts a model is put together from: conditioning, transformer pieces, autoencoding, diffusion mathematics."""

from sgm.modules.conditioner import GeneralConditioner

__all__ = ["GeneralConditioner"]

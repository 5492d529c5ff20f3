"""The parts a model is put together from: conditioning, transformer pieces, autoencoding, diffusion mathematics."""

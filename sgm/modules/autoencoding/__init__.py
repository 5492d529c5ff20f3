"""The 3D causal video autoencoder's parts: convolutions, blocks, encoder and decoder, posterior."""

"""Optimizers of training, and the rate's schedule."""

"""Clips for training: reading videos, choosing and cropping frames, datasets, order, validation."""

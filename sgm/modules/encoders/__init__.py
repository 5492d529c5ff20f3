"""Encoders that turn conditions (captions) into embeddings."""

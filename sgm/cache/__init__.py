"""Encoded clips: stored by content, read in place of videos and captions."""

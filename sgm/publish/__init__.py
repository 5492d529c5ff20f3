"""A trained adapter as others find and use it: its file for every reader, a model card, sample clips, the upload."""

"""The diffusion transformer in parts: one SAT mixin a file, the block that they share in `block.py`."""

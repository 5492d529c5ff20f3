"""Several processes for one clip: branches of guidance, shares of the tokens, chunks of a decode. Put onto an engine
from outside, which then computes as on one device.
"""

"""Between SAT's weight layout and others': key maps as tables, one adapter each way. Knows tensors and names only."""

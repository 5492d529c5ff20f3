"""Few-step students: a network that needs a few passes and no guidance, learned from prompts alone."""

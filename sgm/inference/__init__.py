"""From a run configuration to video files: options, prompts, placement of the parts, sampling, writing."""

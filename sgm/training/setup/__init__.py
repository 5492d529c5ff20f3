"""From a configuration to a DeepSpeed engine, loaders and checks."""

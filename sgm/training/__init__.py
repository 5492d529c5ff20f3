"""Fine-tuning on DeepSpeed: options, optimizer, schedule, the training loop and its checkpoints."""

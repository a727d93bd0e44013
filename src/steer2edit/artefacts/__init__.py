"""An edit as files: edit files, adapters, biases, checkpoints; and the audit of a checkpoint."""

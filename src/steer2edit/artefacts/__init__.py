"""An edit as files: its own, adapters, biases, checkpoints; and the audit of a checkpoint."""

"""Training: what the edits are compared with that does take gradients, rank-1 LoRA and full fine-tuning.

Both train on the positive traces of a run. Every checkpoint is a candidate: it is tried on the same items, by the same
measures and under the same limits as the edits.
"""

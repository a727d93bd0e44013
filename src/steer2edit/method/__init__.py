"""The paper's method: tensors and data in, tensors and data out; no files, no model classes, no hooks."""

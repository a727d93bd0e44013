"""A run directory and its stages."""

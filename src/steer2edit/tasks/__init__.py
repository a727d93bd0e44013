"""Utility tasks: what a changed model can still do, by known test sets."""

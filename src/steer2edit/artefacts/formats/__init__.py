"""Formats of few bits per weight: how each is recognised, turned into numbers, and written again in its own layout."""

"""Edits written for other tools."""

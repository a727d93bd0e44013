"""Engines make and score text under interventions."""

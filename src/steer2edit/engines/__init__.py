"""Engines make text and score text under interventions, a different one in every row."""

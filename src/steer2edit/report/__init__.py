"""What a run found: figures and a page."""

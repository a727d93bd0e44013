"""The search: candidates, the bench they are tried on, the rounds, the front and the choice."""

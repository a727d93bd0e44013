"""The paper's experiments as one command: what each suite runs, what it costs, and its tables and figures."""

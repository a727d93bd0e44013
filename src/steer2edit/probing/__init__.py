"""From traces to scores: spans of tokens, one pass of forward hooks, the closed form."""

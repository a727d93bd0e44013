"""The guided command: what to change, what it costs, which point of the front, and what to do with it."""

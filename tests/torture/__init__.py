"""Steer2Edit under load and damage: what is killed, bent, filled up and flipped here must cost nothing.

`python -m torture --out FOLDER`, with tests/ on PYTHONPATH, runs every part, or goes on with a run that was stopped.
Each part is a module with a kind of damage; what it found of each case is a line of a journal in the folder. With
`--lanes 2` two processes share the cases.
"""

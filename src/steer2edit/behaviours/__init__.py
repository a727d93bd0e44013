"""Behaviours: how traces are made and labelled, and what number says how much of the behaviour a model shows."""

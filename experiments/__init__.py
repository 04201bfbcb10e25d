"""Experiments with gum_optax: the commands a person types, and a room for each kind of work."""

"""Experiments with gum_optax: pretraining, a demo, and learning-rate grids."""

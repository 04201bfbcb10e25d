"""GUM in the models of other libraries: Flax NNX and Flax Linen."""

"""Examples: GUM in models of Flax NNX and Flax Linen, and a swarm of particles."""

"""Time and memory of GUM beside other optimizers: `python -m experiments.benchmarks`."""

"""What GUM costs beside other optimizers: `python -m experiments.benchmarks`."""

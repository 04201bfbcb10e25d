"""One training run: options, loop, optimizers, checkpoints, metrics; and many side by side."""

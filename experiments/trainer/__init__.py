"""Training: options, optimizers, loop, checkpoints and metrics of one run; sets of many runs."""

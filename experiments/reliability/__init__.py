"""Trials of the library: random trees, long runs, killed processes."""

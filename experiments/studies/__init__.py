"""The studies: each compares runs or gradients, and writes a result file and a figure."""

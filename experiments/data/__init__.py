"""Data: text to tokens to batches for pretraining, examples to batches for fine-tuning."""

"""From text to tokens to batches, and from questions to answers to learn."""

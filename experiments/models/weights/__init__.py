"""Weights of other programs: Hugging Face directories and GGUF files."""

"""Pretrained weights in the formats of other programs: Hugging Face directories and GGUF files."""

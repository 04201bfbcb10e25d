"""The model, its presets and its decoding; `weights` reads the formats of other programs."""

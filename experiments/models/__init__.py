"""The network, its presets and its decoding; weights in the formats of others."""

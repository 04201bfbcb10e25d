"""Settings of GaLore's C4 experiments by the name of the model: the values of the option `recipe`.

Models, ranks, numbers of tokens, batches of 512 x 256 and warm-up are from Zhao et al., arXiv
2403.03507; period and full-rank layers are from GUM, Pan et al., arXiv 2510.17802. Two things
differ. GaLore pads documents; windows here are full, so that the same tokens make fewer steps.
GaLore uses T5's tokenizer; here a BPE of the same size is trained unless the option `tokenizer`
names one. Options that are given beside a recipe override it.
"""

from experiments.trainer.config import Config, Recipe
from experiments.trainer.methods import Gum


def _c4(preset: Recipe, rank: int, tokens: float) -> Config:
    """Returns the configuration for a model, trained on so many tokens of C4."""
    batch_size, seq_len = 512, 256
    return Config(
        run_dir=f"runs/{preset}",
        recipe=preset,
        preset=preset,
        corpus=("allenai/c4:en",),
        tokenizer_chars=1_000_000_000,
        max_tokens=int(tokens),
        dtype="bfloat16",
        batch_size=batch_size,
        seq_len=seq_len,
        steps=round(tokens / (batch_size * seq_len)),
        warmup=0.1,
        optimizer=Gum(rank=rank, period=200, full_rank_layers=2),
        validate_every=1000,
        checkpoint_every=1000,
    )


RECIPES = {
    "60m": _c4("60m", 128, 1.1e9),
    "130m": _c4("130m", 256, 2.2e9),
    "350m": _c4("350m", 256, 6.4e9),
    "1b": _c4("1b", 512, 13.1e9),
}

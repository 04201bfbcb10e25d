"""The compression that ended nearest to full-rank Muon with less than half a byte per parameter.

Tests: tests/library/test_recipes.py.
"""

from typing import Any

import jax

from gum_optax import carries, residuals, storages
from gum_optax._compression import LowRank


def compact(
    rank: Any = 128, period: int = 200, *, scale: float | jax.Array = 4.0, **parts: Any
) -> LowRank:
    """Low rank in 8 bits, with an orthogonalized residual: for `gum` in the least memory.

    Momentum of low rank follows the bases, rotated at each refresh. The gradient outside of the
    bases has no momentum and is orthogonalized, see `residuals.orthogonalized`. Projected moments
    and bases are kept in 8 bits. With a rank of a quarter of the width this is 0.4 bytes for each
    parameter, where AdamW has 8; with half of the width it is 0.8.

    Args:
      rank: as for `LowRank`; a quarter of the width in our studies.
      period: as for `LowRank`.
      scale: as for `residuals.orthogonalized`.
      **parts: any other option of `LowRank`, for example ``storage=storages.plain()``.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` and `residuals.orthogonalized` do.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(3e-3, gum_optax.compact(rank=64), consistent_rms=0.2)
    """
    own = {
        "residual": residuals.orthogonalized(scale),
        "carry": carries.rotate,
        "storage": storages.int8(),
        "basis_storage": storages.int8(),
    }
    # Options in `parts` take the place of ours.
    return LowRank(rank, period, **own | parts)

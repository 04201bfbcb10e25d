r"""Unequal probabilities: which of N things to draw more often, and how to draw exactly gamma.

*Inclusion probabilities* q_1 ... q_N say how likely each of N things is to be drawn; they sum up to
gamma, the number that is drawn on average. An estimate that divides what is drawn by its own
probability is unbiased for any q > 0, and its variance depends on q.

Tests: tests/library/test_inclusion.py.
"""

from typing import Any

import jax
import jax.numpy as jnp


def water_filling(sizes: jax.Array, total: Any) -> jax.Array:
    r"""Probabilities in proportion to sizes, as far as no probability exceeds one.

    .. math:: p_i = \min(1, \lambda w_i), \qquad \textstyle\sum_i p_i = \text{total}

    Of all independent draws of so many on average, these have the least variance
    ``sum_i w_i^2 (1 / p_i - 1)``. If all sizes are zero, the probabilities are equal; so they are
    among things that have to be drawn beyond those with a size.

    Args:
      sizes: w >= 0, ``[N]``.
      total: the sum of the probabilities, in [0, N].

    Returns:
      p, ``[N]``, in the dtype of ``sizes``.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import samplers
      >>> samplers.water_filling(jnp.array([8.0, 1.0, 1.0, 2.0]), 2)
      Array([1.  , 0.25, 0.25, 0.5 ], dtype=float32)
    """
    count = sizes.shape[0]
    total = jnp.minimum(jnp.asarray(total, sizes.dtype), count)
    # 1. Largest first. If k things have probability one, the others share total - k:
    #    lambda_k = (total - k) / (sum of all but the k largest)
    order = jnp.argsort(-sizes)
    largest = sizes[order]
    rest = jnp.cumsum(largest[::-1])[::-1]  # rest[k]: the sum of all but the k largest
    k = jnp.arange(count)
    level = jnp.where(rest > 0, (total - k) / jnp.where(rest > 0, rest, 1), jnp.inf)
    # 2. The least k for which the next one's probability is at most one.
    fits = level * largest <= 1
    full = jnp.argmax(fits)
    share = jnp.where(k < full, 1.0, level[full] * largest)
    # 3. Without such a k, all that have a size are drawn, and the others equally.
    has_size = largest > 0
    left = jnp.maximum(count - jnp.sum(has_size), 1)
    without = jnp.where(has_size, 1.0, (total - jnp.sum(has_size)) / left)
    share = jnp.where(jnp.any(fits & (rest > 0)), share, without)
    return jnp.zeros_like(sizes).at[order].set(jnp.clip(share, 0, 1).astype(sizes.dtype))


def systematic(key: jax.Array, probabilities: jax.Array, gamma: int) -> jax.Array:
    r"""Draws exactly gamma of N things, each with exactly its own probability.

    The probabilities are laid end to end on [0, gamma], and every thing is drawn in whose part one
    of the points u, u + 1, ..., u + gamma - 1 lies, for one u uniform on [0, 1). No part is longer
    than one, so nothing is drawn twice. A random order first: otherwise neighbours would never be
    drawn together.

    Args:
      key: a typed key.
      probabilities: q, ``[N]``, each in [0, 1], with the sum gamma.
      gamma: how many are drawn.

    Returns:
      ``int32[gamma]``, the numbers of the things, all different.
    """
    of_order, of_point = jax.random.split(key)
    order = jax.random.permutation(of_order, probabilities.shape[0])
    # In float32 whatever the x64 flag says: it must not change a draw.
    u = jax.random.uniform(of_point, (), jnp.float32)
    return at_point(order, probabilities, u, gamma)


def at_point(order: jax.Array, probabilities: jax.Array, u: Any, gamma: int) -> jax.Array:
    """The draw of `systematic` in a given order, with the points u, u + 1, ..."""
    ends = jnp.cumsum(jnp.asarray(probabilities, jnp.float32)[order])
    # Rounding must not leave the last point beyond the last part.
    ends = ends * (gamma / ends[-1])
    where = jnp.searchsorted(ends, u + jnp.arange(gamma, dtype=jnp.float32), side="right")
    return order[jnp.minimum(where, len(order) - 1)].astype(jnp.int32)

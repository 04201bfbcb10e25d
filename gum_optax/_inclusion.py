r"""Unequal probabilities: which of N items to draw more often, and how to draw exactly gamma.

*Inclusion probabilities* q_1 ... q_N are the probabilities that each of N items is drawn; their sum
is gamma, the mean number of drawn items. An estimate that divides each drawn item by its own
probability is unbiased for any q > 0, and its variance depends on q.

Tests: tests/library/test_inclusion.py.
"""

from typing import Any

import jax
import jax.numpy as jnp


def water_filling(sizes: jax.Array, total: Any) -> jax.Array:
    r"""Returns probabilities in proportion to sizes, but at most one.

    .. math:: p_i = \min(1, \lambda w_i), \qquad \textstyle\sum_i p_i = \text{total}

    Among all probabilities of independent draws with this sum, these have the least variance
    ``sum_i w_i^2 (1 / p_i - 1)``. If ``total`` exceeds the number of items with a size, all of
    those get probability one, and the items of size zero share the rest equally.

    Args:
      sizes: w >= 0, ``[N]``.
      total: the sum of the probabilities, in [0, N]; more counts as N.

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
    # 2. The least k for which the probability of the next one, lambda_k w_k, is at most one.
    fits = level * largest <= 1
    full = jnp.argmax(fits)
    share = jnp.where(k < full, 1.0, level[full] * largest)
    # 3. Without such a k, all items with a size are drawn, and the others share the remainder.
    has_size = largest > 0
    left = jnp.maximum(count - jnp.sum(has_size), 1)
    without = jnp.where(has_size, 1.0, (total - jnp.sum(has_size)) / left)
    share = jnp.where(jnp.any(fits & (rest > 0)), share, without)
    return jnp.zeros_like(sizes).at[order].set(jnp.clip(share, 0, 1).astype(sizes.dtype))


def systematic(key: jax.Array, probabilities: jax.Array, gamma: int) -> jax.Array:
    r"""Draws exactly gamma of N items, each with exactly its own probability.

    The probabilities are laid end to end on [0, gamma] as intervals. An item is drawn if one of the
    points u, u + 1, ..., u + gamma - 1 lies in its interval, for one u uniform on [0, 1). No
    interval is longer than one, so no item is drawn twice. The items are put into a random order
    first, since neighbours would otherwise never be drawn together.

    Args:
      key: a typed key.
      probabilities: q, ``[N]``, each in [0, 1], with the sum gamma.
      gamma: the number of items to draw, an int.

    Returns:
      ``int32[gamma]``, the numbers of the drawn items, all different.

    References:
      Systematic sampling with unequal probabilities, after Madow, Annals of Mathematical
      Statistics, 1949.
    """
    of_order, of_point = jax.random.split(key)
    order = jax.random.permutation(of_order, probabilities.shape[0])
    # In float32 always: a draw must not depend on the x64 flag.
    u = jax.random.uniform(of_point, (), jnp.float32)
    return at_point(order, probabilities, u, gamma)


def at_point(order: jax.Array, probabilities: jax.Array, u: Any, gamma: int) -> jax.Array:
    """Returns the draw of `systematic` for a given order and the points u, u + 1, ..."""
    # ends[i]: the upper end of the interval of item order[i].
    ends = jnp.cumsum(jnp.asarray(probabilities, jnp.float32)[order])
    # Rounding must not leave the last point beyond the last interval.
    ends = ends * (gamma / ends[-1])
    where = jnp.searchsorted(ends, u + jnp.arange(gamma, dtype=jnp.float32), side="right")
    return order[jnp.minimum(where, len(order) - 1)].astype(jnp.int32)

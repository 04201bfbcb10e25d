"""Samplers: how many matrices of a group are drawn for a period, and which.

A sampler is a function from the number of matrices N of a group to a `Sampling`; any function of
this signature plugs into ``residuals.sampled(...)``. The gradient estimate is unbiased if each
matrix is drawn with exactly the probability that the sampler states (arXiv 2510.17802).

Example:
  A sampler that always draws the first matrix of a group (biased, so for tests alone):

  >>> import jax.numpy as jnp
  >>> from gum_optax import samplers
  >>> def first(count):
  ...     return samplers.Sampling(1, 1 / count, lambda key: jnp.zeros(1, jnp.int32))

Tests: tests/library/test_samplers.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import _checks
from gum_optax._inclusion import water_filling as water_filling


class Sampling(NamedTuple):
    """How one group of N matrices is sampled.

    Attributes:
      slots: number of full-size slots that the state holds for the group.
      probability: q, the probability that a given matrix is drawn in a period. At 1 the group is
        uncompressed.
      draw: ``key -> int32[slots]``, the matrix that each slot serves for the period; N stands for
        an empty slot. No matrix may be given twice.
    """

    slots: int
    probability: float
    draw: Callable[[jax.Array], jax.Array]


Sampler = Callable[[int], Sampling]


def fixed_size(gamma: int) -> Sampler:
    """Draws exactly gamma of the N matrices of a group, without replacement.

    Each matrix is drawn with probability exactly ``q = gamma / N``, and the state holds gamma slots
    whatever is drawn.

    Args:
      gamma: an int >= 0, clipped to ``N // 2``. A single matrix is always drawn, so that its
        group is uncompressed. Zero is `none`.

    Returns:
      The sampler.

    Raises:
      TypeError, ValueError: if ``gamma`` is not an int >= 0.

    Example:
      >>> from gum_optax import samplers
      >>> sampling = samplers.fixed_size(2)(8)
      >>> sampling.slots, sampling.probability
      (2, 0.25)

    References:
      Pan et al., arXiv 2510.17802, where q = gamma / N_L.
    """
    gamma = _checks.non_negative_int("gamma", gamma)

    def sampler(count: int) -> Sampling:
        if gamma == 0:
            return none(count)
        # At most half: a group that is mostly drawn saves little over momentum at full size.
        slots = min(gamma, count // 2)
        if slots == 0:
            return Sampling(count, 1.0, lambda key: jnp.arange(count, dtype=jnp.int32))
        return Sampling(
            slots,
            slots / count,
            # The first gamma of a random order: every subset of this size is equally likely.
            lambda key: jax.random.permutation(key, count)[:slots].astype(jnp.int32),
        )

    return sampler


def bernoulli(probability: float) -> Sampler:
    """Draws each matrix independently with the given probability.

    The number drawn is random, so the state holds N slots: no memory is saved over full momentum.
    It is for groups of a single matrix, as in the paper's counterexample, and for studies.

    Args:
      probability: q, a number in (0, 1).

    Returns:
      The sampler.

    Raises:
      TypeError, ValueError: if ``probability`` is not a number in (0, 1).

    Example:
      >>> from gum_optax import samplers
      >>> samplers.bernoulli(0.5)(1).slots
      1

    References:
      Pan et al., arXiv 2510.17802, Figure 1.
    """
    _checks.hyperparameter("probability", probability)
    q = float(probability)
    if not 0.0 < q < 1.0:
        raise ValueError(
            f"`probability` must lie strictly between 0 and 1, got {probability!r}; for 0 use "
            "`samplers.none`, for 1 use the inner transformation without `low_rank`."
        )

    def sampler(count: int) -> Sampling:
        def draw(key: jax.Array) -> jax.Array:
            # In float32 whatever the x64 flag says: it must not change a draw.
            drawn = jax.random.uniform(key, (count,), jnp.float32) < q
            # Slot i serves matrix i or nobody, which N stands for.
            return jnp.where(drawn, jnp.arange(count), count).astype(jnp.int32)

        return Sampling(count, q, draw)

    return sampler


def none(count: int) -> Sampling:
    """Draws nothing, so that every residual is dropped: GaLore, which is biased.

    Args:
      count: N, the number of matrices in the group.

    Returns:
      A `Sampling` without slots.

    Example:
      >>> from gum_optax import samplers
      >>> samplers.none(8).slots
      0
    """
    del count
    return Sampling(0, 0.0, lambda key: jnp.zeros((0,), jnp.int32))


def resolve(sampler: Any, count: int) -> Sampling:
    """Calls a sampler for a group of ``count`` matrices and checks what it returns."""
    sampling = _checks.function("sampler", sampler, "(count) -> samplers.Sampling")(count)
    if not isinstance(sampling, Sampling):
        raise TypeError(
            f"`sampler` must return a samplers.Sampling, got {sampling!r} of type "
            f"{type(sampling).__name__} for a group of {count} matrices."
        )
    slots, q = sampling.slots, sampling.probability
    if not isinstance(slots, int) or not isinstance(q, int | float) or not callable(sampling.draw):
        raise TypeError(
            "`sampler` must return a samplers.Sampling of an int, a float and a function of a key, "
            f"got {sampling!r} for a group of {count} matrices."
        )
    if not 0 <= slots <= count or not 0.0 <= q <= 1.0:
        raise ValueError(
            f"`sampler` returned {slots} slots at probability {q} for "
            f"a group of {count} matrices; slots must lie in [0, {count}], probability in [0, 1]."
        )
    if (slots == 0) != (q == 0.0):
        raise ValueError(
            f"`sampler` returned {slots} slots at probability {q}: "
            "matrices that are drawn need slots, and slots need matrices that are drawn."
        )
    return sampling


def draw(sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws the matrices of a period and checks what the sampler's function returns."""
    drawn = jnp.asarray(sampling.draw(key))
    if drawn.shape != (sampling.slots,) or not jnp.issubdtype(drawn.dtype, jnp.integer):
        raise ValueError(
            f"`sampler` must draw int32[{sampling.slots}], the matrix of each slot; got shape "
            f"{drawn.shape} and dtype {drawn.dtype}."
        )
    return drawn.astype(jnp.int32)

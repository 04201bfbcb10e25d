"""Samplers: the number of matrices that are drawn from a group in a period, and their choice.

A sampler is a function from the number of matrices N of a group to a `Sampling`. Any function of
this signature can be passed to ``residuals.sampled(...)``. The gradient estimate is unbiased if
each matrix is drawn with exactly the stated probability (arXiv 2510.17802).

Example:
  A sampler that always draws the first matrix of a group (biased, so only for tests):

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
import numpy as np

from gum_optax import _checks, _inclusion
from gum_optax._inclusion import water_filling as water_filling


class Sampling(NamedTuple):
    """The sampling of one group of N matrices.

    Attributes:
      slots: number of full-size slots that the state holds for the group.
      probability: q, the probability that a given matrix is drawn in a period: one number, or one
        for each matrix, in the order of the group (NumPy, ``[N]``). At 1 the group is uncompressed.
      draw: ``key -> int32[slots]``, the matrix that each slot serves for the period; N stands for
        an empty slot. No matrix may occur twice.
    """

    slots: int
    probability: float | np.ndarray
    draw: Callable[[jax.Array], jax.Array]


Sampler = Callable[[int], Sampling]
"""``(count) -> Sampling``."""


def fixed_size(gamma: int) -> Sampler:
    """Draws exactly gamma of the N matrices of a group, without replacement.

    Each matrix is drawn with probability exactly ``q = gamma / N``, and the state always holds
    gamma slots.

    Args:
      gamma: an int >= 0, clipped to ``N // 2``. A single matrix is always drawn, so that its
        group is uncompressed. Zero means `none`.

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
        # A single matrix: with q = 1 the group is uncompressed, and this is never drawn from.
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

    The number of drawn matrices is random, so the state holds N slots and saves no memory over full
    momentum. It is meant for groups of a single matrix, as in the paper's counterexample, and for
    studies.

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
            # In float32 always: a draw must not depend on the x64 flag.
            drawn = jax.random.uniform(key, (count,), jnp.float32) < q
            # Slot i serves matrix i or is empty (N).
            return jnp.where(drawn, jnp.arange(count), count).astype(jnp.int32)

        return Sampling(count, q, draw)

    return sampler


def unequal(gamma: int, weights: Callable[[int], Any]) -> Sampler:
    r"""Draws exactly gamma of the N matrices, some more often than others.

    Matrix i is drawn with probability ``q_i = gamma w_i / sum(w)`` by systematic sampling.
    `gum_optax.residuals.sampled` weights each matrix by its own ``1 / q_i`` and ``1 / (1 - q_i)``,
    so that estimates stay unbiased. For a matrix whose projection has the norm a and whose residual
    has the norm b, the second moment of the estimate is ``a^2 / (1 - q) + b^2 / q``, which is least
    at ``q = b / (a + b)``.

    Args:
      gamma: an int >= 0, clipped to ``N // 2``, as for `fixed_size`.
      weights: ``(count) -> N numbers > 0``, in the order of the group's matrices: the order of the
        tree for separate leaves, the order of the leading axes for stacks. See `by_depth`.

    Returns:
      The sampler.

    Raises:
      TypeError, ValueError: if an argument is malformed; from the sampler, if the weights are
        malformed, or so unequal that a matrix would be drawn in every period.

    Example:
      The last matrix is drawn twice as often as the first:

      >>> import numpy as np
      >>> from gum_optax import residuals, samplers
      >>> sampler = samplers.unequal(2, lambda count: np.linspace(1.0, 2.0, count))
      >>> sampler(4).probability.round(3)
      array([0.333, 0.444, 0.556, 0.667])
      >>> rule = residuals.sampled(sampler)
    """
    gamma = _checks.non_negative_int("gamma", gamma)
    _checks.function("weights", weights, "(count) -> N numbers")

    def sampler(count: int) -> Sampling:
        fixed = fixed_size(gamma)(count)
        # Nothing is drawn, or a single matrix always: weights do not matter.
        if fixed.probability in (0.0, 1.0):
            return fixed
        sizes = np.asarray(weights(count), np.float64)
        if sizes.shape != (count,) or not np.all(np.isfinite(sizes) & (sizes > 0)):
            raise ValueError(
                f"`weights` must return {count} positive numbers for {count} matrices, got {sizes}."
            )
        # q_i = gamma w_i / sum(w). A probability of one is refused and not clipped: such a matrix
        # would never be projected.
        q = fixed.slots * sizes / sizes.sum()
        if np.max(q) >= 1:
            raise ValueError(
                f"`weights` {sizes} are so unequal that some of {count} matrices would be drawn in "
                f"every period, with gamma {fixed.slots}: their projections would be lost; take "
                "weights nearer to each other, or a smaller `gamma`."
            )
        return Sampling(
            fixed.slots, q, lambda key: _inclusion.systematic(key, jnp.asarray(q), fixed.slots)
        )

    return sampler


def by_depth(slope: float) -> Callable[[int], np.ndarray]:
    """Makes weights for `unequal` that change evenly with depth: an arithmetic progression.

    Args:
      slope: in (-1, 1). The first matrix of a group has weight ``1 - slope``, the last one
        ``1 + slope``. At 0 all weights are equal, with the probabilities of `fixed_size`.

    Returns:
      ``(count) -> weights``, a NumPy array ``[count]``.

    Raises:
      ValueError: if ``slope`` does not lie in (-1, 1).

    Example:
      >>> from gum_optax import samplers
      >>> samplers.by_depth(0.5)(3)
      array([0.5, 1. , 1.5])

    References:
      The one-parameter family is ATP's, arXiv 2502.14770, for the sparsity of pruned layers. Its
      theory is about errors in forward passes and does not carry over to gradients.
    """
    if not -1 < slope < 1:
        raise ValueError(f"`slope` must lie in (-1, 1), got {slope!r}.")
    return lambda count: np.linspace(1 - slope, 1 + slope, count)


def none(count: int) -> Sampling:
    """Draws no matrix, so that every residual is dropped: GaLore's rule, which is biased.

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
    """Calls a sampler for a group of ``count`` matrices and checks the result."""
    sampling = _checks.function("sampler", sampler, "(count) -> samplers.Sampling")(count)
    if not isinstance(sampling, Sampling):
        raise TypeError(
            f"`sampler` must return a samplers.Sampling, got {sampling!r} of type "
            f"{type(sampling).__name__} for a group of {count} matrices."
        )
    # 1. Types: q is a float, or an array with one for each matrix.
    slots, q = sampling.slots, sampling.probability
    if isinstance(q, np.ndarray):
        is_probability = q.shape == (count,) and q.dtype.kind == "f"
    else:
        is_probability = isinstance(q, int | float)
    if not isinstance(slots, int) or not is_probability or not callable(sampling.draw):
        raise TypeError(
            "`sampler` must return a samplers.Sampling of an int, a float (or an array with one "
            f"for each matrix) and a function of a key, got {sampling!r} for a group of {count} "
            "matrices."
        )
    # 2. Ranges, and slots exactly if something can be drawn.
    if not 0 <= slots <= count or not np.all((np.asarray(q) >= 0.0) & (np.asarray(q) <= 1.0)):
        raise ValueError(
            f"`sampler` returned {slots} slots at probability {q} for "
            f"a group of {count} matrices; slots must lie in [0, {count}], probability in [0, 1]."
        )
    if (slots == 0) != bool(np.all(np.asarray(q) == 0.0)):
        raise ValueError(
            f"`sampler` returned {slots} slots at probability {q}: "
            "matrices that are drawn need slots, and slots need matrices that are drawn."
        )
    return sampling


def draw(sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws the matrices of a period and checks shape and dtype of the result."""
    drawn = jnp.asarray(sampling.draw(key))
    if drawn.shape != (sampling.slots,) or not jnp.issubdtype(drawn.dtype, jnp.integer):
        raise ValueError(
            f"`sampler` must draw int32[{sampling.slots}], the matrix of each slot; got shape "
            f"{drawn.shape} and dtype {drawn.dtype}."
        )
    return drawn.astype(jnp.int32)

r"""Random directions, in which estimators look at a loss: how they are made, and kept as factors.

A *direction* is one array for each leaf of the parameters. It is a function of the key, the step,
the sample and the leaf's path, so that nothing is stored between its uses, and it is the same on
every host and at every sharding.

A *draw* makes a direction for an occasion in the run. An estimator perturbs weights by the
direction z and, with the slope c along it, estimates the gradient leaf by leaf as

.. math:: \hat g = c\; w\; z

where the weight w, one number for each leaf, makes the estimate unbiased (or, as SubZero's and
LOZO's papers do, leaves it unbiased up to a constant).

Tests: tests/library/test_estimators.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax import _checks
from gum_optax._paths import PyTree, leaves_with_names


class Dense(NamedTuple):
    """A direction of one leaf, entry by entry.

    Attributes:
      value: z, in the leaf's shape, float32 or wider.
      weight: w, what the estimate multiplies it by.
    """

    value: jax.Array
    weight: Any = 1.0

    def dense(self) -> jax.Array:
        """z, in the leaf's shape."""
        return self.value


class Factors(NamedTuple):
    """A direction of low rank: ``z = left @ right.mT`` for each matrix of a leaf.

    Attributes:
      left: ``[*batch, rows, r]``.
      right: ``[*batch, columns, r]``.
      weight: w, what the estimate multiplies it by.
    """

    left: jax.Array
    right: jax.Array
    weight: Any = 1.0

    def dense(self) -> jax.Array:
        """z, in the leaf's shape."""
        return self.left @ self.right.mT


Direction: TypeAlias = Dense | Factors


class Occasion(NamedTuple):
    """Where in a run a direction is drawn: all that it may depend on, beside its leaf.

    Attributes:
      key: ``uint32[2]``, threefry key data of the run.
      step: int32 scalar, steps taken.
      sample: the number of the direction among those of one step.
    """

    key: jax.Array
    step: jax.Array
    sample: jax.Array

    def keys_of(self, paths: Sequence[str]) -> jax.Array:
        """A key for each leaf, another one at every step and for every sample."""
        # The first number keeps these keys apart from those of periods.
        return self._folded(paths, 0, self.step, self.sample)

    def keys_of_period(self, paths: Sequence[str], period: int) -> jax.Array:
        """A key for each leaf that stays for ``period`` steps, and for all samples of a step."""
        return self._folded(paths, 1, jax.lax.div(self.step, _int32(period)))

    def _folded(self, paths: Sequence[str], *numbers: Any) -> jax.Array:
        key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        for number in numbers:
            key = jax.random.fold_in(key, number)
        # All paths at once: one hash to compile, and not one for each leaf.
        names = np.array([crc32(path.encode()) for path in paths], np.uint32)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, names)


class Directions(NamedTuple):
    """A distribution of directions, for `zeroth_order`.

    Attributes:
      draw: ``(occasion, params) -> tree of directions``, in the structure of the parameters, each a
        `Dense` or `Factors`.
      number: ``(params) -> int``, how many directions one sample adds up; by default one.
      skip: ``(occasion, params) -> bool scalar``: whether the direction has weight zero, so that
        its losses need not be computed; None: never.
    """

    draw: Callable[[Occasion, PyTree], PyTree]
    number: Callable[[PyTree], int] = lambda params: 1
    skip: Callable[[Occasion, PyTree], jax.Array] | None = None


def gaussian() -> Directions:
    r"""Draws every entry from the normal distribution: MeZO's directions.

    The estimate of a linear loss is unbiased, with second moment ``(d + 2) |g|^2`` for d
    parameters.

    Returns:
      `Directions`, drawn anew at every step.

    Example:
      >>> from gum_optax import estimators
      >>> mezo = estimators.zeroth_order(lambda params: params["w"].sum(), estimators.gaussian())

    References:
      Malladi et al., MeZO, arXiv 2305.17333.
    """
    return Directions(_normal_directions)


def sphere() -> Directions:
    r"""Draws from the unit sphere of all parameters together, and weights by their number d.

    The estimate of a linear loss is unbiased, with second moment ``d |g|^2``: a little less than
    `gaussian`'s. The step of the perturbation is ``eps`` in norm, not ``eps`` for each parameter.

    Returns:
      `Directions`, drawn anew at every step.

    Example:
      >>> from gum_optax import estimators
      >>> estimate = estimators.zeroth_order(lambda w: (w**2).sum(), estimators.sphere(), eps=0.1)
    """

    def draw(occasion: Occasion, params: PyTree) -> PyTree:
        normal = _normal_directions(occasion, params)
        directions = jax.tree.leaves(normal, is_leaf=lambda node: isinstance(node, Dense))
        size = sum(direction.value.size for direction in directions)
        # u = z / |z|,  g = d c u
        norm = jnp.sqrt(sum(jnp.sum(direction.value**2) for direction in directions))
        unit = [Dense(direction.value / norm, float(size)) for direction in directions]
        return jax.tree.unflatten(jax.tree.structure(params), unit)

    return Directions(draw)


def low_rank(rank: int = 2, period: int = 50) -> Directions:
    r"""Draws matrices ``U V'`` with Gaussian factors, of which V stays for a period: LOZO.

    .. math:: \hat G = c\, U V^\top / r

    V ``[short side, r]`` is drawn every ``period`` steps, U ``[long side, r]`` at every step.
    Estimates of one period share the span of V, so that `gum_optax.low_rank` keeps their momentum
    at rank r without loss: that is LOZO-M, see the example. (The paper has V on the input side of
    a layer, whichever is shorter.) Vectors and scalars get `gaussian` directions.

    The official code multiplies by no 1/r, which belongs to its learning rate, and at refreshes
    updates along another direction than the one it tried. Here one function makes both.

    Args:
      rank: r, an int >= 1. Leaves are taken as matrices, the last two axes, with others as batch.
      period: steps for which V stays, an int >= 1.

    Returns:
      `Directions`. Factors are kept as such, see `zeroth_order` for models that can use them.

    Raises:
      TypeError, ValueError: if an argument is no int >= 1.

    Example:
      LOZO-M is LOZO and a low-rank optimizer with the same rank and period. Its state is r numbers
      for each one of the long side:

      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import carries, estimators, projectors, residuals
      >>> directions = estimators.low_rank(rank=2, period=50)
      >>> compression = gum_optax.LowRank(
      ...     rank=2, period=50, residual=residuals.drop(), projector=projectors.svd,
      ...     carry=carries.rotate)
      >>> lozo_m = gum_optax.low_rank(optax.ema(0.9, debias=False), compression)

    References:
      Chen et al., LOZO, arXiv 2410.07698, equations 5 and 6.
    """
    rank = _checks.positive_int("rank", rank)
    period = _checks.positive_int("period", period)

    def direction(key: jax.Array, period_key: jax.Array, leaf: Any) -> Factors:
        *batch, rows, columns = leaf.shape
        long, short = max(rows, columns), min(rows, columns)
        now = _normal(key, (*batch, long, rank), leaf)
        kept = _normal(period_key, (*batch, short, rank), leaf)
        left, right = (now, kept) if rows >= columns else (kept, now)
        return Factors(left, right)

    return Directions(_matrix_by_matrix(direction, period, 1.0 / rank))


def orthonormal(rank: int = 8, period: int = 1000, *, align_norms: bool = True) -> Directions:
    r"""Draws matrices ``U Z V'`` in random subspaces that stay for a period: SubZero.

    U ``[rows, r]`` and V ``[columns, r]`` are orthonormal, from QR decompositions of Gaussians, for
    ``period`` steps; Z ``[r, r]`` is Gaussian at every step. They are made anew from their key at
    every step, so that nothing is stored:

    .. math::
        D = \mu\, U Z V^\top, \quad \mu = \sqrt{mn / r^2}, \quad \hat G = c\, D

    With U and V fixed, the expectation is ``mu^2 U U' G V V'``, and over all of them G: unbiased
    with mu, and not without. The estimate has the second moment ``(mn + 2 mn / r^2) |G|^2``, which
    is no less than MeZO's: between two refreshes there are r^2 unknowns in place of mn, and that is
    the gain. Vectors and scalars get `gaussian` directions.

    Args:
      rank: r, an int >= 1, clipped to the short side of each matrix.
      period: steps for which U and V stay, an int >= 1.
      align_norms: whether to use mu, as the paper's code does; its algorithm has mu = 1.

    Returns:
      `Directions`. Factors are kept as such, see `zeroth_order` for models that can use them.

    Raises:
      TypeError, ValueError: if ``rank`` or ``period`` is no int >= 1.

    Example:
      >>> from gum_optax import estimators
      >>> directions = estimators.orthonormal(rank=8, period=1000)
      >>> subzero = estimators.zeroth_order(lambda w: (w**2).sum(), directions)

    References:
      Yu et al., SubZero, arXiv 2410.08989.
    """
    rank = _checks.positive_int("rank", rank)
    period = _checks.positive_int("period", period)

    def direction(key: jax.Array, period_key: jax.Array, leaf: Any) -> Factors:
        *batch, m, n = leaf.shape
        r = min(rank, m, n)
        of_rows, of_columns = jax.random.split(period_key)
        u = jnp.linalg.qr(_normal(of_rows, (*batch, m, r), leaf))[0]
        v = jnp.linalg.qr(_normal(of_columns, (*batch, n, r), leaf))[0]
        z = _normal(key, (*batch, r, r), leaf)
        mu = (m * n / r**2) ** 0.5 if align_norms else 1.0
        # D = (mu U Z) V'
        return Factors(mu * (u @ z), v)

    return Directions(_matrix_by_matrix(direction, period))


def coordinates(probabilities: PyTree | float) -> Directions:
    r"""Tries single parameters, each one with its own probability p.

    .. math:: \hat g = \sum_{i \in I} \frac{c_i}{p_i} e_i,
        \qquad i \in I \text{ independently with probability } p_i

    Unbiased for any p > 0, with variance ``sum_i g_i^2 (1 / p_i - 1)``. A parameter with p = 0 is
    never tried, and the estimate of its derivative is zero. Two losses are computed for each
    parameter that is drawn. It goes through *all* parameters one after the other, so it is for few:
    heads, adapters, hyperparameters.

    Args:
      probabilities: a tree like the parameters, of arrays that broadcast to them, or one number for
        all; see `gum_optax.samplers.water_filling` for the best ones.

    Returns:
      `Directions`.

    Example:
      Every parameter is tried, the gradient by central differences:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from gum_optax import estimators
      >>> estimate = estimators.zeroth_order(
      ...     lambda w: (w**2).sum(), estimators.coordinates(1.0), eps=0.25)
      >>> estimate(jnp.arange(3.0), key=0)[1]
      Array([0., 2., 4.], dtype=float32)

    References:
      Sharma et al., ZO-HGD, arXiv 2012.11518. The rule was taken from secondary sources and is not
      verified against the paper.
    """
    given = jax.tree.leaves(probabilities)

    def drawn(occasion: Occasion, params: PyTree) -> list[tuple[jax.Array, jax.Array]]:
        """Of each leaf, which entries are drawn, and their probabilities."""
        named = leaves_with_names(params)
        each = given * len(named) if len(given) == 1 else given
        if len(each) != len(named):
            raise ValueError(
                f"`probabilities` has {len(given)} leaves and the parameters {len(named)}; pass a "
                "tree like the parameters, or one number."
            )
        found = []
        # The d directions of one sample belong to one set I.
        occasion = occasion._replace(sample=jax.lax.div(occasion.sample, _int32(number(params))))
        # Other keys than those of `sphere`, on whose directions `hybrid` has p depend.
        keys = occasion.keys_of(["coordinates of " + path for path, _ in named])
        for key, (_, leaf), p in zip(keys, named, each, strict=True):
            p = jnp.broadcast_to(jnp.asarray(p, jnp.float32), leaf.shape)
            found.append((jax.random.uniform(key, leaf.shape, jnp.float32) < p, p))
        return found

    def number(params: PyTree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    def position(occasion: Occasion, params: PyTree) -> jax.Array:
        return jax.lax.rem(occasion.sample, _int32(number(params)))

    def units(occasion: Occasion, params: PyTree) -> list[jax.Array]:
        """e_i, as one array of booleans for each leaf."""
        start, found, wanted = 0, [], position(occasion, params)
        for leaf in jax.tree.leaves(params):
            found.append((jnp.arange(leaf.size) + start == wanted).reshape(leaf.shape))
            start += leaf.size
        return found

    def draw(occasion: Occasion, params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        parts = zip(leaves, units(occasion, params), drawn(occasion, params), strict=True)
        return treedef.unflatten(
            Dense(
                unit.astype(compute_dtype(leaf)),
                jnp.sum(jnp.where(unit & is_drawn, 1 / jnp.where(is_drawn, p, 1), 0)),
            )
            for leaf, unit, (is_drawn, p) in parts
        )

    def skip(occasion: Occasion, params: PyTree) -> jax.Array:
        parts = zip(units(occasion, params), drawn(occasion, params), strict=True)
        return ~jnp.any(jnp.stack([jnp.any(unit & is_drawn) for unit, (is_drawn, _) in parts]))

    return Directions(draw, number, skip)


def compute_dtype(leaf: Any) -> Any:
    """Float32, or float64 for float64 leaves: a perturbation of bfloat16 weights is lost in it."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _int32(number: int) -> jax.Array:
    return jnp.asarray(number, jnp.int32)


def _normal(key: jax.Array, shape: tuple[int, ...], leaf: Any) -> jax.Array:
    # Float32 whatever the leaf: a draw must not depend on its dtype, nor on the x64 flag.
    return jax.random.normal(key, shape, jnp.float32).astype(compute_dtype(leaf))


def _normal_directions(occasion: Occasion, params: PyTree) -> PyTree:
    """Gaussian entries for every leaf."""
    named = leaves_with_names(params)
    keys = occasion.keys_of([path for path, _ in named])
    dense = [Dense(_normal(key, x.shape, x)) for key, (_, x) in zip(keys, named, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), dense)


def _matrix_by_matrix(
    direction: Callable[[jax.Array, jax.Array, Any], Factors], period: int, weight: float = 1.0
) -> Callable[[Occasion, PyTree], PyTree]:
    """The draw that makes factors for matrices, ``(key, key of the period, leaf) -> factors``.

    Vectors and scalars get Gaussian entries.
    """

    def draw(occasion: Occasion, params: PyTree) -> PyTree:
        named = leaves_with_names(params)
        paths = [path for path, _ in named]
        keys, period_keys = occasion.keys_of(paths), occasion.keys_of_period(paths, period)
        # Leaves alike draw together, which is the same and compiles once: factors are small.
        alike: dict[Any, list[int]] = {}
        for position, (_, leaf) in enumerate(named):
            alike.setdefault((leaf.shape, leaf.dtype), []).append(position)
        drawn: dict[int, Direction] = {}
        for (shape, dtype), positions in alike.items():
            at, leaf = np.array(positions), jax.ShapeDtypeStruct(shape, dtype)
            if len(shape) < 2:
                values = jax.vmap(lambda key, leaf=leaf: _normal(key, leaf.shape, leaf))(keys[at])
                drawn |= {position: Dense(values[i]) for i, position in enumerate(positions)}
                continue
            left, right, _ = jax.vmap(
                lambda key, period_key, leaf=leaf: direction(key, period_key, leaf)
            )(keys[at], period_keys[at])
            for i, position in enumerate(positions):
                drawn[position] = Factors(left[i], right[i], weight)
        return jax.tree.unflatten(
            jax.tree.structure(params), [drawn[position] for position in range(len(named))]
        )

    return draw

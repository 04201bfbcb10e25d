r"""Random directions for gradient estimates from losses: distributions, and low-rank factors.

A *direction* is one array for each leaf of the parameters. It is a function of the key, the step,
the sample and the leaf's path, so that nothing is stored between its uses, and it is the same on
every host and under every sharding.

A *draw* makes a direction for an occasion, a point in the run. An estimator perturbs the weights by
the direction z, measures the slope c of the loss along it, and estimates the gradient of each leaf
as

.. math:: \hat g = c\; w\; z

where the weight w, one number for each leaf, makes the estimate unbiased (or, as in the papers of
SubZero and LOZO, unbiased up to a constant).

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
from gum_optax._scheduling import scheduled_after


class Dense(NamedTuple):
    """A direction of one leaf, entry by entry.

    Attributes:
      value: z, in the leaf's shape, float32 or wider.
      weight: w, the factor of this direction in the estimate.
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
      weight: w, the factor of this direction in the estimate.
    """

    left: jax.Array
    right: jax.Array
    weight: Any = 1.0

    def dense(self) -> jax.Array:
        """z, in the leaf's shape."""
        return self.left @ self.right.mT


Direction: TypeAlias = Dense | Factors


class Occasion(NamedTuple):
    """A point in a run where a direction is drawn: all that a draw depends on beside its leaf.

    Attributes:
      key: ``uint32[2]``, threefry key data of the run.
      step: int32 scalar, steps taken.
      sample: int32 scalar, the number of this direction among the directions of one step.
    """

    key: jax.Array
    step: jax.Array
    sample: jax.Array

    def keys_of(self, paths: Sequence[str]) -> jax.Array:
        """Returns a key for each leaf, ``[leaves]``, different at every step and sample."""
        # The first number, 0 here and 1 below, keeps both kinds of keys apart.
        return self._folded(paths, 0, self.step, self.sample)

    def keys_of_period(self, paths: Sequence[str], period: int) -> jax.Array:
        """Returns a key for each leaf that stays for ``period`` steps and all their samples."""
        return self._folded(paths, 1, jax.lax.div(self.step, _int32(period)))

    def _folded(self, paths: Sequence[str], *numbers: Any) -> jax.Array:
        key = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        for number in numbers:
            key = jax.random.fold_in(key, number)
        # The path as a number. Unlike Python's own hash, a checksum is the same in every process.
        names = np.array([crc32(path.encode()) for path in paths], np.uint32)
        # All paths at once: one hash to compile instead of one for each leaf.
        return jax.vmap(jax.random.fold_in, (None, 0))(key, names)


class Directions(NamedTuple):
    """A distribution of directions, for `zeroth_order`.

    Attributes:
      draw: ``(occasion, params) -> tree of directions``, in the structure of the parameters, each a
        `Dense` or `Factors`.
      number: ``(params) -> int``, the number of directions that one sample sums over; by default 1.
      skip: ``(occasion, params) -> bool scalar``, true if the direction has weight zero, so that
        its losses need not be computed; None: never.
    """

    draw: Callable[[Occasion, PyTree], PyTree]
    number: Callable[[PyTree], int] = lambda params: 1
    skip: Callable[[Occasion, PyTree], jax.Array] | None = None


def gaussian() -> Directions:
    r"""Draws every entry from the standard normal distribution: MeZO's directions.

    For a linear loss with gradient g of d parameters, the estimate is unbiased, with second moment
    ``(d + 2) |g|^2``.

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
    r"""Draws from the unit sphere of all parameters together, with their number d as the weight.

    For a linear loss, the estimate is unbiased, with second moment ``d |g|^2``, a little less than
    with `gaussian`. The whole perturbation has the norm ``eps``, not ``eps`` for each parameter.

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
    r"""Draws matrices ``U V'`` with Gaussian factors, where V is kept for a period: LOZO.

    .. math:: \hat G = c\, U V^\top / r

    V ``[short side, r]`` is drawn every ``period`` steps, U ``[long side, r]`` at every step.
    Estimates of one period share the span of V, so that `gum_optax.low_rank` keeps their momentum
    at rank r without loss: this is LOZO-M, see the example. (In the paper, V is on the input side
    of a layer, whichever side is shorter.) Vectors and scalars get `gaussian` directions.

    The official code leaves the factor 1/r to the learning rate, and at refreshes it updates along
    another direction than the one it evaluated. Here one function makes both directions.

    Args:
      rank: r, an int >= 1. The last two axes of a leaf are a matrix, the others batch axes.
      period: the number of steps for which V is kept, an int >= 1.

    Returns:
      `Directions` as `Factors`; `zeroth_order` describes how a model can use them.

    Raises:
      TypeError, ValueError: if an argument is no int >= 1.

    Example:
      LOZO-M combines LOZO with a low-rank optimizer of the same rank and period. The momentum of a
      matrix is r numbers for each entry of the long side:

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

    def direction(key: jax.Array, period_key: jax.Array, leaf: Any, after: Any) -> Factors:
        del after
        *batch, rows, columns = leaf.shape
        long, short = max(rows, columns), min(rows, columns)
        now = _normal(key, (*batch, long, rank), leaf)  # U
        kept = _normal(period_key, (*batch, short, rank), leaf)  # V
        # U V' for a tall leaf, V U' for a wide one.
        left, right = (now, kept) if rows >= columns else (kept, now)
        return Factors(left, right)

    return Directions(_matrix_by_matrix(direction, period, 1.0 / rank))


def orthonormal(rank: int = 8, period: int = 1000, *, align_norms: bool = True) -> Directions:
    r"""Draws matrices ``U Z V'`` in random subspaces that are kept for a period: SubZero.

    U ``[rows, r]`` and V ``[columns, r]`` are orthonormal, from QR decompositions of Gaussian
    matrices, and stay the same for ``period`` steps; Z ``[r, r]`` is Gaussian and drawn at every
    step. All three are recomputed from their keys at every step, so that nothing is stored:

    .. math::
        D = \mu\, U Z V^\top, \quad \mu = \sqrt{mn / r^2}, \quad \hat G = c\, D

    With U and V fixed, the expectation is ``mu^2 U U' G V V'``; over random U and V it is G. The
    estimate is unbiased with mu, and not without it. Its second moment for a linear loss,
    ``(mn + 2 mn / r^2) |G|^2``, is not below MeZO's. The gain is that between two refreshes there
    are r^2 unknowns instead of mn. Vectors and scalars get `gaussian` directions.

    Args:
      rank: r, an int >= 1, clipped to the short side of each matrix.
      period: the number of steps for which U and V are kept, an int >= 1.
      align_norms: whether to use mu, as the paper's code does; in the paper's algorithm, mu = 1.

    Returns:
      `Directions` as `Factors`; `zeroth_order` describes how a model can use them.

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

    def direction(key: jax.Array, period_key: jax.Array, leaf: Any, after: Any) -> Factors:
        *batch, m, n = leaf.shape
        r = min(rank, m, n)
        of_rows, of_columns = jax.random.split(period_key)
        # One decomposition waits for the other, see `_scheduling`.
        rows = scheduled_after(_normal(of_rows, (*batch, m, r), leaf), after)
        u = jnp.linalg.qr(rows)[0]  # [*batch, m, r]
        columns = scheduled_after(_normal(of_columns, (*batch, n, r), leaf), u)
        v = jnp.linalg.qr(columns)[0]  # [*batch, n, r]
        z = _normal(key, (*batch, r, r), leaf)
        # |U Z V'|^2 is r^2 in expectation; mu makes it mn, as with Gaussian entries.
        mu = (m * n / r**2) ** 0.5 if align_norms else 1.0
        # D = (mu U Z) V'
        return Factors(mu * (u @ z), v)

    return Directions(_matrix_by_matrix(direction, period))


def coordinates(probabilities: PyTree | float) -> Directions:
    r"""Estimates single derivatives, each parameter being drawn with its own probability p.

    .. math:: \hat g = \sum_{i \in I} \frac{c_i}{p_i} e_i,
        \qquad i \in I \text{ independently with probability } p_i

    The estimate is unbiased for any p > 0, with variance ``sum_i g_i^2 (1 / p_i - 1)``. A parameter
    with p = 0 is never drawn, and the estimate of its derivative is zero. Each drawn parameter
    takes two losses. The loop runs over *all* parameters one after the other, so it suits small
    numbers of them: heads, adapters, hyperparameters.

    Args:
      probabilities: a tree like the parameters, of arrays that broadcast to them, or one number for
        all, in [0, 1]; `gum_optax.samplers.water_filling` minimizes the variance.

    Returns:
      `Directions`, whose ``number`` is the number of parameters.

    Example:
      With p = 1 every parameter is drawn, which gives the gradient by central differences:

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
        """Returns for each leaf a mask of the drawn entries, and their probabilities."""
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
        # Not the keys of `sphere`: `hybrid` computes p from the directions that those give, and the
        # draw has to be independent of p.
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
        """Returns the unit vector e_i as one boolean array for each leaf."""
        # i counts the entries of all leaves, laid end to end.
        start, found, wanted = 0, [], position(occasion, params)
        for leaf in jax.tree.leaves(params):
            found.append((jnp.arange(leaf.size) + start == wanted).reshape(leaf.shape))
            start += leaf.size
        return found

    def draw(occasion: Occasion, params: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        parts = zip(leaves, units(occasion, params), drawn(occasion, params), strict=True)
        # z = e_i with weight w = 1 / p_i if i is drawn, and 0 otherwise.
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
    """Returns float32, or float64 for float64 leaves: bfloat16 would round perturbations away."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _int32(number: int) -> jax.Array:
    return jnp.asarray(number, jnp.int32)


def _normal(key: jax.Array, shape: tuple[int, ...], leaf: Any) -> jax.Array:
    # Float32 whatever the leaf: a draw must not depend on its dtype, nor on the x64 flag.
    return jax.random.normal(key, shape, jnp.float32).astype(compute_dtype(leaf))


def _normal_directions(occasion: Occasion, params: PyTree) -> PyTree:
    """Draws Gaussian entries for every leaf."""
    named = leaves_with_names(params)
    keys = occasion.keys_of([path for path, _ in named])
    dense = [Dense(_normal(key, x.shape, x)) for key, (_, x) in zip(keys, named, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), dense)


def _matrix_by_matrix(
    direction: Callable[[jax.Array, jax.Array, Any, Any], Factors],
    period: int,
    weight: float = 1.0,
) -> Callable[[Occasion, PyTree], PyTree]:
    """Turns a function of one leaf into a draw of whole trees.

    Vectors and scalars get Gaussian entries.

    Args:
      direction: ``(key, key of the period, leaf, after) -> factors``; ``after`` is an array that
        decompositions wait for, or None.
      period: steps for which the key of the period stays the same.
      weight: of the factors, see `Factors`.
    """

    def draw(occasion: Occasion, params: PyTree) -> PyTree:
        named = leaves_with_names(params)
        paths = [path for path, _ in named]
        keys, period_keys = occasion.keys_of(paths), occasion.keys_of_period(paths, period)
        # 1. Leaves of equal shape and dtype are drawn together: the same values, compiled once.
        #    Their factors live at the same time, which costs little since they are small.
        alike: dict[Any, list[int]] = {}
        for position, (_, leaf) in enumerate(named):
            alike.setdefault((leaf.shape, leaf.dtype), []).append(position)
        drawn: dict[int, Direction] = {}
        last = None
        for (shape, dtype), positions in alike.items():
            at, leaf = np.array(positions), jax.ShapeDtypeStruct(shape, dtype)
            # 2. Vectors and scalars: [positions, *shape].
            if len(shape) < 2:
                values = jax.vmap(lambda key, leaf=leaf: _normal(key, leaf.shape, leaf))(keys[at])
                drawn |= {position: Dense(values[i]) for i, position in enumerate(positions)}
                continue
            # 3. Matrices: [positions, *batch, rows, r] and [positions, *batch, columns, r].
            left, right, _ = jax.vmap(
                lambda key, period_key, leaf=leaf, last=last: direction(key, period_key, leaf, last)
            )(keys[at], period_keys[at])
            last = right
            for i, position in enumerate(positions):
                drawn[position] = Factors(left[i], right[i], weight)
        return jax.tree.unflatten(
            jax.tree.structure(params), [drawn[position] for position in range(len(named))]
        )

    return draw

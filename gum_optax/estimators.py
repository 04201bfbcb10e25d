r"""Estimators: gradients from values of a loss alone, without a backward pass (zeroth order).

An *estimator* takes the place of ``jax.value_and_grad(loss)``; any optax transformation can follow.
`zeroth_order` makes one from a loss and a distribution of *directions*:

- `gaussian`: MeZO;
- `low_rank`: LOZO; followed by `gum_optax.low_rank`, LOZO-M;
- `orthonormal`: SubZero;
- `sphere` and `coordinates`, mixed by `hybrid`: ZO-HGD.

Directions are functions of key, step and path, so they are not stored. A step needs the memory of
the weights, of a perturbed copy of the weights in use, and of the activations of a forward pass.

Example:
  A step of MeZO. The key is the same for a whole run, the step counts up:

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import optax
  >>> from gum_optax import estimators
  >>> def loss(params, x):
  ...     return jnp.mean((x @ params["w"]) ** 2)
  >>> mezo = estimators.zeroth_order(loss, estimators.gaussian())
  >>> tx = optax.sgd(1e-2)
  >>> @jax.jit
  ... def train_step(params, state, step, x):
  ...     value, grads = mezo(params, x, key=0, step=step)
  ...     updates, state = tx.update(grads, state)
  ...     return optax.apply_updates(params, updates), state, value
  >>> params = {"w": jnp.ones((8, 4))}
  >>> params, state, value = train_step(params, tx.init(params), 0, jnp.eye(8))

Tests: tests/library/test_estimators.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from gum_optax import _checks
from gum_optax._directions import Dense as Dense
from gum_optax._directions import Direction as Direction
from gum_optax._directions import Directions as Directions
from gum_optax._directions import Factors as Factors
from gum_optax._directions import Occasion as Occasion
from gum_optax._directions import compute_dtype
from gum_optax._directions import coordinates as coordinates
from gum_optax._directions import gaussian as gaussian
from gum_optax._directions import low_rank as low_rank
from gum_optax._directions import orthonormal as orthonormal
from gum_optax._directions import sphere as sphere
from gum_optax._inclusion import water_filling
from gum_optax._paths import PyTree
from gum_optax._scheduling import scheduled_after

Estimator: TypeAlias = Callable[..., tuple[jax.Array, PyTree]]
"""``(params, *args, key, step=0, **kwargs) -> (value, gradient)``."""


def add(weight: jax.Array, direction: Direction, size: jax.Array) -> jax.Array:
    """Perturbs a weight: ``W + size * z``, in float32 (float64 for float64 weights).

    Args:
      weight: the leaf.
      direction: the direction z.
      size: ``eps`` or ``-eps``, a float32 scalar.

    Returns:
      The perturbed weight, in the shape of ``weight``.
    """
    dtype = compute_dtype(weight)
    return weight.astype(dtype) + size.astype(dtype) * direction.dense()


class Perturbed(NamedTuple):
    """A weight matrix and its perturbation of low rank, ``weight + left @ right.mT``.

    Attributes:
      weight: ``[*batch, rows, columns]``, the weight itself, in its own dtype.
      left: ``[*batch, rows, r]``, multiplied by the size of the perturbation.
      right: ``[*batch, columns, r]``.
    """

    weight: jax.Array
    left: jax.Array
    right: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ (weight + left @ right.mT)`` without computing the sum of weights."""
        return x @ self.weight + (x @ self.left) @ self.right.mT


def as_factors(weight: jax.Array, direction: Direction, size: jax.Array) -> Any:
    """Keeps a low-rank perturbation separate from its weight, for models that apply both.

    Then no matrix of the weight's size is made. The loss gets a `Perturbed` in the place of every
    leaf with a low-rank direction. ``x @ perturbed`` works if ``x`` is a JAX array.

    Args:
      weight: the leaf.
      direction: the direction z.
      size: ``eps`` or ``-eps``, a float32 scalar.

    Returns:
      A `Perturbed`, or the sum of `add` for a direction that is not of low rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import estimators
      >>> def loss(params):
      ...     return (jnp.ones(3) @ params["w"]).sum()
      >>> lozo = estimators.zeroth_order(
      ...     loss, estimators.low_rank(rank=1), perturb=estimators.as_factors)
      >>> lozo({"w": jnp.ones((3, 4))}, key=0)[1]["w"].shape
      (3, 4)
    """
    if isinstance(direction, Factors):
        return Perturbed(
            weight, size.astype(direction.left.dtype) * direction.left, direction.right
        )
    return add(weight, direction, size)


def zeroth_order(
    loss: Callable[..., jax.Array],
    directions: Directions,
    eps: float | jax.Array = 1e-3,
    samples: int = 1,
    *,
    perturb: Callable[[jax.Array, Direction, jax.Array], Any] = add,
) -> Estimator:
    r"""Estimates the gradient of a loss from its values at weights moved along random directions.

    With z a direction and w its weights, one for each leaf (see `Directions`),

    .. math::
        c = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
        \hat g = \text{mean of } c\, w z \text{ over the samples}

    For a linear or quadratic loss, c is the exact slope for any ``eps``.

    **Precision.** The loss gets float32 copies of weights in half precision: bfloat16 has eight
    binary digits, so that 1e-3 would be lost in the sum with a weight above 0.5. A model that
    rounds its weights to bfloat16 loses the perturbation again. The two losses are nearly equal, so
    compute them in float32, including the mean over the batch.

    **Memory.** The two losses are computed one after the other, in a loop. Each draws the direction
    again, and so does the gradient. Dropout must be the same in both losses, or off.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``.
      directions: the distribution of z, for example `gaussian()`.
      eps: the size of the perturbation, > 0.
      samples: the number of independent directions to average over, an int >= 1; each costs two
        losses. All of them share the parts of directions that are fixed for a period.
      perturb: ``(leaf, direction, size) -> leaf for the loss``: `add`, or `as_factors` for models
        that can use low-rank perturbations.

    Returns:
      ``(params, *args, key, step=0, **kwargs) -> (value, gradient)``. ``key`` is a seed or a
      threefry key, the same for a whole run. With ``step``, an int or int32 scalar, it determines
      the directions. ``value`` is the mean of the computed losses, float32 or wider (not the loss
      at ``params``; NaN if no loss was computed), and the gradient has the dtypes of ``params``.

    Raises:
      TypeError, ValueError: if an argument is malformed; from the estimator, if the loss is no
        scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import estimators
      >>> estimate = estimators.zeroth_order(lambda w: jnp.sum(w**2), estimators.gaussian())
      >>> value, gradient = estimate(jnp.ones((2, 3)), key=0, step=7)
      >>> gradient.shape
      (2, 3)

    References:
      Malladi et al., MeZO, arXiv 2305.17333; Chen et al., LOZO, arXiv 2410.07698; Yu et al.,
      SubZero, arXiv 2410.08989.
    """
    _checks.function("loss", loss, "(params, *args, **kwargs) -> scalar")
    _checks.instance("directions", directions, Directions, "such as `estimators.gaussian()`")
    _checks.hyperparameter("eps", eps)
    if not isinstance(eps, jax.core.Tracer) and float(eps) == 0:
        raise ValueError("`eps` must be positive, got 0: the losses would be equal.")
    samples = _checks.positive_int("samples", samples)
    _checks.function("perturb", perturb, "(leaf, direction, size) -> what the loss is given")

    def estimate(
        params: PyTree, *args: Any, key: Any, step: Any = 0, **kwargs: Any
    ) -> tuple[jax.Array, PyTree]:
        params = jax.tree.map(jnp.asarray, params)
        occasion = Occasion(_checks.key_data(key), jnp.asarray(step, jnp.int32), jnp.int32(0))
        size = jnp.asarray(eps, jnp.float32)

        def moved(occasion: Occasion, signed: jax.Array) -> jax.Array:
            """Returns the loss at ``params + signed * z``."""
            # The direction is drawn inside of the loop over signs. Without the barrier XLA may draw
            # it once, before the loop, and keep it: as many numbers as there are weights.
            occasion, signed = jax.lax.optimization_barrier((occasion, signed))
            drawn = _leaves(directions.draw(occasion, params))
            leaves, treedef = jax.tree.flatten(params)
            parts = [perturb(x, z, signed) for x, z in zip(leaves, drawn, strict=True)]
            value = loss(treedef.unflatten(parts), *args, **kwargs)
            if jnp.shape(value) != ():
                raise ValueError(f"`loss` must return a scalar, got shape {jnp.shape(value)}.")
            return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))

        # 1. One slope for each direction: c = (L(W + eps z) - L(W - eps z)) / (2 eps)
        def slope(occasion: Occasion) -> tuple[jax.Array, jax.Array]:
            plus, minus = jax.lax.map(
                lambda sign: moved(occasion, sign * size), jnp.array([1.0, -1.0], jnp.float32)
            )
            return (plus - minus) / (2.0 * size).astype(plus.dtype), (plus + minus) / 2

        # Skipped directions have slope 0 and no loss (NaN).
        def slope_or_nothing(occasion: Occasion) -> tuple[jax.Array, jax.Array]:
            if directions.skip is None:
                return slope(occasion)
            nothing = jax.tree.map(
                lambda x, blank: jnp.full(x.shape, blank, x.dtype),
                jax.eval_shape(slope, occasion), (0.0, jnp.nan),
            )  # fmt: skip
            skipped = directions.skip(occasion, params)
            return jax.lax.cond(skipped, lambda: nothing, lambda: slope(occasion))

        # 2. The gradient, for which every direction is drawn again:
        #    g = sum_k c_k w_k z_k / samples
        def along(occasion: Occasion, slope: jax.Array) -> PyTree:
            def one(leaf: jax.Array, direction: Direction) -> jax.Array:
                factor = (slope * direction.weight / samples).astype(compute_dtype(leaf))
                if isinstance(direction, Factors):
                    # One factor [rows, r] is scaled, not the whole matrix.
                    return direction._replace(left=factor * direction.left).dense()
                return factor * direction.dense()

            # Not before the losses are known: decompositions would run beside those of the losses.
            occasion = occasion._replace(key=scheduled_after(occasion.key, slope))
            drawn = _leaves(directions.draw(occasion, params))
            leaves, treedef = jax.tree.flatten(params)
            return treedef.unflatten(map(one, leaves, drawn))

        def rounded(gradient: PyTree) -> PyTree:
            return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, params)

        # 3. One direction without a loop; several in two loops, first all slopes, then the sum of
        #    the gradients, so that one direction exists at a time.
        number = directions.number(params) * samples
        if number == 1:
            c, value = slope_or_nothing(occasion)
            return value, rounded(along(occasion, c))
        occasions = Occasion(
            key=jnp.broadcast_to(occasion.key, (number, *occasion.key.shape)),
            step=jnp.broadcast_to(occasion.step, (number,)),
            sample=jnp.arange(number, dtype=jnp.int32),
        )
        slopes, values = jax.lax.map(slope_or_nothing, occasions)

        def add_one(total: PyTree, each: tuple[Occasion, jax.Array]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, along(*each)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, compute_dtype(x)), params)
        total, _ = jax.lax.scan(add_one, zeros, (occasions, slopes))
        # The mean over the directions that were not skipped.
        return jnp.nanmean(values), rounded(total)

    return estimate


def hybrid(
    loss: Callable[..., jax.Array],
    tried: float,
    share: float = 0.5,
    eps: float | jax.Array = 1e-3,
    samples: int = 1,
) -> Estimator:
    r"""Combines random directions with derivatives along large coordinates: ZO-HGD.

    .. math::
        \hat g = \alpha\, g_r + (1 - \alpha) \sum_{i \in I} \frac{g_i}{p_i} e_i, \qquad
        p_i = \min(1, \lambda |g_{r,i}|), \quad \textstyle\sum_i p_i = \text{tried}

    where g_r is the mean estimate over ``samples`` directions on the `sphere`. It also determines
    the probabilities of `coordinates`, by water-filling. The set I is drawn independently of g_r
    given these probabilities, so the estimate stays unbiased. Entries below a hundredth of the mean
    size are raised to it, so that every parameter has a positive probability.

    With few samples the sizes of g_r's entries are random and independent of the gradient's, so
    take many. On average, ``2 * (samples + tried)`` losses are computed. Like `coordinates`, this
    suits small numbers of parameters only.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``.
      tried: the expected number of drawn coordinates, > 0, at most the number of parameters.
      share: alpha, in [0, 1]: the weight of the random directions. With 0 and all coordinates
        drawn, the estimate is the gradient by central differences.
      eps: as for `zeroth_order`.
      samples: the number of directions on the sphere, an int >= 1.

    Returns:
      An estimator, as from `zeroth_order`; its value is the mean loss over the sphere's directions.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import estimators
      >>> estimate = estimators.hybrid(lambda w: jnp.sum(w**2), tried=3, samples=10)

    References:
      Sharma et al., ZO-HGD, arXiv 2012.11518. The rule was taken from secondary sources and is not
      verified against the paper; this is no reproduction of it.
    """
    _checks.hyperparameter("tried", tried)
    _checks.hyperparameter("share", share, below=float(np.nextafter(1.0, 2.0)))
    random = zeroth_order(loss, sphere(), eps, samples)

    def estimate(
        params: PyTree, *args: Any, key: Any, step: Any = 0, **kwargs: Any
    ) -> tuple[jax.Array, PyTree]:
        value, g_r = random(params, *args, key=key, step=step, **kwargs)
        # 1. p = min(1, lambda |g_r|), from the entries of all parameters together, ``[d]``.
        leaves, treedef = jax.tree.flatten(g_r)
        sizes = jnp.concatenate([jnp.abs(leaf.astype(jnp.float32)).ravel() for leaf in leaves])
        sizes = jnp.maximum(sizes, 0.01 * jnp.mean(sizes))
        flat = water_filling(sizes, tried)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = jnp.split(flat, ends)
        p = treedef.unflatten(
            part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
        )
        # 2. g_c, the estimate of coordinates drawn with these probabilities, and the mixture.
        single = zeroth_order(loss, coordinates(p), eps)
        _, g_c = single(params, *args, key=key, step=step, **kwargs)
        return value, jax.tree.map(lambda r, c: (share * r + (1 - share) * c).astype(r.dtype),
                                   g_r, g_c)  # fmt: skip

    return estimate


def _leaves(drawn: PyTree) -> list[Direction]:
    """Returns the direction of each leaf; to JAX directions are nodes."""
    return jax.tree.leaves(drawn, is_leaf=lambda node: isinstance(node, Dense | Factors))

r"""Estimators: gradients from values of a loss alone, without a backward pass (zeroth order).

An *estimator* takes the place of ``jax.value_and_grad(loss)``; any optax transformation can follow.
`zeroth_order` makes one of a loss and a distribution of *directions*:

- `gaussian`: MeZO;
- `low_rank`: LOZO; with `gum_optax.low_rank` behind it, LOZO-M;
- `orthonormal`: SubZero;
- `sphere` and `coordinates`, which `hybrid` mixes: ZO-HGD.

Directions are functions of key, step and path, so that a step stores none. It needs the weights,
one perturbed copy of what is in use, and the activations of a forward pass.

Example:
  A step of MeZO. The key stays for a whole run, the step counts:

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

Estimator: TypeAlias = Callable[..., tuple[jax.Array, PyTree]]
"""``(params, *args, key, step=0, **kwargs) -> (value, gradient)``."""


def add(weight: jax.Array, direction: Direction, size: jax.Array) -> jax.Array:
    """Perturbs a weight: ``W + size * z``, in float32 (float64 for float64 weights).

    Args:
      weight: the leaf.
      direction: the direction z.
      size: ``eps`` or ``-eps``.
    """
    dtype = compute_dtype(weight)
    return weight.astype(dtype) + size.astype(dtype) * direction.dense()


class Perturbed(NamedTuple):
    """A weight matrix and its perturbation of low rank, ``weight + left @ right.mT``.

    Attributes:
      weight: ``[*batch, rows, columns]``, the weight itself, in its own dtype.
      left: ``[*batch, rows, r]``, with the size of the perturbation in it.
      right: ``[*batch, columns, r]``.
    """

    weight: jax.Array
    left: jax.Array
    right: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """``x @ (weight + left @ right.mT)``, without that sum."""
        return x @ self.weight + (x @ self.left) @ self.right.mT


def as_factors(weight: jax.Array, direction: Direction, size: jax.Array) -> Any:
    """Leaves a perturbation of low rank apart from its weight, for models that apply both.

    No matrix of the weight's size is made then. The loss finds a `Perturbed` wherever a leaf has a
    direction of low rank. ``x @ perturbed`` works where ``x`` is an array of JAX.

    Args:
      weight: the leaf.
      direction: the direction z.
      size: ``eps`` or ``-eps``.

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

    With z a direction, w its weights (see `Directions`) and all leaves moved together,

    .. math::
        c = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
        \hat g = \text{mean of } c\, w z \text{ over the samples}

    For a loss that is linear, or quadratic, c is the exact slope for any ``eps``.

    **Precision.** The loss is given float32 copies of weights in half precision: bfloat16 has eight
    digits, so that 1e-3 would vanish beside a weight above 0.5. A model that rounds its weights to
    bfloat16 itself loses the perturbation again. The two losses are nearly equal, so compute them
    in float32, with the mean over the batch, too.

    **Memory.** The two losses are computed one after the other, in a loop, and each makes the
    direction anew; so does the gradient. Dropout must be the same in both, or off.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``.
      directions: what z is, for example `gaussian()`.
      eps: the size of the perturbation, > 0.
      samples: independent directions to average over, an int >= 1; each costs two losses. What a
        period fixes is common to them.
      perturb: ``(leaf, direction, size) -> what the loss is given``: `add`, or `as_factors` for
        models that can use perturbations of low rank.

    Returns:
      ``(params, *args, key, step=0, **kwargs) -> (value, gradient)``. ``key`` is a seed or a
      threefry key, the same for a whole run; ``step``, an int or int32 scalar, decides the
      direction with it. ``value`` is the mean of the losses that were computed, float32 (not the
      loss of ``params``; NaN if there were none), and the gradient has the dtypes of ``params``.

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
            """The loss at ``params + signed * z``."""
            # The direction is made inside of the loop over signs. Without the barrier XLA may make
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

        def slope_or_nothing(occasion: Occasion) -> tuple[jax.Array, jax.Array]:
            if directions.skip is None:
                return slope(occasion)
            nothing = jax.tree.map(
                lambda x, blank: jnp.full(x.shape, blank, x.dtype),
                jax.eval_shape(slope, occasion), (0.0, jnp.nan),
            )  # fmt: skip
            skipped = directions.skip(occasion, params)
            return jax.lax.cond(skipped, lambda: nothing, lambda: slope(occasion))

        # 2. The gradient, with every direction made a second time: g = sum_k c_k w_k z_k / samples
        def along(occasion: Occasion, slope: jax.Array) -> PyTree:
            def one(leaf: jax.Array, direction: Direction) -> jax.Array:
                factor = (slope * direction.weight / samples).astype(compute_dtype(leaf))
                if isinstance(direction, Factors):
                    # The factor goes to the small side.
                    return direction._replace(left=factor * direction.left).dense()
                return factor * direction.dense()

            drawn = _leaves(directions.draw(occasion, params))
            leaves, treedef = jax.tree.flatten(params)
            return treedef.unflatten(map(one, leaves, drawn))

        def rounded(gradient: PyTree) -> PyTree:
            return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, params)

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
        # Directions that were skipped have no losses.
        return jnp.nanmean(values), rounded(total)

    return estimate


def hybrid(
    loss: Callable[..., jax.Array],
    tried: float,
    share: float = 0.5,
    eps: float | jax.Array = 1e-3,
    samples: int = 1,
) -> Estimator:
    r"""Mixes random directions with single coordinates that seem large: ZO-HGD.

    .. math::
        \hat g = \alpha\, g_r + (1 - \alpha) \sum_{i \in I} \frac{g_i}{p_i} e_i, \qquad
        p_i = \min(1, \lambda |g_{r,i}|), \quad \textstyle\sum_i p_i = \text{tried}

    where g_r is the mean over ``samples`` directions on the `sphere`, which also decides the
    probabilities of `coordinates`, by water-filling. The set I is drawn after that, so the estimate
    stays unbiased. Sizes below a hundredth of their mean count as such, so that every parameter has
    a chance.

    With few samples the sizes of g_r's entries are those of random numbers, and tell nothing of the
    gradient's: take many. In all, ``2 * (samples + tried)`` losses are computed on average. For few
    parameters only, as `coordinates`.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``.
      tried: the expected number of coordinates, > 0, at most the number of parameters.
      share: alpha, in [0, 1]: the weight of the random directions. With 0 and all coordinates
        tried, the estimate is the gradient by central differences.
      eps: as for `zeroth_order`.
      samples: directions on the sphere.

    Returns:
      An estimator, as from `zeroth_order`; its value is the mean loss on the sphere.

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
        # 1. Probabilities from all parameters together.
        leaves, treedef = jax.tree.flatten(g_r)
        sizes = jnp.concatenate([jnp.abs(leaf.astype(jnp.float32)).ravel() for leaf in leaves])
        sizes = jnp.maximum(sizes, 0.01 * jnp.mean(sizes))
        flat = water_filling(sizes, tried)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = jnp.split(flat, ends)
        p = treedef.unflatten(
            part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
        )
        # 2. Coordinates drawn by them.
        single = zeroth_order(loss, coordinates(p), eps)
        _, g_c = single(params, *args, key=key, step=step, **kwargs)
        return value, jax.tree.map(lambda r, c: (share * r + (1 - share) * c).astype(r.dtype),
                                   g_r, g_c)  # fmt: skip

    return estimate


def _leaves(drawn: PyTree) -> list[Direction]:
    return jax.tree.leaves(drawn, is_leaf=lambda node: isinstance(node, Dense | Factors))

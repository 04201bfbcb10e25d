r"""Displaced gradients: the gradient at a point near the weights instead of at the weights.

.. math:: g = \nabla f(W + d(W)), \qquad W \leftarrow W - \eta\, \text{direction}(g)

The *displacement* d is a function of the weights and the batch. The gradient g can go to any
optimizer. An uphill displacement gives SAM, a downhill one extrapolation:

- `ascent` along a gradient is SAM; along an estimate from `estimators` it is AdaZo-SAM, with one
  backward pass instead of two; followed by low-rank Adam it is LORENZA;
- `extrapolation` along this batch's gradient (extragradient), or `along_previous` along the last
  one, is extrapolated SGD or Adam, for large batches.

Example:
  SAM in front of GUM:

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import gum_optax
  >>> from gum_optax import displacements
  >>> def loss(params, x):
  ...     return jnp.mean((x @ params["w"]) ** 2)
  >>> gradient = jax.value_and_grad(loss)
  >>> sam = jax.jit(gum_optax.displaced(gradient, displacements.ascent(gradient, rho=0.05)))
  >>> value, grads = sam({"w": jnp.ones((8, 4))}, jnp.eye(8))

  LORENZA is AdaZo-SAM followed by low-rank Adam. Keyword arguments go to the displacement, here to
  its estimator. (In its paper the probes lie in the bases of the optimizer, here in bases of their
  own.)

  >>> from gum_optax import estimators, projectors
  >>> probe = estimators.zeroth_order(loss, estimators.low_rank(rank=2, period=50))
  >>> adazo = jax.jit(gum_optax.displaced(gradient, displacements.ascent(probe, rho=0.05)))
  >>> value, grads = adazo({"w": jnp.ones((8, 4))}, jnp.eye(8), key=0, step=3)
  >>> lorenza = gum_optax.adamw(
  ...     1e-3, gum_optax.galore(rank=2, projector=projectors.randomized_svd))

Tests: tests/library/test_displacements.py.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks
from gum_optax import dimension_numbers as dims
from gum_optax._paths import PyTree

ValueAndGrad: TypeAlias = Callable[..., tuple[Any, PyTree]]
"""``(params, *args) -> (value, gradient)``, such as ``jax.value_and_grad(loss)``."""

Displacement: TypeAlias = Callable[..., PyTree]
"""``(params, *args, **kwargs) -> tree like params``, in float32 or wider."""


def displaced(value_and_grad: ValueAndGrad, displacement: Displacement | PyTree) -> ValueAndGrad:
    """Returns a function that takes the gradient at displaced weights.

    Weights in half precision are displaced in float32, in which a small displacement is not lost,
    and the loss gets them in float32. A model that computes in bfloat16 has to round them itself.

    Args:
      value_and_grad: ``(params, *args) -> (value, gradient)``: ``jax.value_and_grad(loss)`` or a
        similar function, also with an auxiliary output.
      displacement: ``(params, *args, **kwargs) -> tree like the parameters``, for example from
        `ascent`, or such a tree.

    Returns:
      ``(params, *args, **kwargs) -> (value, gradient)``. Positional arguments go to both functions,
      keyword arguments only to the displacement: the ``key`` and ``step`` of an estimator, or the
      ``previous`` gradient. The value is the loss at the displaced weights, and the gradient has
      the dtypes of ``params``.

    Raises:
      TypeError: if ``value_and_grad`` is no function; from the result, if keyword arguments are
        given although the displacement is a tree.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> gradient = jax.value_and_grad(lambda w: jnp.sum(w**2) / 2)
      >>> gum_optax.displaced(gradient, jnp.full(3, 0.5))(jnp.ones(3))[1]
      Array([1.5, 1.5, 1.5], dtype=float32)

    References:
      Foret et al., SAM, arXiv 2010.01412; Lin et al., arXiv 2006.05720, for extrapolation.
    """
    _checks.function("value_and_grad", value_and_grad, "(params, *args) -> (value, gradient)")

    def at_displaced(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        # 1. d, from a function or as given. A module of weights is a tree, although it is callable.
        if dims.is_function(displacement):
            moved_by = displacement(params, *args, **kwargs)
        elif kwargs:
            raise TypeError(
                f"`displacement` is a tree and takes no arguments, got {', '.join(kwargs)}; pass "
                "a function of the parameters."
            )
        else:
            moved_by = displacement
        # 2. g = grad f(W + d), in the dtypes of W
        moved = jax.tree.map(lambda w, d: _wide(w) + d, params, moved_by)
        value, gradient = value_and_grad(moved, *args)
        return value, jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), gradient, params)

    return at_displaced


def ascent(value_and_grad: ValueAndGrad, rho: float | jax.Array = 0.05) -> Displacement:
    r"""Moves uphill by a fixed distance: the displacement of SAM.

    .. math:: d = \rho\; g / \|g\|, \qquad d = 0 \text{ if } g = 0

    The norm is taken over all parameters together.

    Args:
      value_and_grad: returns g: ``jax.value_and_grad(loss)``, or an estimator. For a linear loss,
        the estimate of `estimators.zeroth_order` never points downhill.
      rho: the distance, >= 0.

    Returns:
      A displacement that passes all of its arguments on to ``value_and_grad``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from gum_optax import displacements
      >>> gradient = jax.value_and_grad(lambda w: 3 * w[0] + 4 * w[1])
      >>> displacements.ascent(gradient, rho=1.0)(jnp.zeros(2))
      Array([0.6, 0.8], dtype=float32)

    References:
      Foret et al., SAM, arXiv 2010.01412. AdaZo-SAM and LORENZA, arXiv 2502.19571, were read in
      secondary sources, which disagree on the probes and have the sign of a descent: nothing here
      reproduces that paper.
    """
    _checks.function("value_and_grad", value_and_grad, "(params, *args) -> (value, gradient)")
    _checks.hyperparameter("rho", rho)

    def displacement(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        gradient = jax.tree.map(_wide, value_and_grad(params, *args, **kwargs)[1])
        # rho / |g|, or 0. The inner `where` avoids a division by zero, which would give NaN.
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor.astype(g.dtype) * g, gradient)

    return displacement


def extrapolation(value_and_grad: ValueAndGrad, rate: float | jax.Array) -> Displacement:
    r"""Moves downhill along a gradient: ``d = -rate * g``, the extragradient method.

    The gradient of the same batch costs a second backward pass. The optimizer may be SGD with
    momentum, Adam, or any other.

    Args:
      value_and_grad: returns g, usually ``jax.value_and_grad(loss)``.
      rate: the learning rate of the extrapolation, >= 0. At 0 there is no displacement.

    Returns:
      A displacement that passes all of its arguments on to ``value_and_grad``.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> from gum_optax import displacements
      >>> gradient = jax.value_and_grad(lambda x: x**2)
      >>> ahead = gum_optax.displaced(gradient, displacements.extrapolation(gradient, 0.05))
      >>> x = jnp.float32(1.0)
      >>> round(float(x - 0.1 * ahead(x)[1]), 6)
      0.82

    References:
      Lin et al., arXiv 2006.05720. The rule was taken from secondary sources and is not verified
      against the paper.
    """
    _checks.function("value_and_grad", value_and_grad, "(params, *args) -> (value, gradient)")
    _checks.hyperparameter("rate", rate)

    def displacement(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        return _downhill(rate, value_and_grad(params, *args, **kwargs)[1])

    return displacement


def along_previous(rate: float | jax.Array) -> Displacement:
    r"""Moves downhill along the gradient of the step before: ``d = -rate * previous``.

    It costs no second backward pass but the memory of one gradient, which the training step keeps
    and passes as the keyword argument ``previous`` (zeros at first).

    Args:
      rate: as for `extrapolation`.

    Returns:
      A displacement ``(params, *args, previous) -> tree``.

    Raises:
      TypeError, ValueError: if ``rate`` is not a finite number >= 0.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> from gum_optax import displacements
      >>> gradient = jax.value_and_grad(lambda x: x**2)
      >>> ahead = gum_optax.displaced(gradient, displacements.along_previous(0.1))
      >>> x, previous = jnp.float32(1.0), jnp.float32(0.0)
      >>> for _ in range(2):
      ...     _, previous = ahead(x, previous=previous)
      ...     x = x - 0.1 * previous

    References:
      Lin et al., arXiv 2006.05720, not verified against the paper.
    """
    _checks.hyperparameter("rate", rate)

    def displacement(params: PyTree, *args: Any, previous: PyTree) -> PyTree:
        del params, args
        return _downhill(rate, previous)

    return displacement


def _downhill(rate: float | jax.Array, gradient: PyTree) -> PyTree:
    """Returns ``-rate * g`` of every leaf, in float32 or wider."""
    return jax.tree.map(lambda g: -jnp.asarray(rate, g.dtype) * g, jax.tree.map(_wide, gradient))


def _wide(x: Any) -> jax.Array:
    """Returns an array in float32, or float64 if it has that."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

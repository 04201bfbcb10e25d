r"""Displaced gradients: the gradient at a point near the weights, in place of that at the weights.

.. math:: g = \nabla f(W + d(W)), \qquad W \leftarrow W - \eta\, \text{base}(g)

The *displacement* d is a function of the weights and the batch; any optax transformation follows as
the base. Uphill it is SAM, downhill extrapolation:

- `ascent` of a gradient: SAM; of an estimate from `estimators`: AdaZo-SAM, which has one backward
  pass in place of two; with low-rank Adam as base: LORENZA;
- `extrapolation` of this batch's gradient (extragradient), or `along_previous` of the last one:
  extrapolated SGD and Adam, for large batches.

Example:
  SAM in front of GUM:

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import gum_optax
  >>> from gum_optax import displacements
  >>> def loss(params, x):
  ...     return jnp.mean((x @ params["w"]) ** 2)
  >>> gradient = jax.value_and_grad(loss)
  >>> sam = gum_optax.displaced(gradient, displacements.ascent(gradient, rho=0.05))
  >>> value, grads = sam({"w": jnp.ones((8, 4))}, jnp.eye(8))

  LORENZA is AdaZo-SAM and low-rank Adam. Keyword arguments go to the displacement, here to its
  estimator. (Its paper draws the probes within the optimizer's own bases, here they have bases of
  their own.)

  >>> from gum_optax import estimators, projectors
  >>> probe = estimators.zeroth_order(loss, estimators.low_rank(rank=2, period=50))
  >>> adazo = gum_optax.displaced(gradient, displacements.ascent(probe, rho=0.05))
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
from gum_optax._paths import PyTree

ValueAndGrad: TypeAlias = Callable[..., tuple[Any, PyTree]]
"""``(params, *args) -> (value, gradient)``, such as ``jax.value_and_grad(loss)``."""

Displacement: TypeAlias = Callable[..., PyTree]
"""``(params, *args, **kwargs) -> tree like params``, in float32 or wider."""


def displaced(value_and_grad: ValueAndGrad, displacement: Displacement | PyTree) -> ValueAndGrad:
    """Returns a function that takes the gradient at displaced weights.

    Weights in half precision are displaced in float32, in which a small displacement is not lost,
    and the loss is given them so. A model that wants bfloat16 rounds them itself.

    Args:
      value_and_grad: ``(params, *args) -> (value, gradient)``: ``jax.value_and_grad(loss)``, or
        any function of the kind, with an auxiliary output, too.
      displacement: ``(params, *args, **kwargs) -> tree`` like the parameters, such as `ascent`
        makes, or the tree itself.

    Returns:
      ``(params, *args, **kwargs) -> (value, gradient)``. Positional arguments go to both functions,
      keyword arguments to the displacement alone: the ``key`` and ``step`` of an estimator, or the
      ``previous`` gradient. The value is the one at the displaced weights, the gradient has the
      dtypes of ``params``.

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
        if callable(displacement):
            moved_by = displacement(params, *args, **kwargs)
        elif kwargs:
            raise TypeError(
                f"`displacement` is a tree and takes no arguments, got {', '.join(kwargs)}; pass "
                "a function of the parameters."
            )
        else:
            moved_by = displacement
        # g = grad f(W + d)
        moved = jax.tree.map(lambda w, d: _wide(w) + d, params, moved_by)
        value, gradient = value_and_grad(moved, *args)
        return value, jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), gradient, params)

    return at_displaced


def ascent(value_and_grad: ValueAndGrad, rho: float | jax.Array = 0.05) -> Displacement:
    r"""Moves uphill by a fixed distance: the displacement of SAM.

    .. math:: d = \rho\; g / \|g\|, \qquad \text{0 where g is 0}

    The norm is that of all parameters together.

    Args:
      value_and_grad: makes g: ``jax.value_and_grad(loss)``, or an estimator. For a loss that is
        linear, the estimate of `estimators.zeroth_order` never points downhill.
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
        norm = optax.tree.norm(gradient)
        factor = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda g: factor.astype(g.dtype) * g, gradient)

    return displacement


def extrapolation(value_and_grad: ValueAndGrad, rate: float | jax.Array) -> Displacement:
    r"""Moves downhill along a gradient: ``d = -rate * g``, the extragradient method.

    With the gradient of the same batch it costs a second backward pass. The base may be SGD with
    momentum, Adam, or any other.

    Args:
      value_and_grad: makes g, usually ``jax.value_and_grad(loss)``.
      rate: the extrapolation's own learning rate, >= 0. At 0 nothing changes.

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

    It costs no second backward pass, and one copy of the gradient, which the training step keeps
    and gives as the keyword argument ``previous`` (zeros at first).

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
    """``-rate * g`` of every leaf, in float32 or wider."""
    return jax.tree.map(lambda g: -jnp.asarray(rate, g.dtype) * g, jax.tree.map(_wide, gradient))


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

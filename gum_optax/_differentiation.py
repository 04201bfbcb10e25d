"""A loss as a program, and its backward pass with taps on the weights.

The program is a jaxpr, which an interpreter runs (`_interception`): compressed weights enter it as
views with a tap, and the cotangents of the taps are their compressed gradients.

Tests: tests/library/test_backward.py.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from gum_optax import _codes, _taps
from gum_optax._interpreter import Interpreter, View
from gum_optax._paths import PyTree

if TYPE_CHECKING:
    from gum_optax._weights import Model


class Program(NamedTuple):
    """A loss as a jaxpr.

    Attributes:
      closed: the jaxpr, a function of the leaves of the parameters.
      results: the structure of its results.
      has_aux: whether the loss returns a pair (value, aux).
    """

    closed: Any
    results: Any
    has_aux: bool


def traced(
    loss: Callable[..., Any], params: PyTree, args: Any, kwargs: Any, has_aux: bool
) -> Program:
    """Traces a loss, or raises if it does not return a real scalar (with aux, a pair).

    All other arguments become constants of the jaxpr, since only parameters are followed.
    """
    closed, shapes = jax.make_jaxpr(
        lambda params: loss(params, *args, **kwargs), return_shape=True
    )(params)
    if has_aux and not (isinstance(shapes, tuple) and len(shapes) == 2):
        raise TypeError(f"`loss` must return a pair (value, aux) with `has_aux`, got {shapes}.")
    value: Any = shapes[0] if has_aux else shapes
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`loss` must return a real scalar, got {value}.")
    return Program(closed, jax.tree.structure(shapes), has_aux)


class Found(NamedTuple):
    """The results of a backward pass.

    Attributes:
      leaves: by position, gradients of leaves that are not compressed, and residuals.
      taps: by position, the cotangents of taps: new basis ``[*batch, m, r]``, None outside of
        refreshes, and ``P'G`` ``[*batch, r, n]``.
      slots: by group, G of drawn matrices, ``[slots, m, n]``.
    """

    leaves: dict[int, jax.Array]
    taps: dict[int, tuple[Any, jax.Array]]
    slots: dict[Any, jax.Array]


def differentiated(
    model: "Model",
    program: Program,
    run: Interpreter,
    taps: dict[int, _taps.Tap],
    at_root: frozenset[int] = frozenset(),
) -> tuple[Any, Found]:
    """Runs a program and its backward pass.

    Args:
      model: the parameters.
      program: the loss.
      run: decides how weights are tapped; its slots are not used.
      taps: by position, the taps of compressed leaves.
      at_root: positions of weights that are tapped before anything uses them.

    Returns:
      The value of the loss, or its pair with aux, and the results of the backward pass.
    """
    weights = {weight.leaf: weight for weight in model.weights}
    # 1. The arguments of differentiation: leaves that are not compressed, or all leaves if
    #    residuals are wanted; zeros and, for a refresh, bases, whose cotangents are the results of
    #    taps; and slots. A refresh keeps no gradient of a matrix and needs no slots.
    plain = {i: leaf for i, leaf in enumerate(model.leaves) if run.residual or i not in weights}
    lows = {leaf: (tap.basis if run.whole else None, tap.low) for leaf, tap in taps.items()}
    zeros = {} if run.whole else model.zero_slots()

    # 2. The loss as a function of them: each compressed leaf enters the program as a view.
    def function(plain: Any, lows: Any, slots: Any) -> Any:
        inner = run.inside(slots)
        values: list[Any] = []
        for i, leaf in enumerate(model.leaves):
            value: Any = plain.get(i, leaf)
            if i in weights:
                basis, low = lows[i]
                tap = taps[i]._replace(low=low)
                if basis is not None:
                    tap = tap._replace(basis=basis)
                weight = weights[i]
                unpack = model.unpack_of(weight) if isinstance(tap.basis, _codes.Codes) else None
                value = View(value, weight.axes, tap, i, weight.key, unpack)
                if i in at_root:
                    value = inner.tapped(value, "root")
            values.append(value)
        results = inner.run(program.closed.jaxpr, program.closed.consts, values)
        results = [inner.tapped(result, "result") for result in results]
        return (results[0], inner.slots), results

    # 3. The backward pass, from a cotangent of one for the loss and zero for the slots.
    (value, _), pull, results = jax.vjp(function, plain, lows, zeros, has_aux=True)
    one = jnp.ones_like(value)
    if not run.whole:
        # The value before the backward pass: otherwise XLA may compute it after the update, for
        # which it keeps a copy of the old head. A refresh has no use for the value.
        value, one = jax.lax.optimization_barrier((value, one))
    found = Found(*pull((one, zeros)))
    return jax.tree.unflatten(program.results, [value, *results[1:]]), found

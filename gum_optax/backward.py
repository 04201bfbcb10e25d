r"""Gradients that are compressed in the backward pass: `value_and_grad` for low-rank optimizers.

`low_rank` needs only ``P'G``, r x n, of a gradient G, m x n. For ``y = x W`` the backward pass can
compute it without G, as ``(x P)' dy``. Then gradients, the buffers that sum them over microbatches
and the messages between data-parallel devices take r/m of the memory. The product that makes G, a
third of the arithmetic of training, nearly vanishes.

The model is not changed. The loss is traced, every weight that the optimizer compresses is followed
to the products that use it, and these products get a backward pass of their own. A training step
is::

    refresh = backward.refresh(loss, tx)
    value_and_grad = backward.value_and_grad(loss, tx)

    @jax.jit
    def step(params, state, batch):
        state = refresh(params, state, batch)                     # new bases, once in a period
        value, gradients = value_and_grad(params, state, batch)   # P'G of every matrix
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

Up to rounding, this takes the same steps as `jax.value_and_grad` and ``tx.update``. A refresh costs
an additional backward pass, in which one full gradient exists at a time.

**Accumulation.** The gradients are linear in the loss, so ``optax.microbatching.microbatch`` may
sum the gradients of parts of a batch. Bases come from the batch that `refresh` is given; one part
of a batch is enough.

**Clipping** by a global norm sees ``|P'G|`` and the norms of the residuals of drawn matrices. The
norm of these is at most the norm of the gradient.

**Residual rules that read the whole residual**, such as `residuals.through`, get it in the place of
the gradient, in its dtype. Then full gradients exist as without this module; only a refresh still
holds one at a time.

Tests: tests/library/test_backward.py, tests/library/test_interception.py.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _sources
from gum_optax._differentiation import differentiated, traced
from gum_optax._interception import interpreter
from gum_optax._interpreter import Interpreter
from gum_optax._low_rank import LowRankState
from gum_optax._paths import PyTree
from gum_optax._projected import Projected
from gum_optax._weights import Model, number_of

__all__ = ["Projected", "Use", "explain", "refresh", "value_and_grad"]


def value_and_grad(
    loss: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that returns the value and the compressed gradients of a loss.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)`` with ``has_aux``: any
        function that ``jax.grad`` can differentiate by its first argument.
      tx: the optimizer, with one or more `low_rank` in it: `gum`, `adamw`, or a chain.
      has_aux: whether ``loss`` returns a pair.

    Returns:
      ``(params, state, *args, **kwargs) -> (value, gradients)``, where ``state`` is the state of
      ``tx`` after `refresh`. Gradients have a `Projected` in the place of every compressed matrix,
      and arrays elsewhere. All projections are NaN if the bases in the state belong to another
      period than its step, so that a forgotten `refresh` is noticed.

    Raises:
      TypeError, ValueError: if an argument is malformed, if ``tx`` compresses nothing, or if its
        residual rule reads the gradient before it is projected (`residuals.feedback`); from the
        returned function, if the value of the loss is no real scalar.

    Warns:
      UserWarning: if a matrix has uses other than dense products, so that its full gradient exists
        for a short time; see `explain`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gum_optax
      >>> from gum_optax import backward, residuals
      >>> compression = gum_optax.LowRank(rank=2, residual=residuals.drop())
      >>> tx = gum_optax.gum(0.02, compression)
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> params, x = {"w": jnp.eye(4, 6)}, jnp.ones((8, 4))
      >>> state = jax.jit(backward.refresh(loss, tx))(params, tx.init(params), x)
      >>> value, gradients = jax.jit(backward.value_and_grad(loss, tx))(params, state, x)
      >>> gradients["w"].low.shape
      (2, 6)
    """
    _checks.function("loss", loss, "(params, *args) -> scalar")
    _checks.transformation("tx", tx)

    def call(params: PyTree, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        # 1. The matrices, their bases and draws, and the loss as a program.
        model = Model(tx, params, state)
        program = traced(loss, params, args, kwargs, has_aux)
        # 2. Its backward pass, with taps where the program uses these matrices.
        residual = any(source.compression.residual.reads == "residual" for source in model.sources)
        run = interpreter(residual=residual)
        result, found = differentiated(model, program, run, model.taps())
        # 3. `run` has noted all uses. With whole residuals every full gradient exists anyway.
        if not residual:
            _warn_of_whole_gradients(model, run)
        return result, model.gradients(found, residual)

    return call


def refresh(
    loss: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Callable[..., Any]:
    """Makes a function that moves a state to a new period when one is due.

    Args:
      loss: as for `value_and_grad`.
      tx: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.

    Returns:
      ``(params, state, *args, **kwargs) -> state``. At the first step of a period the result has
      new bases, from the gradients of this batch, new draws, and the inner state that the carry
      keeps. At other steps the state is returned unchanged and nothing is computed; a second call
      in a step does nothing. A weight on which the loss does not depend gets a basis of zeros.

    Raises:
      TypeError, ValueError: as for `value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import backward
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=2, period=100))
      >>> loss = lambda params, x: sum(jnp.sum((x @ w) ** 2) for w in params["layers"])
      >>> params, x = {"layers": [jnp.eye(4, 6)] * 4}, jnp.ones((8, 4))
      >>> state = jax.jit(backward.refresh(loss, tx))(params, tx.init(params), x)
      >>> optax.tree.get(state, "period")
      Array(0, dtype=int32)
    """
    _checks.function("loss", loss, "(params, *args) -> scalar")
    _checks.transformation("tx", tx)

    def call(params: PyTree, state: Any, *args: Any, **kwargs: Any) -> Any:
        model = Model(tx, params, state)
        # due[i]: whether the step of source i is in another period than its bases.
        due = jnp.stack([source.state.period != number_of(source) for source in model.sources])

        def renew() -> list[LowRankState]:
            program = traced(loss, params, args, kwargs, has_aux)
            return model.renewed(program, due)

        # Inside of a `cond`: steps without a refresh must not pay for its backward pass.
        new = jax.lax.cond(jnp.any(due), renew, lambda: [s.state for s in model.sources])
        # The new states at their places in the state of the optimizer.
        placed = dict(zip((source.place for source in model.sources), new, strict=True))
        every = _sources.states(state, LowRankState)
        return _sources.with_states(
            state, LowRankState, [placed.get(i, old) for i, old in enumerate(every)]
        )

    return call


class Use(NamedTuple):
    """The uses of one matrix, or of one stack of matrices, in a loss.

    Attributes:
      name: the leaf's name.
      products: the number of dense products that use it; they need no full gradient.
      others: all other operations that use it. For each, a full gradient exists until it is
        compressed.
    """

    name: str
    products: int
    others: tuple[str, ...]


def explain(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> list[Use]:
    """Lists the uses of all compressed matrices in a loss; nothing is computed.

    Args:
      loss: as for `value_and_grad`.
      tx: as for `value_and_grad`.
      params: parameters, or their ``jax.ShapeDtypeStruct`` descriptions.
      *args: further arguments of the loss, or descriptions of them.
      has_aux: as for `value_and_grad`.
      **kwargs: further keyword arguments of the loss, or descriptions of them.

    Returns:
      One `Use` for each compressed leaf, in the order of ``jax.tree.leaves``. A leaf that the loss
      does not use has neither products nor others.

    Raises:
      TypeError, ValueError: as for `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> from gum_optax import backward
      >>> tx = gum_optax.gum(0.02, gum_optax.galore(rank=2))
      >>> loss = lambda w, x: jnp.sum(x @ w["up"]) + jnp.sum(jnp.tanh(w["gate"]))
      >>> params = {"up": jnp.ones((4, 6)), "gate": jnp.ones((4, 6))}
      >>> for use in backward.explain(loss, tx, params, jnp.ones((8, 4))):
      ...     print(use)
      Use(name='gate', products=0, others=('tanh',))
      Use(name='up', products=1, others=())
    """
    uses: list[Use] = []

    # The same run as in `value_and_grad`, on shapes; only the notes of the interpreter are used.
    def trace(params: PyTree, state: Any, args: Any, kwargs: Any) -> None:
        model = Model(tx, params, state)
        program = traced(loss, params, args, kwargs, has_aux)
        run = interpreter()
        differentiated(model, program, run, model.taps())
        uses.extend(_uses(model, run))

    jax.eval_shape(trace, params, jax.eval_shape(tx.init, params), args, kwargs)
    return uses


def _uses(model: Model, run: Interpreter) -> list[Use]:
    """Returns the uses that a run has noted, one `Use` for each compressed leaf."""

    def use(leaf: int) -> Use:
        own = [met for met in run.met if met.leaf == leaf]
        others = tuple(sorted(met.why for met in own if met.why))
        return Use(model.names[leaf], len(own) - len(others), others)

    return [use(weight.leaf) for weight in model.weights]


def _warn_of_whole_gradients(model: Model, run: Interpreter) -> None:
    """Warns once of leaves whose full gradients exist for a short time."""
    others = [use for use in _uses(model, run) if use.others]
    if others:
        first = others[0]
        warnings.warn(
            f"{len(others)} of {len(model.weights)} compressed leaves have uses other than "
            f"dense products, so their full gradients exist for a short time: `{first.name}` "
            f"({', '.join(first.others)}). `gum_optax.backward.explain` lists them.",
            stacklevel=3,
        )

"""The engine: a linear codec around any optax transformation."""

from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _checks, _codec, _layouts, _mesh, projectors, restarts, samplers
from gum_optax._injection import injectable
from gum_optax._layouts import Layout, find_layouts
from gum_optax._stacks import Stack, StackBy, by_role
from gum_optax._state import (
    LowRankState,
    check_fits,
    is_placeholder,
    keep_dtypes,
    placeholder_state,
)
from gum_optax._typing import Key, Projector, PyTree


@injectable()
def low_rank(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    period: int,
    projector: Projector | projectors.switch = projectors.subspace_iteration,
    sampler: samplers.Sampler = samplers.fixed_size(2),
    restart: bool | restarts.Restart = True,
    momentum_dtype: Any = None,
    stack_by: StackBy = by_role,
    key: Key = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optax transformation on unbiased low-rank compressed gradients.

    Every ``period`` steps, from the gradient of that step, each matrix gets a basis P of rank r and
    the sampler draws which matrices are full-rank for the coming period, each with probability q.
    At every step the base sees, and its updates are expanded from,

    .. math::
        P^\top G / (1 - q) \;\text{(low-rank matrices)}, \qquad
        (G - P P^\top G) / q \;\text{(full-rank matrices)}

    so the expectation of ``expand(compress(G))`` over the draw is G. What is unbiased is this
    estimate of the gradient; after a nonlinear base (Adam, Newton-Schulz) nothing is.

    Every leaf is taken as matrices: the last two axes, with leading axes as batch. The matrices of
    one role form a stack (see `by_role`), and a stack of N matrices m x n, m <= n, holds N bases m
    x r, N base states r x n and one dense base state m x n per slot. A stack that cannot gain is
    dense, and the base runs on it uncompressed and is never restarted: one with ``rank >= m``, or
    one whose sampler draws with probability 1 (`samplers.fixed_size` on a single matrix).

    The base is given compressed parameters if it is given any, so decoupled weight decay inside the
    base is an unbiased estimate of itself; for exact weight decay chain it after ``low_rank``.

    A matrix whose gradient is not finite has updates that are not finite until the next refresh;
    other matrices are not touched. A dense stack, and what a restart carries over, stays so.
    ``optax.apply_if_finite`` around the whole skips such steps.

    Numbers reach the base in float32 (float64 for float64 leaves), and its state keeps the dtypes
    of ``init``.

    Args:
      inner: the base, any ``optax.GradientTransformation``. Schedules belong outside: a base is
        re-initialized at each refresh.
      rank: r, an int >= 1.
      period: steps between refreshes of bases and draws, an int >= 1. Step 0 is a refresh.
      projector: how a basis comes from a gradient, see `projectors`.
      sampler: how matrices are drawn, see `samplers`.
      restart: what becomes of the base's state at a refresh. True: it starts anew. False: the
        states of dense slots alone do (they serve other matrices), and low-rank states go on in the
        new basis unrotated, as in GaLore. A step count that the base shares between matrices, such
        as Adam's, then goes on too, so restarted slots miss its bias correction. Or a function, see
        `restarts`; `restarts.rotate` carries low-rank momentum into the new basis.
      momentum_dtype: dtype of the base's state, by default that of the parameters.
      stack_by: ``(path, leaf) -> stack name``; `by_role` or `by_shape` or your own.
      key: an int seed or a threefry key. The draws of a period depend on this key, the period's
        number and the stack's name alone: equal on every host, at every sharding, after every
        resume.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `LowRankState`. Updates have the
      gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: if an argument is malformed; at ``init`` and ``update`` if a leaf has
        fewer than two axes or is not real floating point; at ``update`` if the gradients do not fit
        the state.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(
      ...     gum_optax.low_rank(optax.scale_by_adam(), rank=4, period=100),
      ...     optax.scale_by_learning_rate(1e-3))
      >>> params = {"layers": [{"kernel": jnp.ones((16, 32))} for _ in range(8)]}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> state[0].inner.mu["layers/*/kernel"].full.shape
      (2, 16, 32)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802.
    """
    _checks.transformation("inner", inner)
    rank = _checks.positive_int("rank", rank)
    period = _checks.positive_int("period", period)
    projectors.check(projector)
    _checks.function("sampler", sampler, "(count) -> samplers.Sampling")
    restart = restarts.resolve(restart)
    _checks.function("stack_by", stack_by, "(path, leaf) -> name")
    momentum_dtype = _checks.floating_dtype("momentum_dtype", momentum_dtype)
    seed = _checks.key_data(key)
    base: Any = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LowRankState:
        if is_placeholder(params):
            return placeholder_state()
        layouts, dense = find_layouts(params, rank, sampler, stack_by)
        return LowRankState(
            count=jnp.zeros((), jnp.int32),
            key=jnp.array(seed),
            basis={
                stack.name: jnp.zeros(
                    (*stack.lead, stack.m, r), stack.compute_dtype, device=stack.basis_sharding
                )
                for stack, r, _ in layouts
            },
            slots={
                stack.name: jnp.full((sampling.slots,), stack.count, jnp.int32)
                for stack, _, sampling in layouts
                if sampling.slots
            },
            inner=base.init(_layouts.zeros_compressed(layouts, momentum_dtype)),
            dense=base.init(_layouts.zeros_dense(dense, momentum_dtype)) if dense else None,
        )

    def update(
        updates: PyTree, state: LowRankState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LowRankState]:
        return _mesh.in_auto_mode(step, updates, state, params, extra_args, like=(updates, state))

    def step(
        updates: PyTree, state: LowRankState, params: PyTree | None, extra_args: dict[str, Any]
    ) -> tuple[PyTree, LowRankState]:
        leaves, treedef = jax.tree.flatten(updates)
        parameters = None if params is None else _matching_leaves(params, leaves, treedef)
        like_init = treedef.unflatten(_as_at_init(leaves, parameters))
        check_fits(jax.eval_shape(init, like_init), state)
        layouts, dense = find_layouts(like_init, rank, sampler, stack_by)

        due = state.count % period == 0
        basis, slots = jax.lax.cond(
            due,
            lambda: _new_period(state, layouts, leaves, projector, period),
            lambda: (state.basis, state.slots),
        )
        fresh = base.init(_layouts.zeros_compressed(layouts, momentum_dtype))
        restarted = keep_dtypes(restart(fresh, state.inner, state.basis, basis), state.inner)
        # Chosen entry by entry, which XLA fuses with the base's update of its momentum; through the
        # `cond` above, every momentum would be copied at every step.
        inner_state = jax.tree.map(partial(jnp.where, due), restarted, state.inner)
        low_updates, inner_state = base.update(
            _layouts.compress(layouts, leaves, basis, slots),
            inner_state,
            _layouts.compress(layouts, parameters, basis, slots),
            **extra_args,
        )
        new_leaves = _layouts.expand(layouts, low_updates, basis, slots, leaves)
        dense_state = None
        if dense:
            dense_updates, dense_state = base.update(
                _layouts.collect(dense, leaves),
                state.dense,
                _layouts.collect(dense, parameters),
                **extra_args,
            )
            for stack in dense:
                new_leaves |= dict(zip(stack.leaves, dense_updates[stack.name], strict=True))

        # Leaves without entries belong to no stack and stay as they are.
        results = [new_leaves.get(i, leaf).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(treedef, results), LowRankState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key,
            basis=basis,
            slots=slots,
            inner=keep_dtypes(inner_state, state.inner),
            dense=keep_dtypes(dense_state, state.dense),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _new_period(
    state: LowRankState,
    layouts: list[Layout],
    leaves: list[jax.Array],
    projector: Projector | projectors.switch,
    period: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The bases of a period, from the gradient of its first step, and the matrices of its slots."""
    basis, slots = {}, {}
    for stack, rank, sampling in layouts:
        key = _period_key(state.key, state.count // period, stack.name)
        basis[stack.name] = _new_basis(
            stack,
            _layouts.take(leaves, stack),
            rank,
            projectors.resolve(projector, state.count),
            jax.random.fold_in(key, 1),
            state.basis[stack.name],
        )
        if sampling.slots:
            slots[stack.name] = samplers.draw(sampling, key)
    return basis, slots


def _period_key(key: jax.Array, period_index: jax.Array, stack_name: str) -> jax.Array:
    """The key of one stack in one period: a function of seed, step and name alone.

    Layers that are separate leaves have an index in their path (``layers/*/q``), stacked layers do
    not (``layers/q``): the two name the same matrices and get the same draws.
    """
    name = stack_name.replace("*/", "")
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    typed = jax.random.fold_in(typed, period_index)
    return jax.random.fold_in(typed, np.uint32(crc32(name.encode())))


def _new_basis(
    stack: Stack,
    leaves: list[jax.Array],
    rank: int,
    projector: Projector,
    key: jax.Array,
    previous: jax.Array,
) -> jax.Array:
    """Projects matrix after matrix, so that temporaries are those of one matrix."""
    take = _codec.gatherer(stack, leaves, previous.dtype)

    def one(argument: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, matrix_key, previous_basis = argument
        basis = projector(matrix_key, take(index), rank, previous_basis)
        if getattr(basis, "shape", None) != previous_basis.shape:
            raise ValueError(
                f"`projector` returned {basis} for stack `{stack.name}`; expected an orthonormal "
                f"basis of shape {previous_basis.shape}, that is [m, r]."
            )
        return basis.astype(previous.dtype)

    keys = jax.random.split(key, stack.count)
    flat = previous.reshape(-1, *previous.shape[-2:])
    return jax.lax.map(one, (jnp.arange(stack.count), keys, flat)).reshape(previous.shape)


def _as_at_init(leaves: list[jax.Array], parameters: list[jax.Array] | None) -> list[Any]:
    """Leaves as ``init`` saw them: dtypes tell stacks apart, and gradients may have others."""

    def describe(gradient: Any, parameter: Any) -> jax.ShapeDtypeStruct:
        floating = jnp.issubdtype(gradient.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(gradient.shape, (parameter if floating else gradient).dtype)

    return list(map(describe, leaves, leaves if parameters is None else parameters))


def _matching_leaves(params: PyTree, leaves: list[jax.Array], treedef: Any) -> list[jax.Array]:
    """The leaves of ``params``, in the order of those of the updates."""
    parameters = jax.tree.leaves(params)
    shapes = [jnp.shape(p) for p in parameters]
    expected = [leaf.shape for leaf in leaves]
    if shapes != expected:
        raise ValueError(
            f"`params` must have the structure and shapes of the updates, {treedef} with shapes "
            f"{expected}; got {jax.tree.structure(params)} with shapes {shapes}."
        )
    return parameters

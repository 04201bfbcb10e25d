r"""`low_rank`: runs any optax transformation on gradients in low-rank coordinates.

A `LowRank` value describes how gradients are compressed. `low_rank` compresses them, runs an
ordinary optax transformation, the *inner* transformation, on the compressed values, and expands its
updates:

.. math::
    G \;\xrightarrow{\text{encode}}\; (P^\top G, \dots) \;\xrightarrow{\text{inner}}\; (L, \dots)
    \;\xrightarrow{\text{decode}}\; U

Tests: tests/library/test_low_rank.py, and tests/library/test_unbiased.py for the law.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _ledger, _mesh, _packing, _sources, carries, projectors
from gum_optax._codec import Frame
from gum_optax._compression import LowRank, period_of
from gum_optax._groups import Group
from gum_optax._paths import PyTree, is_stand_in, leaves_with_names
from gum_optax._projected import described, is_projected
from gum_optax._refresh import new_period
from gum_optax._treatments import (
    divided,
    rows,
    warn_of_uncompressed,
    zero_bases,
    zero_leaves,
    zeros,
)

STATE_VERSION = 6
"""Version of the structure of `LowRankState`; checkpoints of another version cannot be restored.

1. Matrices of several batch axes had one leading axis in the state.
2. The leading axes of the state are the batch axes of the leaves.
3. Groups: ``residual`` and ``uncompressed`` are fields, ``Compressed.full`` is called ``residual``.
4. A new field ``period`` is the number of the period to which bases and draws belong.
5. Names of groups have ``.`` in the place of ``/``.
6. Codes of four bits that share a byte are half a block apart; they were neighbours.
"""


class LowRankState(NamedTuple):
    """State of `low_rank`: plain arrays in dicts keyed by group name.

    Attributes:
      count: ``int32[]``, steps taken. It stops at ``2**31 - 1``, as counts of optax do. From then
        on the last period does not end.
      period: ``int32[]``, the period to which bases and draws belong; -1 before the first.
      key: ``uint32[2]``, threefry key data; draws are a function of it, the period and the role.
      basis: group -> ``[*lead, m, r]``, float32 (float64 for float64 parameters), packed by
        ``basis_storage``. The leading axes are N separate matrices, or the batch axes of one leaf,
        or leaves and their batch axes.
      slots: group -> ``int32[slots]``, the matrix that each slot serves; N is an empty slot. Groups
        without slots have no entry.
      residual: group -> the state of the residual rule.
      inner: the inner state for a dict group -> `Compressed`, with ``low`` ``[*lead, r, n]`` and
        ``residual`` ``[slots, m, n]``, packed by the storage.
      uncompressed: the inner state for the leaves of uncompressed groups, packed by the storage;
        None without such groups.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    period: jax.Array
    key: jax.Array
    basis: dict[str, Any]
    slots: dict[str, jax.Array]
    residual: dict[str, Any]
    inner: Any
    uncompressed: Any


def low_rank(
    inner: optax.GradientTransformation, compression: LowRank = LowRank()
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optax transformation on low-rank compressed gradients.

    Every ``period`` steps each matrix gets a new basis P of rank r from the gradient of that step.
    At every step the inner transformation sees the projection ``P'G`` and the residual rule's part
    of ``G - P P'G``; its updates are expanded to the shapes of the parameters. See `LowRank` for
    the options, and `residuals` for which estimates are unbiased.

    The last two axes of every leaf are a matrix, leading axes are batch axes. Matrices of one role
    form a group. A group that cannot gain from compression (rank >= m, or every matrix always
    drawn) runs through the inner transformation uncompressed and is never restarted. `memory_plan`
    shows each group, its treatment and the reason, and ``init`` warns if most of the parameters are
    in such groups.

    If ``update`` is given parameters, the inner transformation gets them compressed, so decoupled
    weight decay inside it is compressed like a gradient. For exact weight decay, chain it after
    ``low_rank``. Schedules belong outside as well, since the inner state may restart at a refresh.

    A matrix with a non-finite gradient has non-finite updates until the next refresh; other
    matrices are not affected. Momentum that is never restarted stays non-finite: in uncompressed
    groups, and where the carry keeps it. ``optax.apply_if_finite`` around the optimizer skips such
    steps.

    Compression is computed in float32 (float64 for float64 leaves). The state keeps the dtypes of
    ``init``, and updates have the gradients' dtypes.

    Args:
      inner: any ``optax.GradientTransformation``.
      compression: how gradients are compressed.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `LowRankState`.

    Raises:
      TypeError, ValueError: if an argument is malformed; at ``init`` and ``update`` if a leaf has
        fewer than two axes or is not real floating point, or if the carry does not suit ``inner``;
        at ``update`` if the gradients do not fit the state.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(
      ...     gum_optax.low_rank(optax.scale_by_adam(), gum_optax.LowRank(rank=4, period=100)),
      ...     optax.scale_by_learning_rate(1e-3))
      >>> params = {"layers": [{"kernel": jnp.ones((16, 32))} for _ in range(8)]}
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> state[0].inner.mu["layers.*.kernel"].residual.shape
      (2, 16, 32)

    References:
      Pan et al., Unbiased Gradient Low-Rank Projection, arXiv 2510.17802; Zhao et al., GaLore,
      arXiv 2403.03507.
    """
    _checks.transformation("inner", inner)
    _checks.instance("compression", compression, LowRank, "such as `LowRank(rank=64)`")
    rule, storage = compression.residual, compression.storage
    pack_bases = partial(_packing.pack, compression.basis_storage)
    unpack_bases = partial(_packing.unpack, compression.basis_storage)
    # Any: optax types it for trees of parameters, and here it runs on dicts of `Compressed`.
    run: Any = optax.with_extra_args_support(inner)

    def unpack_basis(group: Group, packed: Any, lead: tuple[int, ...]) -> jax.Array:
        like = jax.ShapeDtypeStruct((*lead, group.m, group.rank), group.compute_dtype)
        return unpack_bases({group.name: packed}, {group.name: like})[group.name]

    def init(params: PyTree) -> LowRankState:
        if is_stand_in(params):
            return _stand_in_state()
        groups = compression.groups(params)
        warn_of_uncompressed(groups)
        state = unpacked(groups)
        _check_carry(compression.carry, state)
        _ledger.write(partial(rows, run, compression, groups))
        state = packed(state, fresh=True)
        _sources.write(
            lambda: _sources.Source(
                groups=divided(groups)[0],
                names=[name for name, _ in leaves_with_names(params)],
                compression=compression,
                unpack=unpack_basis,
                renewed=partial(renewed, groups),
                state=state,
            )
        )
        return state

    def unpacked(groups: Sequence[Group]) -> LowRankState:
        """Returns the state before the first step, of which nothing is packed yet."""
        compressed, uncompressed = divided(groups)
        return LowRankState(
            count=jnp.zeros((), jnp.int32),
            period=jnp.full((), -1, jnp.int32),
            key=_checks.key_data(compression.key),
            basis=zero_bases(groups),
            slots={
                group.name: jnp.full((slots,), group.count, jnp.int32)
                for group in compressed
                if (slots := rule.slots(group))
            },
            residual={group.name: rule.init(group) for group in compressed},
            inner=run.init(zeros(compressed, rule)),
            uncompressed=run.init(zero_leaves(uncompressed)) if uncompressed else None,
        )

    def packed(state: LowRankState, fresh: bool = False) -> LowRankState:
        return state._replace(
            basis=pack_bases(state.basis, fresh=fresh),
            inner=_packing.pack(storage, state.inner, fresh=fresh),
            uncompressed=_packing.pack(storage, state.uncompressed, fresh=fresh),
        )

    def renewed(
        groups: Sequence[Group],
        state: LowRankState,
        basis: dict[str, jax.Array],
        slots: dict[str, jax.Array],
    ) -> LowRankState:
        """Returns the state in a new period, with these bases and draws, after the carry."""
        fresh, at_rest = unpacked(groups), pack_bases(basis)
        # The step that follows has the same count, and must have other bits.
        [bits] = _packing.bits_of(storage, ~state.count)
        old = _packing.unpack(storage, state.inner, fresh.inner)
        bases = (unpack_bases(packed, fresh.basis) for packed in (state.basis, at_rest))
        inner = keep_dtypes(compression.carry(fresh.inner, old, *bases), old)
        return state._replace(
            period=period_of(compression, state.count),
            basis=at_rest,
            slots=slots,
            inner=_packing.pack(storage, inner, bits=bits),
        )

    def update(
        updates: PyTree, state: LowRankState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LowRankState]:
        if is_stand_in(updates):
            return updates, state
        return _mesh.in_auto_mode(
            step,
            updates,
            state,
            params,
            extra_args,
            like=lambda: (described(updates, params), state),
        )

    def step(
        updates: PyTree, state: LowRankState, params: PyTree | None, extra_args: dict[str, Any]
    ) -> tuple[PyTree, LowRankState]:
        # 0. Groups depend on shapes alone, so they are found again and not stored; the state must
        #    fit them. NumPy arrays, which reach a step outside of `jit`, become JAX arrays.
        updates = jax.tree.map(jnp.asarray, updates)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_projected)
        parameters = None if params is None else _checks.matching_leaves(params, leaves, treedef)
        groups = compression.groups(treedef.unflatten(_checks.as_at_init(leaves, parameters)))
        compressed, uncompressed = divided(groups)
        fresh = unpacked(groups)
        _checks.fits(jax.eval_shape(packed, fresh), state, STATE_VERSION)
        projected = _are_projected(compressed, leaves)

        # 1. The gradients, corrected by earlier residuals if the rule keeps any (error feedback).
        #    gradients[group]: leaves [*batch, rows, columns]
        gradients = {
            group.name: rule.correct(group, _leaves_of(group, leaves), state.residual[group.name])
            for group in compressed
        }

        # 2. A new period has new bases and new draws, both from this step. P is used in the step
        #    that makes it, so that an estimate never rests on a basis older than a period.
        #    Gradients that come projected are in the bases of the state; `backward.refresh` has
        #    renewed those already.
        #    basis[group]: P [*lead, m, r];  slots[group]: int32 [slots]
        period = state.period if projected else period_of(compression, state.count)
        due = period != state.period
        old_basis = unpack_bases(state.basis, fresh.basis)
        at_rest, slots = state.basis, state.slots
        if not projected:

            def renew() -> tuple[dict[str, Any], dict[str, jax.Array]]:
                new, draws = new_period(
                    compressed,
                    gradients,
                    key=state.key,
                    period=period,
                    projector=projectors.resolve(compression.projector, state.count),
                    rule=rule,
                    old=old_basis,
                )
                return keep_dtypes(pack_bases(new), state.basis), draws

            at_rest, slots = jax.lax.cond(due, renew, lambda: (state.basis, state.slots))
        basis = unpack_bases(at_rest, fresh.basis)
        frames = {
            group.name: Frame(group, basis[group.name], slots.get(group.name))
            for group in compressed
        }

        # 3. Gradients and parameters in coordinates of the bases. A rule may weight the parts.
        #    encoded[group]: low = P'G [*lead, r, n], residual = drawn G - P P'G [slots, m, n]
        encoded = {name: rule.encode(frame, gradients[name]) for name, frame in frames.items()}
        encoded_parameters = None
        if parameters is not None:
            encoded_parameters = {
                name: rule.encode(frame, _leaves_of(frame.group, parameters))
                for name, frame in frames.items()
            }

        # 4. The inner transformation, on the state that the carry keeps at a refresh. The state is
        #    selected entry by entry, which XLA fuses with the update of momentum; inside the `cond`
        #    above, every momentum would be copied at every step.
        #    low_updates[group]: like encoded[group]
        inner_state = _packing.unpack(storage, state.inner, fresh.inner)
        if not projected:
            carried = compression.carry(fresh.inner, inner_state, old_basis, basis)
            carried = keep_dtypes(carried, inner_state)
            inner_state = jax.tree.map(partial(jax.lax.select, due), carried, inner_state)
        low_updates, inner_state = run.update(
            encoded, inner_state, encoded_parameters, **(extra_args | rule.extra_args(frames))
        )

        # 5. Back to the shapes of the parameters: U = P L, plus the rule's update of residuals.
        #    Groups run one after the other, and so do their leaves, so that XLA can apply an update
        #    and free it before the next.
        new_leaves: dict[int, Any] = {}
        residual, last = {}, None
        for name, frame in frames.items():
            expanded, residual[name] = rule.decode(
                frame._replace(after=last),
                low_updates[name],
                encoded[name],
                gradients[name],
                state.residual[name],
            )
            last = expanded[-1]
            new_leaves |= dict(zip(frame.group.leaves, expanded, strict=True))

        # 6. Uncompressed groups, through the inner transformation with a state of its own.
        uncompressed_state = None
        if uncompressed:
            direct, uncompressed_state = run.update(
                _collect(uncompressed, leaves),
                _packing.unpack(storage, state.uncompressed, fresh.uncompressed),
                None if parameters is None else _collect(uncompressed, parameters),
                **extra_args,
            )
            for group in uncompressed:
                new_leaves |= dict(zip(group.leaves, direct[group.name], strict=True))

        # 7. Updates in the gradients' dtypes. Leaves without entries belong to no group, and their
        #    update is their gradient.
        results = [new_leaves.get(i, leaf).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
        bits = _packing.bits_of(storage, state.count, 2)
        new_state = LowRankState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            period=period,
            key=state.key,
            basis=at_rest,
            slots=slots,
            residual=residual,
            inner=_packing.pack(storage, inner_state, bits=bits[0]),
            uncompressed=_packing.pack(storage, uncompressed_state, bits=bits[1]),
        )
        return treedef.unflatten(results), keep_dtypes(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
    """Rounds a tree to another's dtypes: a state does not drift, and its buffers can be donated."""
    return jax.tree.map(lambda n, o: jnp.asarray(n, jnp.result_type(o)), new, old)


# Groups and their leaves ---------------------------------------------------------------------


def _leaves_of(group: Group, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [leaves[position] for position in group.leaves]


def _are_projected(groups: Sequence[Group], leaves: Sequence[Any]) -> bool:
    """Returns whether the gradients came projected; either all compressed groups do, or none."""
    kinds = {
        is_projected(leaf): group.name for group in groups for leaf in _leaves_of(group, leaves)
    }
    if len(kinds) == 2:
        raise ValueError(
            f"The gradients of group `{kinds[True]}` are projected, those of `{kinds[False]}` are "
            "not; pass the whole tree that `backward.value_and_grad` returned."
        )
    return True in kinds


def _collect(groups: Sequence[Group], leaves: Sequence[jax.Array]) -> dict[str, list[jax.Array]]:
    """Returns uncompressed leaves in the form that the inner transformation sees."""
    return {
        group.name: [leaf.astype(group.compute_dtype) for leaf in _leaves_of(group, leaves)]
        for group in groups
    }


# Checks of `init` -----------------------------------------------------------------------------


def _stand_in_state() -> LowRankState:
    """Returns a prefix of every state without copies of parameters, for ``map_params``.

    That function then finds no parameters in the state and changes nothing.
    """
    leaf: Any = jnp.zeros(())
    return LowRankState(*(leaf for _ in LowRankState._fields))


def _check_carry(carry: carries.Carry, state: LowRankState) -> None:
    """Lets a carry that does not suit the inner state raise at ``init``; nothing is computed."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)),
        (state.inner, state.basis),
    )
    jax.eval_shape(lambda inner, basis: carry(inner, inner, basis, basis), *shapes)

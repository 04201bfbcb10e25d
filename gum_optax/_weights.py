"""The weights of a model and their places in an optimizer, for a backward pass that compresses.

`Model` joins the parameters with the states of the optimizer that compress them (`_sources`). It
makes taps on weights (`_taps`); after the backward pass (`_differentiation`), `Model.gradients` and
`Model.renewed` build gradients and states from what the taps found.

Tests: tests/library/test_backward.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _codec, _codes, _refresh, _sources, _taps, projectors
from gum_optax import dimension_numbers as dims
from gum_optax._compression import period_of
from gum_optax._differentiation import Found, Program, differentiated
from gum_optax._groups import Group
from gum_optax._interception import interpreter
from gum_optax._low_rank import LowRankState
from gum_optax._paths import PyTree, leaves_with_names
from gum_optax._projected import Projected


class Weight(NamedTuple):
    """One leaf of a compressed group.

    Attributes:
      leaf: its position among the parameters.
      source: the position of its `low_rank` among the sources.
      group: its group.
      number: its position in the group.
      axes: the place of each of its axes in its matrices.
    """

    leaf: int
    source: int
    group: Group
    number: int
    axes: tuple[_taps.Axis, ...]

    @property
    def key(self) -> tuple[int, str]:
        """The key of its group's slots."""
        return self.source, self.group.name


class Model:
    """The parameters of a model and their places in an optimizer.

    Attributes:
      leaves: the parameters.
      names: their names.
      sources: each `low_rank` of the optimizer, with its present state.
      weights: the compressed leaves, in the order of the parameters.
    """

    def __init__(self, tx: optax.GradientTransformation, params: PyTree, state: Any):
        self.leaves, self._treedef = jax.tree.flatten(params)
        # 1. Each `low_rank` of the optimizer, and its state among the states that were passed.
        found, numbers = _sources.find(tx, params, LowRankState)
        states = _sources.states(state, LowRankState)
        if len(states) <= max(source.place for source in found):
            raise ValueError("`state` must be the state of `tx`: it has no `LowRankState`.")
        self.sources = [
            dataclasses.replace(source, state=_plain(source, states[source.place]))
            for source in found
        ]
        # 2. Each leaf of each group. A source counts the leaves of the tree that it was given, in
        #    which others may be masked, so leaves are found by name.
        names = [name for name, _ in leaves_with_names(params)]
        self.names = names
        position = {name: i for i, name in enumerate(names)}
        self.weights: list[Weight] = []
        for number, source in enumerate(found):
            for group in source.groups:
                for index, own in enumerate(group.leaves):
                    name = source.names[own]
                    leaf = position[name]
                    axes = _axes(self.leaves[leaf].shape, numbers.get(name))
                    self.weights.append(Weight(leaf, number, group, index, axes))
        self.weights.sort(key=lambda weight: weight.leaf)

    def unpack_of(self, weight: Weight) -> Callable[[Any, tuple[int, ...]], jax.Array]:
        """Returns the function that unpacks codes of a weight's bases, see `_taps.Site`.unpack."""
        return partial(self.sources[weight.source].unpack, weight.group)

    def zero_slots(self) -> dict[Any, jax.Array]:
        """Returns empty slots for gradients, ``[slots, m, n]`` for each group that has any.

        They have the dtype of the weights, like gradients without compression.
        """
        return {
            (number, group.name): jnp.zeros(
                (len(source.state.slots[group.name]), group.m, group.n),
                group.dtype,
                device=group.slots_sharding,
            )
            for number, source in enumerate(self.sources)
            for group in source.groups
            if group.name in source.state.slots
        }

    def taps(
        self,
        slots: Sequence[dict[str, jax.Array]] | None = None,
        keys: Sequence[dict[str, jax.Array]] | None = None,
    ) -> dict[int, _taps.Tap]:
        """Returns a tap for each compressed leaf, by position.

        Args:
          slots: by source and group, the matrices that slots serve; by default as in the state.
          keys: by source and group, a key for each matrix; None outside of refreshes.

        Codes of bases stay codes, except for a refresh, whose new bases are cotangents of the old.
        """
        taps: dict[int, _taps.Tap] = {}
        for number, source in enumerate(self.sources):
            served = source.state.slots if slots is None else slots[number]
            for group in source.groups:
                own_keys = None if keys is None else keys[number]
                basis = _in_parts(source, group)
                if keys is not None and isinstance(basis, _codes.Codes):
                    basis = source.unpack(group, basis, group.lead)
                parts = _parts_of(group, basis, served, own_keys)
                for weight in self.weights:
                    if weight.key == (number, group.name):
                        taps[weight.leaf] = parts[weight.number]
        return taps

    def gradients(self, found: Found, residual: bool) -> PyTree:
        """Returns the tree of gradients, with a `Projected` for each compressed leaf."""
        leaves: list[Any] = [found.leaves.get(i) for i in range(len(self.leaves))]
        drawn = self._left_out_of_drawn(found)
        for weight in self.weights:
            source, like = self.sources[weight.source], self.leaves[weight.leaf]
            # If the state is in another period, a refresh was forgotten: the projections are no
            # gradients of this step, and NaN shows it.
            current = source.state.period == number_of(source)
            low = found.taps[weight.leaf][1]
            leaves[weight.leaf] = Projected(
                low=jnp.where(current, low, jnp.nan),
                drawn=drawn.get(weight.key) if weight.number == 0 else None,
                residual=found.leaves[weight.leaf] if residual else None,
                shape=tuple(like.shape),
                dtype=np.dtype(like.dtype),
            )
        return self._treedef.unflatten(leaves)

    def _left_out_of_drawn(self, found: Found) -> dict[Any, jax.Array]:
        """Returns ``E = G - P R`` of the matrices in slots, from their G; zero in empty slots."""
        # Group -> position in the group -> R of that leaf.
        lows: dict[Any, dict[int, jax.Array]] = {}
        for weight in self.weights:
            lows.setdefault(weight.key, {})[weight.number] = found.taps[weight.leaf][1]
        result = {}
        for number, source in enumerate(self.sources):
            for group in source.groups:
                if (key := (number, group.name)) not in found.slots:
                    continue
                serves = source.state.slots[group.name]
                # P [N, m, r] and R [N, r, n] of all matrices; the drawn ones are gathered.
                parts = [lows[key][i] for i in range(len(group.leaves))]
                low = _codec.join(group, parts).reshape(group.count, group.rank, group.n)
                at = jnp.minimum(serves, group.count - 1)
                basis = self._some_bases(source, group, at)
                left_out = found.slots[key].astype(basis.dtype) - basis @ low[at]
                used = (serves < group.count)[:, None, None]
                result[key] = jnp.where(used, left_out, 0.0)
        return result

    def _some_bases(self, source: _sources.Source, group: Group, at: jax.Array) -> jax.Array:
        """Returns the bases of some matrices of a group, ``[len(at), m, r]``."""
        lead = len(group.lead)
        some = jax.tree.map(
            lambda x: x.reshape(group.count, *x.shape[lead:])[at], _in_parts(source, group)
        )
        return source.unpack(group, some, at.shape) if isinstance(some, _codes.Codes) else some

    def renewed(self, program: Program, due: jax.Array) -> list[LowRankState]:
        """Returns the states of all sources; those that are due are in a new period."""
        # 1. The random numbers of the new period.
        slots, keys = [], []
        for source in self.sources:
            rule = source.compression.residual
            drawn = _refresh.draw(source.groups, source.state.key, number_of(source), rule)
            slots.append(drawn[0])
            keys.append(drawn[1])
        resolved = [
            projectors.resolve(source.compression.projector, source.state.count)
            for source in self.sources
        ]
        # 2. The bases, from the gradient of one matrix at a time: a backward pass with taps on
        #    whole weights, which needs no slots.
        taps = self.taps(slots, keys)
        run = interpreter(whole=True, projector=lambda key: resolved[key[0]])
        stacked = {w.leaf for w in self.weights if _taps.positions(w.axes, "batch")}
        at_root = frozenset(w.leaf for w in self.weights) - stacked
        if stacked:
            # A stack is tapped inside the loop over its layers, so that G of one layer exists at a
            # time. If it has any other use, or several, its G is a sum, and it is tapped in front
            # of all uses. A trial run, of shapes alone, counts them.
            trial = dataclasses.replace(run, met=set())
            jax.eval_shape(lambda: differentiated(self, program, trial, taps, at_root)[0])
            uses = [met.leaf for met in trial.met]
            at_root |= {leaf for leaf in stacked if uses.count(leaf) != 1}
        _, found = differentiated(self, program, run, taps, at_root)
        # 3. The states with new bases. Sources may differ in period, so each is selected by its own
        #    `due`; a single source is due whenever this runs.
        states = []
        for number, source in enumerate(self.sources):
            basis = {}
            for group in source.groups:
                own = [w for w in self.weights if w.key == (number, group.name)]
                own.sort(key=lambda weight: weight.number)
                basis[group.name] = _codec.join(group, [found.taps[w.leaf][0] for w in own])
            new = source.renewed(source.state, basis, slots[number])
            states.append(
                jax.tree.map(
                    lambda n, o, d=due[number]: jnp.where(d, n, o) if len(due) > 1 else n,
                    new,
                    source.state,
                )
            )
        return states


def _in_parts(source: _sources.Source, group: Group) -> Any:
    """Returns the basis of a group in a form that can be cut along its leading axes.

    Codes can; other storages may mix matrices, so what they have packed is unpacked.
    """
    basis = source.state.basis[group.name]
    return basis if isinstance(basis, _codes.Codes) else source.unpack(group, basis, group.lead)


def _parts_of(
    group: Group,
    basis: Any,
    slots: dict[str, jax.Array],
    keys: dict[str, jax.Array] | None,
) -> list[_taps.Tap]:
    """Returns the taps of the leaves of a group."""
    lead = group.lead
    low = jnp.zeros((*lead, group.rank, group.n), group.compute_dtype, device=group.low_sharding)
    # serving[i]: the slot of matrix i. An empty slot serves N, which is out of bounds and dropped.
    served = slots.get(group.name, jnp.zeros((0,), jnp.int32))
    numbers = jnp.arange(len(served), dtype=jnp.int32)
    serving = jnp.full((group.count,), len(served), jnp.int32).at[served].set(numbers, mode="drop")
    key = None if keys is None else jax.random.key_data(keys[group.name]).reshape(*lead, 2)
    arrays, treedef = jax.tree.flatten(_taps.Tap(basis, low, serving.reshape(lead), key))
    parts = zip(*(_codec.split(group, array) for array in arrays), strict=True)
    return [treedef.unflatten(part) for part in parts]


def _axes(
    shape: tuple[int, ...], numbers: dims.MuonDimensionNumbers | None
) -> tuple[_taps.Axis, ...]:
    """Returns the place of each axis of a leaf in the leaf's matrices."""
    numbers = numbers or dims.MuonDimensionNumbers(-2, -1)
    batch, rows, columns = dims.axes(shape, numbers)
    found = {i: _taps.Axis("batch", 0, shape[i]) for i in batch}
    # Several axes of one side are merged in row-major order: the last one is the fastest.
    for side, members in (("rows", rows), ("columns", columns)):
        stride = 1
        for i in reversed(members):
            found[i] = _taps.Axis(side, stride, shape[i])
            stride *= shape[i]
    return tuple(found[i] for i in range(len(shape)))


def number_of(source: _sources.Source) -> jax.Array:
    """Returns the number of the period to which the next step of a source's state belongs."""
    return period_of(source.compression, source.state.count)


def _plain(source: _sources.Source, state: LowRankState) -> LowRankState:
    """Returns the state with plain arrays, without the boxes in which wrappers may keep them.

    Raises:
      ValueError: if this `low_rank` cannot take compressed gradients, or if the state was made by
        another optimizer or for other parameters.
    """
    reads = source.compression.residual.reads
    if reads not in ("projection", "residual"):
        raise ValueError(
            "`tx` has a residual rule that reads gradients before they are projected, which the "
            "backward pass does not give: use `jax.value_and_grad` with it."
        )
    leaves, treedef = jax.tree.leaves(state), jax.tree.structure(source.state)
    expected, got = (list(map(jnp.shape, each)) for each in (jax.tree.leaves(source.state), leaves))
    if expected != got:
        raise ValueError(
            "`state` must be the state of `tx` for these `params`: it has arrays of the shapes "
            f"{got}, not {expected}."
        )
    return treedef.unflatten(leaves)

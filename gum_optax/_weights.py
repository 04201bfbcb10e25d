"""The weights of a model and what an optimizer does to them, for a backward pass that compresses.

Three things meet here: a loss as a program, the places of matrices in an optimizer's state
(`_sources`), and taps on weights (`_taps`), which an interpreter puts into the program
(`_interception`).

Tests: tests/library/test_backward.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _codec, _refresh, _sources, _taps, projectors
from gum_optax import dimension_numbers as dims
from gum_optax._groups import Group
from gum_optax._interception import Interpreter, View
from gum_optax._low_rank import LowRankState, period_of
from gum_optax._paths import PyTree, leaves_with_names
from gum_optax._projected import Projected

# A loss as a program ---------------------------------------------------------------------------


class Program(NamedTuple):
    """A loss as a jaxpr of the leaves of the parameters, and the structure of its results."""

    closed: Any
    results: Any
    has_aux: bool


def traced(
    loss: Callable[..., Any], params: PyTree, args: Any, kwargs: Any, has_aux: bool
) -> Program:
    closed, shapes = jax.make_jaxpr(
        lambda params: loss(params, *args, **kwargs), return_shape=True
    )(params)
    if has_aux and not (isinstance(shapes, tuple) and len(shapes) == 2):
        raise TypeError(f"`loss` must return a pair (value, aux) with `has_aux`, got {shapes}.")
    value: Any = shapes[0] if has_aux else shapes
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`loss` must return a real scalar, got {value}.")
    return Program(closed, jax.tree.structure(shapes), has_aux)


# A model and its optimizer -----------------------------------------------------------------------


class Weight(NamedTuple):
    """One leaf of a compressed group: its position among the parameters, and in its group."""

    leaf: int
    source: int
    group: Group
    number: int
    axes: tuple[_taps.Axis, ...]

    @property
    def key(self) -> tuple[int, str]:
        """The key of its group's slots."""
        return self.source, self.group.name


class Found(NamedTuple):
    """What a backward pass finds.

    Attributes:
      leaves: by position, gradients of leaves that are not compressed, and residuals.
      taps: by position, the cotangents ``(basis, low)`` of taps.
      slots: by group, G of drawn matrices ``[slots, m, n]``.
    """

    leaves: dict[int, jax.Array]
    taps: dict[int, tuple[jax.Array, jax.Array]]
    slots: dict[Any, jax.Array]


class Model:
    """The parameters of a model, and what an optimizer does to each of them.

    Attributes:
      leaves: the parameters.
      sources: each `low_rank` of the optimizer.
      weights: the compressed leaves.
    """

    def __init__(self, tx: optax.GradientTransformation, params: PyTree, state: Any):
        self.leaves, self._treedef = jax.tree.flatten(params)
        found, numbers = _sources.find(tx, params, LowRankState)
        states = _sources.states(state, LowRankState)
        if len(states) <= max(source.place for source in found):
            raise ValueError("`state` must be the state of `tx`: it has no `LowRankState`.")
        self.sources = [
            dataclasses.replace(source, state=_plain(source, states[source.place]))
            for source in found
        ]
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

    def zero_slots(self) -> dict[Any, jax.Array]:
        """Slots before any gradient was added, ``[slots, m, n]`` for each group that has them.

        They have the dtype of the weights, as full gradients have.
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
        """A tap for each compressed leaf, by position.

        Args:
          slots: by source and group, the matrices that slots serve; by default those of the state.
          keys: by source and group, a key for each matrix.
        """
        taps: dict[int, _taps.Tap] = {}
        for number, source in enumerate(self.sources):
            served = source.state.slots if slots is None else slots[number]
            for group in source.groups:
                own_keys = None if keys is None else keys[number]
                parts = _parts_of(group, source.state, served, own_keys)
                for weight in self.weights:
                    if weight.key == (number, group.name):
                        taps[weight.leaf] = parts[weight.number]
        return taps

    def gradients(self, found: Found, residual: bool) -> PyTree:
        """The tree of gradients, with those of compressed leaves projected."""
        leaves: list[Any] = [found.leaves.get(i) for i in range(len(self.leaves))]
        drawn = self._left_out_of_drawn(found)
        for weight in self.weights:
            source, like = self.sources[weight.source], self.leaves[weight.leaf]
            # Projections on bases of another period are no gradients of this step.
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
        """``E = G - P R`` of the matrices in slots, from their G; zero in empty slots."""
        lows: dict[Any, dict[int, jax.Array]] = {}
        for weight in self.weights:
            lows.setdefault(weight.key, {})[weight.number] = found.taps[weight.leaf][1]
        result = {}
        for number, source in enumerate(self.sources):
            for group in source.groups:
                if (key := (number, group.name)) not in found.slots:
                    continue
                serves = source.state.slots[group.name]
                parts = [lows[key][i] for i in range(len(group.leaves))]
                low = _codec.join(group, parts).reshape(group.count, group.rank, group.n)
                basis = source.state.basis[group.name].reshape(group.count, group.m, group.rank)
                at = jnp.minimum(serves, group.count - 1)
                left_out = found.slots[key].astype(basis.dtype) - basis[at] @ low[at]
                used = (serves < group.count)[:, None, None]
                result[key] = jnp.where(used, left_out, 0.0)
        return result

    def renewed(self, program: Program, due: jax.Array) -> list[LowRankState]:
        """The states of all sources, with those that are due in a new period."""
        # 1. All that is random in the new period.
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
        # 2. The bases, each from the gradient of one matrix at a time.
        taps = self.taps(slots, keys)
        run = Interpreter({}, whole=True, projector=lambda key: resolved[key[0]])
        stacked = {w.leaf for w in self.weights if _taps.positions(w.axes, "batch")}
        at_root = frozenset(w.leaf for w in self.weights) - stacked
        if stacked:
            # A stack is tapped in the loop over its layers, which must be one and no other use.
            trial = dataclasses.replace(run, met=set())
            jax.eval_shape(lambda: differentiated(self, program, trial, taps, at_root)[0])
            uses = [met.leaf for met in trial.met]
            at_root |= {leaf for leaf in stacked if uses.count(leaf) != 1}
        _, found = differentiated(self, program, run, taps, at_root)
        # 3. States that know of them.
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


def differentiated(
    model: Model,
    program: Program,
    run: Interpreter,
    taps: dict[int, _taps.Tap],
    at_root: frozenset[int] = frozenset(),
) -> tuple[Any, Found]:
    """Runs a program and its backward pass.

    Args:
      model: the parameters.
      program: the loss.
      run: how weights are tapped; its slots are not used.
      taps: by position, those of compressed leaves.
      at_root: positions of weights that are tapped before anything uses them.

    Returns:
      The value of the loss, or its pair with aux, and what the backward pass found.
    """
    weights = {weight.leaf: weight for weight in model.weights}
    # What is differentiated: leaves that are not compressed, all of them where residuals are
    # wanted, the arguments of taps that stand for what they find, and slots.
    plain = {i: leaf for i, leaf in enumerate(model.leaves) if run.residual or i not in weights}
    lows = {leaf: (tap.basis, tap.low) for leaf, tap in taps.items()}
    # Of a basis' gradients none is kept, so that whole ones need no slots.
    zeros = {} if run.whole else model.zero_slots()

    def function(plain: Any, lows: Any, slots: Any) -> Any:
        inner = run.inside(slots)
        values: list[Any] = []
        for i, leaf in enumerate(model.leaves):
            value: Any = plain.get(i, leaf)
            if i in weights:
                basis, low = lows[i]
                tap = taps[i]._replace(basis=basis, low=low)
                value = View(value, weights[i].axes, tap, i, weights[i].key)
                if i in at_root:
                    value = inner.tapped(value, "root")
            values.append(value)
        results = inner.run(program.closed.jaxpr, program.closed.consts, values)
        results = [inner.tapped(result, "result") for result in results]
        return (results[0], inner.slots), results

    (value, _), pull, results = jax.vjp(function, plain, lows, zeros, has_aux=True)
    found = Found(*pull((jnp.ones_like(value), zeros)))
    return jax.tree.unflatten(program.results, [value, *results[1:]]), found


def _parts_of(
    group: Group,
    state: LowRankState,
    slots: dict[str, jax.Array],
    keys: dict[str, jax.Array] | None,
) -> list[_taps.Tap]:
    """The taps of the leaves of a group."""
    lead = group.lead
    low = jnp.zeros((*lead, group.rank, group.n), group.compute_dtype, device=group.low_sharding)
    # serving[i]: the slot of matrix i. An empty slot says N, which is out of bounds and dropped.
    served = slots.get(group.name, jnp.zeros((0,), jnp.int32))
    numbers = jnp.arange(len(served), dtype=jnp.int32)
    serving = jnp.full((group.count,), len(served), jnp.int32).at[served].set(numbers, mode="drop")
    joined = [state.basis[group.name], low, serving.reshape(lead)]
    if keys is not None:
        joined.append(jax.random.key_data(keys[group.name]).reshape(*lead, 2))
    parts = zip(*(_codec.split(group, array) for array in joined), strict=True)
    return [_taps.Tap(*part, *([] if keys is not None else [None])) for part in parts]


def _axes(
    shape: tuple[int, ...], numbers: dims.MuonDimensionNumbers | None
) -> tuple[_taps.Axis, ...]:
    """Each axis of a leaf, as it lies in the leaf's matrices."""
    numbers = numbers or dims.MuonDimensionNumbers(-2, -1)
    batch, rows, columns = dims.axes(shape, numbers)
    found = {i: _taps.Axis("batch", 0, shape[i]) for i in batch}
    for side, members in (("rows", rows), ("columns", columns)):
        stride = 1
        for i in reversed(members):
            found[i] = _taps.Axis(side, stride, shape[i])
            stride *= shape[i]
    return tuple(found[i] for i in range(len(shape)))


def number_of(source: _sources.Source) -> jax.Array:
    """The number of the period that the step of a source's state is in."""
    return period_of(source.compression, source.state.count)


def _plain(source: _sources.Source, state: LowRankState) -> LowRankState:
    """The state with plain arrays, which wrappers may keep in boxes of their own.

    Raises:
      ValueError: if this `low_rank` cannot have compressed gradients, or if the state is another's.
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

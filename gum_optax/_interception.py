"""Interception of the weights of an unmodified model.

A loss is traced to a jaxpr, JAX's program of primitive operations, and an interpreter runs the
jaxpr operation by operation. A weight runs through it as a `View`: its value, and the place of each
of its axes in the matrices of its leaf.

1. Casts, transposes, reshapes and slices of layers return another view.
2. A dense product becomes `_taps.product`, whose backward pass projects without G.
3. Loops, branches and recomputed blocks are entered by an interpreter of their own.
4. Any other operation gets the value of the weight, tapped by `_taps.weight`.

Tests: tests/library/test_interception.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from gum_optax import _taps
from gum_optax._taps import Axis, Site, Tap
from gum_optax._usage import scan_counts
from gum_optax.projectors import Projector


@dataclasses.dataclass(frozen=True)
class View:
    """A weight, or a part of its layers, on its way through the program.

    Attributes:
      value: the array.
      axes: one `Axis` for each axis of the value.
      tap: its tap, with the batch axes of the value in front, in their order.
      leaf: the position of the weight among the leaves of the parameters.
      group: the key of its group's slots.
    """

    value: jax.Array
    axes: tuple[Axis, ...]
    tap: Tap
    leaf: int
    group: Any


class Met(NamedTuple):
    """A place where a weight is used.

    Attributes:
      leaf: the position of the weight among the leaves of the parameters.
      place: the identity of the operation in the program.
      why: the operation that needs the weight's value; empty for a dense product.
    """

    leaf: int
    place: int
    why: str


@dataclasses.dataclass
class Interpreter:
    """Runs a jaxpr in which weights are views.

    Attributes:
      slots: by group, ``[slots, m, n]``; each tap takes them and passes them on.
      whole: whether a weight is tapped where it enters a loop, so that one G serves all its uses.
      projector: maps the key of a group to `Site`.projector.
      residual: passed on to every `Site`.
      met: the uses of weights so far.
      place: the operation at which the program is.
    """

    slots: dict[Any, jax.Array]
    whole: bool = False
    projector: Callable[[Any], Projector | None] = lambda group: None
    residual: bool = False
    met: set[Met] = dataclasses.field(default_factory=set)
    place: int = 0

    def inside(self, slots: dict[Any, jax.Array]) -> "Interpreter":
        """Returns an interpreter for a program within this one, which carries slots of its own."""
        # `met` stays shared: uses within loops and branches count as well.
        return dataclasses.replace(self, slots=dict(slots))

    # Taps --------------------------------------------------------------------------------

    def enter(self, value: Any) -> Any:
        """Taps a weight where it enters a loop if `whole` asks for it; returns others unchanged."""
        return self.tapped(value, "entrance") if self.whole else value

    def tapped(self, value: Any, why: str) -> Any:
        """Returns the array of a view, with a tap that compresses its gradient."""
        if not isinstance(value, View):
            return value
        self.met.add(Met(value.leaf, self.place, why))
        projector = self.projector(value.group)
        # The slots run through the tap, so that its backward pass can add G of drawn matrices.
        site = Site(value.axes, _type_of(value.tap.low), projector, self.residual)
        tapped: Any = _taps.weight(site, value.value, value.tap, self.slots.get(value.group))
        array, slots = tapped
        self.keep(value.group, slots)
        return array

    def keep(self, group: Any, slots: jax.Array | None) -> None:
        """Takes over the slots that a tap passed on; a group without slots has None."""
        if slots is not None:
            self.slots[group] = slots

    # Running -----------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Runs a jaxpr on arrays and views, and returns its results, arrays or views."""
        # Variable of the jaxpr -> its value.
        known: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            self.place = id(equation)
            values = [read(variable) for variable in equation.invars]
            if any(isinstance(value, View) for value in values):
                rule = _RULES.get(equation.primitive.name)
                results = rule(self, equation, values) if rule else None
                if results is None:  # No rule, or one that does not apply.
                    name = equation.primitive.name
                    results = _bind(equation, [self.tapped(value, name) for value in values])
            else:
                results = _bind(equation, values)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in jaxpr.outvars]


class _Within:
    """A program inside an operation, as a function of slots and arrays alone.

    JAX's control flow takes functions of arrays. So views are taken apart into arrays in front of
    the operation, and put together again inside of it.

    Attributes:
      arrays: the arguments of the function beside the slots: the operands, with views taken apart.
      returned: position of a result -> position of the operand that it is, for weights.
    """

    def __init__(self, outer: Interpreter, jaxpr: Any, consts: Sequence[Any], values: Any):
        self.outer, self.jaxpr, self.consts, self.values = outer, jaxpr, consts, values
        self.arrays = [_parts(value) for value in values]
        self.returned: dict[int, int] = {}

    def run(self, slots: Any, arrays: Sequence[Any]) -> tuple[Interpreter, list[Any], list[Any]]:
        """Runs the program; returns the interpreter that ran it, its operands and its results."""
        inner = self.outer.inside(slots)
        # Views again, on the arrays that the operation passed in.
        args = [
            dataclasses.replace(value, value=parts[0], tap=parts[1])
            if isinstance(value, View)
            else parts
            for value, parts in zip(self.values, arrays, strict=True)
        ]
        return inner, args, inner.run(self.jaxpr, self.consts, args)

    def with_arrays(self, slots: Any, arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Runs the program; a weight among its results is given as an array."""
        inner, _, results = self.run(slots, arrays)
        return inner.slots, [inner.tapped(result, "result") for result in results]

    def __call__(self, slots: Any, arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Runs the program; a weight that is returned unchanged, as by `nnx.remat`, is not tapped.

        Its place among the results is None, which `with_returned` fills with the operand.
        """
        inner, args, results = self.run(slots, arrays)
        at = {id(arg): i for i, arg in enumerate(args) if isinstance(arg, View)}
        self.returned = {k: at[id(r)] for k, r in enumerate(results) if id(r) in at}
        return inner.slots, [
            None if k in self.returned else inner.tapped(result, "result")
            for k, result in enumerate(results)
        ]

    def with_returned(self, results: Sequence[Any]) -> list[Any]:
        """Returns the results of a call, with the weights that it returned unchanged."""
        return [
            self.values[self.returned[k]] if k in self.returned else result
            for k, result in enumerate(results)
        ]


def _parts(value: Any) -> Any:
    return (value.value, value.tap) if isinstance(value, View) else value


def _bind(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an operation on arrays."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Parameters alone in JAX 0.10; older versions return a pair with functions in front.
    functions, params = bound if isinstance(bound, tuple) else ([], bound)
    # The context of tracing, such as the mesh that was set, holds for this operation as well.
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *values, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _type_of(array: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and, on Explicit axes, sharding."""
    sharding: Any = jax.typeof(array).sharding
    known = None if sharding.mesh.empty else sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=known)


# Rules: (interpreter, equation, values) -> results, or None where the rule does not apply -------


def _same_axes(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Casts, copies and constraints: the value changes, its axes do not."""
    if len(values) > 1:
        return None
    (view,) = values
    return [dataclasses.replace(view, value=_bind(equation, [view.value])[0])]


def _barrier(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """An optimization barrier of any number of arrays."""
    results = _bind(equation, [v.value if isinstance(v, View) else v for v in values])
    return [
        dataclasses.replace(value, value=result) if isinstance(value, View) else result
        for value, result in zip(values, results, strict=True)
    ]


def _transpose(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Transposes the axes, and the tap where batch axes change their order."""
    view: View = values[0]
    order = equation.params["permutation"]
    axes = tuple(view.axes[i] for i in order)
    # The new order of the batch axes among themselves: tap arrays are [*batch, ...].
    batch = _taps.positions(view.axes, "batch")
    moved = [batch.index(i) for i in order if i in batch]
    tap = view.tap
    if moved != sorted(moved):
        tap = jax.tree.map(
            lambda leaf: leaf.transpose([*moved, *range(len(moved), leaf.ndim)]), tap
        )
    (value,) = _bind(equation, [view.value])
    return [dataclasses.replace(view, value=value, axes=axes, tap=tap)]


def _reshape(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Reshapes that keep rows, columns and batch apart."""
    view = values[0]
    axes = _reshaped(view.axes, equation.outvars[0].aval.shape)
    if axes is None:
        return None
    (value,) = _bind(equation, [view.value])
    return [dataclasses.replace(view, value=value, axes=axes)]


def _reshaped(axes: tuple[Axis, ...], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Returns the axes after a reshape, or None if it mixes sides or touches a batch axis.

    For example, a kernel ``[d, heads * size]`` that becomes ``[d, heads, size]`` has two axes of
    the side columns, with the strides ``size`` and 1.
    """
    # Axes of length one come and go, unless they are batch axes, which the tap has too.
    left = [axis for axis in axes if axis.size != 1 or axis.side == "batch"]
    result: list[Axis] = []
    rest: Axis | None = None  # The remainder of an axis that is being split.
    for size in shape:
        # 1. A batch axis stays, and an axis of length one is new.
        if rest is None and left and left[0].side == "batch" and left[0].size == size:
            result.append(left.pop(0))
            continue
        if size == 1:
            result.append(Axis("one", 0, 1))
            continue
        if rest is None:
            if not left:
                return None
            rest = left.pop(0)
        # 2. Merge with the next axis, if the two are neighbours of one side in memory.
        while rest.size < size:
            if not left or rest.side == "batch":
                return None
            inner = left.pop(0)
            if inner.side != rest.side or rest.stride != inner.stride * inner.size:
                return None
            rest = Axis(inner.side, inner.stride, rest.size * inner.size)
        # 3. Split: the outer part is this axis and has the larger stride; the inner part is left
        #    for the next axes.
        if rest.side == "batch" or rest.size % size:
            return None
        inner_size = rest.size // size
        result.append(Axis(rest.side, rest.stride * inner_size, size))
        rest = None if inner_size == 1 else Axis(rest.side, rest.stride, inner_size)
    return tuple(result) if rest is None and not left else None


def _squeeze(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """Drops axes of length one; for a batch axis, this picks its only matrix."""
    (view,) = values
    dropped = set(equation.params["dimensions"])
    batch = _taps.positions(view.axes, "batch")
    # The same index into the batch axes of the tap.
    index = tuple(0 if i in dropped else slice(None) for i in batch)
    (value,) = _bind(equation, [view.value])
    return [
        dataclasses.replace(
            view,
            value=value,
            axes=tuple(axis for i, axis in enumerate(view.axes) if i not in dropped),
            tap=jax.tree.map(lambda leaf: leaf[index], view.tap),
        )
    ]


def _slice(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Slices of layers."""
    (view,) = values
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    parts = [slice(*bounds) for bounds in zip(starts, limits, strides, strict=True)]
    (value,) = _bind(equation, [view.value])
    return _of_layers(view, value, lambda batch: lambda leaf: leaf[tuple(parts[i] for i in batch)])


def _dynamic_slice(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """Slices of layers at traced positions."""
    view, *starts = values
    if not isinstance(view, View):
        return None
    sizes = equation.params["slice_sizes"]
    (value,) = _bind(equation, [view.value, *starts])

    def take(batch: list[int]) -> Callable[[jax.Array], jax.Array]:
        def one(leaf: jax.Array) -> jax.Array:
            rest = leaf.shape[len(batch) :]
            at = [*(starts[i] for i in batch), *(0 for _ in rest)]
            return jax.lax.dynamic_slice(leaf, at, [*(sizes[i] for i in batch), *rest])

        return one

    return _of_layers(view, value, take)


def _of_layers(view: View, value: jax.Array, take: Any) -> list[Any] | None:
    """Returns the view of a slice of layers, with the same slice of its tap.

    None if it cuts rows or columns: the tap projects whole matrices.
    """
    if any(
        axis.side != "batch" and axis.size != size
        for axis, size in zip(view.axes, value.shape, strict=True)
    ):
        return None
    axes = tuple(
        axis._replace(size=size) for axis, size in zip(view.axes, value.shape, strict=True)
    )
    tap = jax.tree.map(take(_taps.positions(view.axes, "batch")), view.tap)
    return [dataclasses.replace(view, value=value, axes=axes, tap=tap)]


def _product(run: Interpreter, equation: Any, values: list[Any]) -> list[Any] | None:
    """A dense product of one weight with an activation."""
    # G itself is needed for new bases and for residuals; a product of two weights has no tokens.
    if run.whole or run.residual or all(isinstance(value, View) for value in values):
        return None
    # 1. Which operand is the weight, and which of its axes are contracted or shared.
    of_weight = int(isinstance(values[1], View))
    view, x = values[of_weight], values[1 - of_weight]
    contracting, batch = equation.params["dimension_numbers"]
    contracted, shared = contracting[of_weight], batch[of_weight]
    # 2. The product must be y = x W for each matrix W. Every batch axis of the view must be a batch
    #    axis of the product, and no other axis may be one; exactly one side is contracted, whole.
    if sorted(shared) != _taps.positions(view.axes, "batch"):
        return None
    sides = {view.axes[i].side for i in contracted if view.axes[i].side != "one"}
    free = [i for i in range(len(view.axes)) if i not in contracted and i not in shared]
    if len(sides) != 1 or sides & {view.axes[i].side for i in free}:
        return None
    # 3. The same product with a tap.
    run.met.add(Met(view.leaf, run.place, ""))
    options = {k: v for k, v in equation.params.items() if k != "dimension_numbers"}
    form = _taps.Product(
        site=Site(view.axes, _type_of(view.tap.low)),
        side=sides.pop(),
        of_weight=of_weight,
        dimension_numbers=equation.params["dimension_numbers"],
        options=tuple(options.items()),
    )
    with equation.ctx.manager:
        tapped: Any = _taps.product(form, x, view.value, view.tap, run.slots.get(view.group))
    y, slots = tapped
    run.keep(view.group, slots)
    return [y]


def _call(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """A jitted function: its operations run as if they stood here."""
    closed = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
    return run.run(closed.jaxpr, closed.consts, values)


def _checkpoint(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """A block that is recomputed in the backward pass (`jax.checkpoint`)."""
    params = equation.params
    within = _Within(run, params["jaxpr"], [], values)
    again = jax.checkpoint(within, policy=params["policy"], prevent_cse=params["prevent_cse"])
    run.slots, results = again(run.slots, within.arrays)
    return within.with_returned(results)


def _cond(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """A branch on a value. A weight among the results is tapped in each branch."""
    index, *operands = values
    # The branches may return different weights in one place, so no view can describe the result.
    branches = [
        _Within(run, branch.jaxpr, branch.consts, operands)
        for branch in equation.params["branches"]
    ]
    run.slots, results = jax.lax.switch(
        run.tapped(index, "cond"),
        [branch.with_arrays for branch in branches],
        run.slots,
        branches[0].arrays,
    )
    return results


def _scan(run: Interpreter, equation: Any, values: list[Any]) -> list[Any]:
    """A loop: over the layers of a stacked weight, or with the same weights in every turn."""
    # 1. Operands: constants of all turns, the carry, and arrays of one entry for each turn.
    params = equation.params
    n_consts, n_carry = scan_counts(params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = values[n_consts + n_carry :]
    body = params["jaxpr"]
    # 2. Weights stay views as constants and as stacks of layers. Others are tapped outside: a carry
    #    may be another array after the first turn, and a slice of rows is no matrix.
    carry = [run.tapped(value, "carry of a loop") for value in carry]
    consts = [run.enter(value) for value in consts]
    xs = [
        x if not isinstance(x, View) or x.axes[0].side == "batch" else run.tapped(x, "loop")
        for x in xs
    ]

    # 3. The slots are carried along, so that every layer adds its drawn matrices to them.
    def turn(state: Any, sliced: Any) -> Any:
        slots, carry = state
        inner = run.inside(slots)
        # One layer of each stacked weight.
        layers = [
            inner.enter(View(parts[0], x.axes[1:], parts[1], x.leaf, x.group))
            if isinstance(x, View)
            else parts
            for x, parts in zip(xs, sliced, strict=True)
        ]
        results = inner.run(body.jaxpr, body.consts, [*consts, *carry, *layers])
        results = [inner.tapped(result, "result of a loop") for result in results]
        return (inner.slots, results[:n_carry]), results[n_carry:]

    (run.slots, carry), ys = jax.lax.scan(
        turn,
        (run.slots, carry),
        [_parts(x) for x in xs],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


_Rule = Callable[[Interpreter, Any, list[Any]], "list[Any] | None"]
# Operations that leave the axes of a weight unchanged.
_UNCHANGING = (
    *("convert_element_type", "reduce_precision", "copy", "copy_p"),
    *("sharding_constraint", "mesh_cast", "reshard", "layout_constraint"),
)
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_UNCHANGING, _same_axes),
    **dict.fromkeys(("reshape", "broadcast_in_dim"), _reshape),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "optimization_barrier": _barrier,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dot_general": _product,
    "cond": _cond,
    "scan": _scan,
}

"""Rules of primitives that compute entry by entry, move axes, or run other jaxprs.

`_usage` defines the terms (view, use, trail, role), `_products` has the rules of products and
lookups. A rule receives the walk, the equation and the values of its operands, and returns the
values of its results.

Tests: tests/library/test_infer.py.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gum_optax._products import convolution, dot, gather, ragged_dot
from gum_optax._usage import (
    NONE,
    Axes,
    Rule,
    Value,
    Walk,
    is_integer,
    joined,
    mixed,
    roles_of_all,
    scan_counts,
    shape_of,
)

# Rules of elementwise primitives -----------------------------------------------------------------


def _elementwise(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Weights alone stay weights, as in ``W / norm(W)``; with activations the view ends."""
    shape = shape_of(equation.outvars[0])
    # Scalars scale a weight or an activation and show no axis of a leaf.
    arrays = [i for i, atom in enumerate(equation.invars) if shape_of(atom)]
    views = []
    for i in arrays:
        others = [values[j] for j in arrays if j != i]
        for view in values[i].views:
            # 1. A view that is broadcast over axes of no leaf is a bias or a scale. Results of
            #    lookups and of products of weights may lack axes without being broadcast.
            whole = all(axes or size == 1 for axes, size in zip(view.axes, shape, strict=True))
            derived = any(role in ("gathered", "inner") for _, role in view.roles)
            # 2. Trails go through every elementwise operation, weights only through operations on
            #    weights alone.
            if view.use is not None or not others:
                views.append(view)
            elif any(other.data for other in others) or not (whole or derived):
                walk.record(view, roles_of_all(view, "elementwise"))
            else:
                views.append(view)
    return [mixed(values).showing(views)] * len(equation.outvars)


def _comparison(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """The result shows no leaf any more; a comparison of integers makes one-hot vectors."""
    walk.forget(equation.primitive.name, values)
    # Of floats it makes masks, which select entries and look nothing up.
    integers = all(map(is_integer, equation.invars))
    return [dataclasses.replace(mixed(values), indicator=integers)]


def _each_alone(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Each result shows the same leaves as its operand: ``optimization_barrier``, ``psum``."""
    return values


def _random(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Noise is no data: dropout of weights leaves them weights."""
    return [Value()] * len(equation.outvars)


# Rules of primitives that rearrange one array ----------------------------------------------------


def _rearranging(rearrange: Callable[[Any, Axes], Iterable[frozenset[int]]]) -> Rule:
    """Makes the rule of a primitive from a function of the axes of its first operand."""

    def rule(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
        first = values[0]
        views = [view.moved(rearrange(equation, view.axes)) for view in first.views]
        kind = dataclasses.replace(mixed(values), indicator=first.indicator)
        return [kind.showing(views)] * len(equation.outvars)

    return rule


def _same(equation: Any, axes: Axes) -> Axes:
    return axes


def _transpose(equation: Any, axes: Axes) -> Axes:
    return tuple(axes[i] for i in equation.params["permutation"])


def _squeeze(equation: Any, axes: Axes) -> Axes:
    return _without(axes, equation.params["dimensions"])


def _broadcast(equation: Any, axes: Axes) -> Axes:
    source, target = shape_of(equation.invars[0]), equation.params["shape"]
    result = [NONE] * len(target)
    for i, j in enumerate(equation.params["broadcast_dimensions"]):
        # An axis of length one that is repeated is no longer the leaf's.
        result[j] = axes[i] if source[i] == target[j] else NONE
    return tuple(result)


def _reshape(equation: Any, axes: Axes) -> Axes:
    """Cuts both shapes into the shortest runs of axes with equal products of sizes.

    ``[4096, 8, 128] -> [4096, 1024]`` has the runs 4096 and 8 x 128. The axes of the target in a
    run are made of the axes of the source in the same run.
    """
    source, target = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    result: list[frozenset[int]] = []
    i = 0
    while len(result) < len(target):
        # 1. One more axis of the target, and axes of the source until the sizes are equal.
        size_in, size_out = 1, target[len(result)]
        run, length = [], 1
        while size_in != size_out:
            if size_in < size_out and i < len(source):
                size_in *= source[i]
                run.append(axes[i])
                i += 1
            elif len(result) + length < len(target):
                size_out *= target[len(result) + length]
                length += 1
            else:  # An axis of length zero: no products can be equal.
                return tuple([NONE] * len(target))
        # 2. Every axis of the run is made of all its leaf axes. Of several axes, one of length one
        #    is new and made of none.
        made_of = frozenset().union(*run)
        result += [
            made_of if size > 1 or length == 1 else NONE
            for size in target[len(result) : len(result) + length]
        ]
    return tuple(result)


def _tile(equation: Any, axes: Axes) -> Axes:
    # An axis that is repeated is no longer the leaf's.
    repeats = equation.params["reps"]
    return tuple(NONE if n > 1 else axis for axis, n in zip(axes, repeats, strict=True))


def _all_gather(equation: Any, axes: Axes) -> Axes:
    if equation.params["tiled"]:
        return axes
    position = equation.params["all_gather_dimension"]
    return (*axes[:position], NONE, *axes[position:])


def _reduction(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Reductions keep trails of products; views of weights end, as in norms of weights."""
    trails = [
        view.moved(_without(view.axes, equation.params["axes"]))
        for view in values[0].views
        if view.use is not None
    ]
    return [mixed(values).showing(trails)] * len(equation.outvars)


def _without(axes: Sequence[Any], left_out: Sequence[int]) -> tuple[Any, ...]:
    return tuple(x for i, x in enumerate(axes) if i not in left_out)


# Rules of slices and indices ---------------------------------------------------------------------


def _slice(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Slices keep all axes; an axis that a slice reduces to length one is left for a squeeze."""
    shape = shape_of(equation.invars[0])
    # A product that is cut into single entries along an axis is unpacked: q, k, v = x @ W.
    for view in values[0].views:
        if view.use is None:
            continue
        for axis, size in enumerate(shape):
            whole = walk.is_whole(view, axis, size)
            if whole is not None and all(shape_of(v)[axis] == 1 for v in equation.outvars):
                walk.uses[view.use].unpacked.add(whole)
    return _rearranging(_same)(walk, equation, values)


def _unstack(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Takes an axis apart, which unpacks a product along it."""
    axis = equation.params["axis"]
    for view in values[0].views:
        whole = walk.is_whole(view, axis, shape_of(equation.invars[0])[axis])
        if view.use is not None and whole is not None:
            walk.uses[view.use].unpacked.add(whole)
    return _rearranging(lambda _, axes: _without(axes, [axis]))(walk, equation, values)


def _concatenate(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Weights beside weights are fused kernels; weights beside activations are learned tokens."""
    return _beside(walk, values)


def _stack(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """A concatenation along a new axis, which is no leaf's."""
    axis = equation.params["axis"]
    deeper = [
        value.showing(
            view.moved([*view.axes[:axis], NONE, *view.axes[axis:]]) for view in value.views
        )
        for value in values
    ]
    return _beside(walk, deeper)


def _update_slice(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    # The array and the update; positions, the other operands, show no leaf.
    return _beside(walk, values[:2])


def _beside(walk: Walk, values: Sequence[Value]) -> list[Value]:
    """The rule of arrays that are joined: a weight that is joined to activations is a vector."""
    views = []
    for value in values:
        for view in value.views:
            if view.use is None and any(other.data for other in values):
                walk.record(view, roles_of_all(view, "elementwise"))
            else:
                views.append(view)
    return [mixed(values).showing(views)]


# Rules of control flow ---------------------------------------------------------------------------


def _scan(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """Scanned arrays lose their first axis in the body, and results gain one."""
    consts, carry = scan_counts(equation.params)
    # The axis over layers is no axis of the body's arrays, so it will be a batch axis of the leaf.
    slices = [
        value.showing(view.moved(view.axes[1:]) for view in value.views)
        for value in values[consts + carry :]
    ]

    def body(carried: Sequence[Value]) -> list[Value]:
        return walk.run(equation.params["jaxpr"], [*values[:consts], *carried, *slices])

    carried, results = _until_stable(body, values[consts : consts + carry])
    stacked = [
        value.showing(view.moved([NONE, *view.axes]) for view in value.views)
        for value in results[carry:]
    ]
    return [*carried, *stacked]


def _while(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    # Operands: constants of the condition, constants of the body, carried values. The condition
    # itself returns one boolean and shows no matrix.
    tests, consts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    constants, carried = values[tests : tests + consts], values[tests + consts :]

    def body(carried: Sequence[Value]) -> list[Value]:
        return walk.run(equation.params["body_jaxpr"], [*constants, *carried])

    return _until_stable(body, carried)[0]


def _until_stable(
    body: Callable[[Sequence[Value]], list[Value]], carried: Sequence[Value]
) -> tuple[list[Value], list[Value]]:
    """Runs a loop's body until its carried values no longer change.

    Views and kinds of values only grow and there are finitely many, so this ends.
    """
    carried = list(carried)
    while True:
        results = body(carried)
        grown = [joined(a, b) for a, b in zip(carried, results, strict=False)]
        if [_content(value) for value in grown] == [_content(value) for value in carried]:
            return grown, results
        carried = grown


def _content(value: Value) -> Any:
    # As sets: the order of views depends on the turn.
    return set(value.views), value.data, value.weights


def _cond(walk: Walk, equation: Any, values: list[Value]) -> list[Value]:
    """A result may come from any branch, and depends on the choice as well."""
    chosen, *operands = values
    results = [walk.run(branch, operands) for branch in equation.params["branches"]]
    of_index = Value(data=chosen.data, weights=chosen.weights)
    return [
        joined(of_index, *branches).showing(view for value in branches for view in value.views)
        for branches in zip(*results, strict=True)
    ]


# One rule for each primitive ---------------------------------------------------------------------

_COMPARISONS = "eq ne lt le gt ge eq_to lt_to le_to is_finite"

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    complex conj cos cosh device_put digamma div erf erf_inv erfc exp exp2 expm1 floor
    imag integer_pow lgamma log log1p logistic max min mul name neg nextafter not or pow
    real rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""

_REDUCTIONS = """
    reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin
"""

_ONE_TO_ONE = """
    copy copy_p optimization_barrier pvary pcast psum psum2 psum_invariant pmax pmin ppermute
    stop_gradient
"""

_SAME_AXES = """
    bitcast_convert_type convert_element_type cumsum cummax cummin cumprod cumlogsumexp
    mesh_cast pad reduce_precision reshard rev sharding_constraint reduce_scatter
"""

_RANDOM = """
    random_bits random_seed random_wrap random_unwrap random_split random_fold_in random_clone
    random_gamma threefry2x32 rng_bit_generator rng_uniform iota
"""


def _table() -> dict[str, Rule]:
    lists: list[tuple[str, Rule]] = [
        (_COMPARISONS, _comparison),
        (_ELEMENTWISE, _elementwise),
        (_REDUCTIONS, _reduction),
        (_ONE_TO_ONE, _each_alone),
        (_SAME_AXES, _rearranging(_same)),
        (_RANDOM, _random),
        ("slice dynamic_slice split", _slice),
        ("transpose", _rearranging(_transpose)),
        ("squeeze", _rearranging(_squeeze)),
        ("broadcast_in_dim", _rearranging(_broadcast)),
        ("reshape", _rearranging(_reshape)),
        ("all_gather all_gather_invariant all_gather_reduced", _rearranging(_all_gather)),
        ("tile", _rearranging(_tile)),
        ("stack", _stack),
        ("unstack", _unstack),
        ("gather", gather),
        ("concatenate", _concatenate),
        ("dynamic_update_slice", _update_slice),
        ("dot_general", dot),
        ("ragged_dot_general", ragged_dot),
        ("conv_general_dilated", convolution),
        ("scan", _scan),
        ("while", _while),
        ("cond", _cond),
    ]
    return {name: rule for names, rule in lists for name in names.split()}


RULES = _table()
"""Primitive -> rule."""

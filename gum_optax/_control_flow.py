"""Rules of operations that hold a program: calls, recomputed blocks, branches and loops.

Each program is run by an interpreter of its own, which carries its own slots.

Tests: tests/library/test_interception.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from gum_optax._interpreter import Interpreter, Rule, View
from gum_optax._usage import scan_counts


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
            inner.enter(dataclasses.replace(x, value=parts[0], axes=x.axes[1:], tap=parts[1]))
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


RULES: dict[str, Rule] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "cond": _cond,
    "scan": _scan,
}

"""The interpreter that runs a jaxpr in which weights are views.

It knows no operation itself. If a view is among the operands, the rule of the primitive computes
the results. If no rule applies, the operation gets the array of the weight, tapped.

Tests: tests/library/test_interception.py.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core

from gum_optax import _taps
from gum_optax._taps import Axis, Site, Tap
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
      unpack: `Site`.unpack.
    """

    value: jax.Array
    axes: tuple[Axis, ...]
    tap: Tap
    leaf: int
    group: Any
    unpack: Callable[[Any, tuple[int, ...]], jax.Array] | None = None


class Met(NamedTuple):
    """A place where a weight is used.

    Attributes:
      leaf: the position of the weight among the leaves of the parameters.
      place: the identities of the operation and of all calls and loops around it.
      why: the operation that needs the weight's value; empty for a dense product.
    """

    leaf: int
    place: tuple[int, ...]
    why: str


@dataclasses.dataclass
class Interpreter:
    """Runs a jaxpr in which weights are views.

    Attributes:
      rules: name of a primitive -> its rule.
      slots: by group, ``[slots, m, n]``; each tap takes them and passes them on.
      whole: whether a weight is tapped where it enters a loop, so that one G serves all its uses.
      projector: maps the key of a group to `Site`.projector.
      residual: passed on to every `Site`.
      met: the uses of weights so far.
      place: the operation at which the program is, as in `Met`.
    """

    rules: "Mapping[str, Rule]"
    slots: dict[Any, jax.Array] = dataclasses.field(default_factory=dict)
    whole: bool = False
    projector: Callable[[Any], Projector | None] = lambda group: None
    residual: bool = False
    met: set[Met] = dataclasses.field(default_factory=set)
    place: tuple[int, ...] = ()

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
        low = type_of(value.tap.low)
        site = Site(value.axes, low, value.unpack, projector, self.residual)
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

        # A function that is called twice has the same equations in both calls.
        around = self.place
        for equation in jaxpr.eqns:
            self.place = (*around, id(equation))
            values = [read(variable) for variable in equation.invars]
            if any(isinstance(value, View) for value in values):
                rule = self.rules.get(equation.primitive.name)
                results = rule(self, equation, values) if rule else None
                if results is None:  # No rule, or one that does not apply.
                    name = equation.primitive.name
                    results = bind(equation, [self.tapped(value, name) for value in values])
            else:
                results = bind(equation, values)
            known.update(zip(equation.outvars, results, strict=True))
        self.place = around
        return [read(variable) for variable in jaxpr.outvars]


Rule: TypeAlias = Callable[[Interpreter, Any, list[Any]], "list[Any] | None"]
"""``(interpreter, equation, values) -> results``, or None if the rule does not apply."""


def bind(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Runs an operation on arrays."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Parameters alone in JAX 0.10; older versions return a pair with functions in front.
    functions, params = bound if isinstance(bound, tuple) else ([], bound)
    # The context of tracing, such as the mesh that was set, holds for this operation as well.
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *values, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def type_of(array: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and, on Explicit axes, sharding."""
    sharding: Any = jax.typeof(array).sharding
    known = None if sharding.mesh.empty else sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=known)

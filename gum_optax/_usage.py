"""The uses of parameters in a function: each axis of each leaf, followed through a jaxpr.

Terms of this module:

- a *view* describes a variable of the jaxpr that shows a leaf: the leaf itself, or a cast,
  transposed, reshaped or sliced one. For each of its axes it has the axes of the leaf that make it;
- a *use* is a point where a view meets other values. It gives each axis of the leaf a *role*;
- a *trail* is a view of a product. It marks the axes that came from the leaf, so that later
  operations on them, such as splitting, are noticed.

The roles of an axis in a use are

- ``contracted``: summed over in a product with activations, the input side of a matrix;
- ``free``: kept by the product, the output side;
- ``inner``: summed over in a product with other parameters, as r in ``W + A B``;
- ``gathered``: looked up by an array of indices, or by one-hot vectors;
- ``elementwise``: added to activations, or multiplied with them;
- none: an index or a scan removed the axis before the use, so it is a batch axis.

Each primitive has one small rule (`_primitives`, `_products`) from the values of its operands to
the values of its results. A primitive without a rule loses the views of its operands, and this is
noted.

Tests: tests/library/test_infer.py.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Roles: TypeAlias = frozenset[tuple[int, str]]
"""Pairs (axis of a leaf, role)."""

Axes: TypeAlias = tuple[frozenset[int], ...]
"""For each axis of a variable, the axes of a leaf that it is made of."""

NONE: frozenset[int] = frozenset()
"""An axis that is no leaf's."""


@dataclasses.dataclass(frozen=True)
class View:
    """One leaf in a variable.

    Attributes:
      leaf: the position of the leaf.
      axes: for each axis of the variable, the leaf's axes that make it.
      roles: roles of axes that the variable no longer has.
      use: None for a view of a weight; for a trail the position of the use that began it.
    """

    leaf: int
    axes: Axes
    roles: Roles = frozenset()
    use: int | None = None

    def moved(self, axes: Iterable[frozenset[int]]) -> "View":
        """Returns the view of the same leaf in a variable with other axes."""
        return dataclasses.replace(self, axes=tuple(axes))


@dataclasses.dataclass(frozen=True)
class Value:
    """Everything that is known about a variable.

    Attributes:
      views: the leaves that it shows.
      data: whether it depends on arguments other than the parameters.
      weights: whether it depends on parameters. Inputs do not, activations depend on both.
      indicator: whether it holds the results of comparisons, as one-hot vectors do.
    """

    views: tuple[View, ...] = ()
    data: bool = False
    weights: bool = False
    indicator: bool = False

    def showing(self, views: Iterable[View]) -> "Value":
        """Returns the same kind of value with other views, each of them once."""
        return dataclasses.replace(self, views=tuple(dict.fromkeys(views)))


@dataclasses.dataclass
class Use:
    """One way in which a leaf meets other values.

    Attributes:
      leaf: the position of the leaf.
      roles: pairs (axis of the leaf, role).
      note: a kind of product that is no matrix, such as a depthwise convolution; "" otherwise.
      unpacked: free axes along which the product is split, as in ``q, k, v = x @ W``.
      followed: whether other parameters contract the product later, so that it is no output.
    """

    leaf: int
    roles: Roles
    note: str = ""
    unpacked: set[int] = dataclasses.field(default_factory=set)
    followed: bool = False


class Walk:
    """Walks through a jaxpr and collects the uses of all leaves.

    Attributes:
      shapes: the shape of each leaf.
      uses: all uses; equal ones (same leaf, roles and note) are stored once.
      lost: leaf -> primitives without a rule that it met.
      vocabularies: sizes of axes that are looked up by the data.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rules: Mapping[str, "Rule"]):
        """Starts without uses, for leaves of the given shapes and a rule for each primitive."""
        self.shapes = shapes
        self._rules = rules
        self.uses: list[Use] = []
        self.lost: dict[int, set[str]] = {}
        self.vocabularies: set[int] = set()
        self._positions: dict[tuple[int, Roles, str], int] = {}

    def run(self, jaxpr: Jaxpr | ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        """Walks through one jaxpr, and returns the values of its results."""
        known: dict[Any, Value] = {}
        if isinstance(jaxpr, ClosedJaxpr):
            # Constants that the function captured: integer arrays are usually token ids, so they
            # count as data; floats may be masks of weights, so they do not.
            known |= {
                variable: Value(data=bool(variable.aval.shape) and is_integer(variable))
                for variable in jaxpr.jaxpr.constvars
            }
            jaxpr = jaxpr.jaxpr
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        # Literals and other constants depend on nothing.
        def read(atom: Any) -> Value:
            return Value() if isinstance(atom, Literal) else known.get(atom, Value())

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            known |= dict(zip(equation.outvars, self._step(equation, values), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def record(self, view: View, roles: Iterable[tuple[int, str]], note: str = "") -> int:
        """Notes a use of a view, and returns its position among all uses."""
        # Loops run their body several times, and layers repeat: equal uses are stored once.
        use = Use(view.leaf, view.roles | frozenset(roles), note)
        key = use.leaf, use.roles, note
        if key not in self._positions:
            self._positions[key] = len(self.uses)
            self.uses.append(use)
        return self._positions[key]

    def forget(self, name: str, values: Iterable[Value]) -> None:
        """Notes that a primitive loses the weights among its operands."""
        for value in values:
            for view in value.views:
                # The end of a trail loses nothing: its use is recorded already.
                if view.use is None:
                    self.lost.setdefault(view.leaf, set()).add(name)

    def is_whole(self, view: View, axis: int, size: int) -> int | None:
        """Returns the leaf's axis that equals an axis of a variable, or None.

        None if the axis is merged from several, is a part of one, or has length one.
        """
        if len(view.axes[axis]) != 1:
            return None
        [of_leaf] = view.axes[axis]
        return of_leaf if size == self.shapes[view.leaf][of_leaf] > 1 else None

    def _step(self, equation: Any, values: list[Value]) -> list[Value]:
        """Returns the values of an equation's results: by a rule, by its body, or as lost."""
        # 1. A primitive with a rule.
        name = equation.primitive.name
        rule = self._rules.get(name)
        if rule is not None:
            return rule(self, equation, values)
        # 2. A call of another jaxpr, which is walked through as if it stood here.
        body = _only_body(equation)
        if body is not None:
            return self.run(body, values)
        # 3. Any other primitive: its results still depend on its operands, but show no leaf.
        self.forget(name, values)
        return [mixed(values)] * len(equation.outvars)


Rule: TypeAlias = Callable[[Walk, Any, list[Value]], list[Value]]
"""``(walk, equation, values of the operands) -> values of the results``."""


# Kinds of values ---------------------------------------------------------------------------------


def mixed(values: Sequence[Value]) -> Value:
    """Returns a value that depends on everything that the others depend on, without views."""
    return Value(data=any(v.data for v in values), weights=any(v.weights for v in values))


def joined(*values: Value) -> Value:
    """Returns a value that may be any of several of equal shape, as the results of branches."""
    return mixed(values).showing(view for value in values for view in value.views)


def is_integer(variable: Any) -> bool:
    """Returns whether a variable holds integers."""
    return jnp.issubdtype(variable.aval.dtype, jnp.integer)


def shape_of(atom: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or a literal."""
    return tuple(atom.aval.shape)


def _only_body(equation: Any) -> Any:
    """Returns the jaxpr that a primitive calls, such as ``jit`` or ``shard_map``, or None.

    It must be the only one, and its operands and results must match the primitive's.
    """
    # A Pallas kernel works on references to blocks of its operands.
    if equation.primitive.name == "pallas_call":
        return None
    bodies = [v for v in equation.params.values() if isinstance(v, Jaxpr | ClosedJaxpr)]
    if len(bodies) != 1:
        return None
    [body] = bodies
    inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    # Shapes may differ, as under `shard_map`; numbers of axes do not.
    outer = [*equation.invars, *equation.outvars]
    within = [*inner.invars, *inner.outvars]
    fits = len(outer) == len(within) and len(equation.invars) == len(inner.invars)
    fits = fits and all(
        len(shape_of(a)) == len(shape_of(b)) for a, b in zip(outer, within, strict=True)
    )
    return body if fits else None


def roles_of_all(view: View, role: str) -> list[tuple[int, str]]:
    """Gives one role to all axes that a view still has."""
    return [(axis, role) for axes in view.axes for axis in axes]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of a scan's operands that are constant and that are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.11 and later.
    return len(list(consts)), len(list(carry))

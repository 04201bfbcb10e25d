"""Interception of the weights of an unmodified model.

A loss is traced to a jaxpr, JAX's program of primitive operations, and an interpreter runs the
jaxpr operation by operation. A weight runs through it as a `View`: its value, and the place of each
of its axes in the matrices of its leaf.

1. Casts, transposes, reshapes and slices of layers return another view (`_axis_rules`).
2. A dense product becomes `_taps.product`, whose backward pass projects without G.
3. Loops, branches and recomputed blocks are entered by an interpreter of their own
   (`_control_flow`).
4. Any other operation gets the value of the weight, tapped by `_taps.weight`.

Tests: tests/library/test_interception.py.
"""

from typing import Any

from gum_optax import _axis_rules, _control_flow
from gum_optax._interpreter import Interpreter


def interpreter(**options: Any) -> Interpreter:
    """Returns an interpreter with all rules and no slots; ``options`` are further attributes."""
    return Interpreter({**_axis_rules.RULES, **_control_flow.RULES}, **options)

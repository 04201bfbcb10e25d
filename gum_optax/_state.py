"""The engine's state: its layout and its dtypes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax._typing import PyTree

STATE_LAYOUT = 2
"""Version of the layout of `LowRankState`; a checkpoint of another one does not restore.

1. Matrices of several batch axes had one leading axis in the state.
2. The leading axes of the state are the batch axes of the leaves.
"""


class LowRankState(NamedTuple):
    """State of `low_rank`: plain arrays in dicts keyed by stack name.

    Attributes:
      count: ``int32[]``, steps taken.
      key: ``uint32[2]``, threefry key data; the draws are a function of it and of ``count`` alone.
      basis: stack -> ``[*lead, m, r]``, float32 (float64 for float64 parameters). The leading axes
        are N separate matrices, or the batch axes of one leaf, or leaves and their batch axes.
      slots: stack -> ``int32[slots]``, the matrix that each dense slot serves; N is an empty slot.
      inner: the base's state over stack -> ``Compressed(low=[*lead, r, n], full=[slots, m, n])``.
      dense: the base's state over the leaves of dense stacks, or None if there are none.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    basis: dict[str, jax.Array]
    slots: dict[str, jax.Array]
    inner: Any
    dense: Any


def keep_dtypes(new: PyTree, old: PyTree) -> PyTree:
    """Rounds a tree to another's dtypes: a state does not drift, and its buffers can be donated."""
    return jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, old)


def check_fits(expected: LowRankState, state: LowRankState) -> None:
    """Raises if a state was made for other parameters or another configuration.

    Args:
      expected: what ``init`` would give for the updates at hand, as shapes.
      state: the state that ``update`` was given.
    """
    wanted, got = _shapes(expected), _shapes(state)
    paths = [path for path in [*wanted, *got] if wanted.get(path) != got.get(path)]
    if (state.dense is None) != (expected.dense is None):
        paths.append(".dense")  # Without leaves, if the base keeps no state.
    if not paths:
        return
    path = paths[0]
    raise ValueError(
        "The updates do not fit the optimizer state, which `init` made for other parameters or "
        f"settings: `state{path}` should have shape {wanted.get(path, 'none (absent)')} and has "
        f"{got.get(path, 'none (absent)')}."
    )


def _shapes(state: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def _placeholder_type() -> type:
    seen: list[Any] = []

    def init(params: Any) -> Any:
        seen.append(params)
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return type(seen[0])


_PLACEHOLDER = _placeholder_type()


def is_placeholder(params: PyTree) -> bool:
    """Whether ``params`` is the stand-in of ``optax.tree.map_params`` (no empty tree is)."""
    return isinstance(params, _PLACEHOLDER)


def placeholder_state() -> LowRankState:
    """A prefix of every state, without a copy of the parameters: ``map_params`` changes nothing."""
    leaf: Any = jnp.zeros(())
    return LowRankState(leaf, leaf, leaf, leaf, leaf, leaf)

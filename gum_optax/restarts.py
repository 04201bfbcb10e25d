"""What becomes of the base's state at a refresh, when bases and draws change.

A restart is a function ``(fresh, old, previous_basis, basis) -> state``: the base's state as
``init`` makes it, its state before the refresh, and the bases ``[*lead, m, r]`` by stack before and
after. States of dense slots (`Compressed.full`) must come from ``fresh``, since they serve other
matrices from now on. Any function of that signature plugs into ``low_rank(restart=...)``; True
stands for `everything`, False for `slots`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gum_optax import _products
from gum_optax._codec import Compressed
from gum_optax._typing import PyTree

Bases = dict[str, jax.Array]
Restart = Callable[[PyTree, PyTree, Bases, Bases], PyTree]


def everything(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    """All of the base's state starts anew: the paper's choice, and the default.

    Args:
      fresh: the state as ``init`` makes it.
      old: unused.
      previous_basis: unused.
      basis: unused.

    Returns:
      ``fresh``.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, restart=gum_optax.restarts.everything)  # the default

    References:
      Pan et al., arXiv 2510.17802.
    """
    del old, previous_basis, basis
    return fresh


def slots(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    """Dense slots start anew, low-rank states go on in the new basis unrotated, as in GaLore.

    A step count that the base shares between matrices, such as Adam's, goes on too.

    Args:
      fresh: the state as ``init`` makes it.
      old: the state before the refresh.
      previous_basis: unused.
      basis: unused.

    Returns:
      ``old``, with the ``full`` of ``fresh`` in every `Compressed`.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, restart=gum_optax.restarts.slots)

    References:
      Zhao et al., GaLore, arXiv 2403.03507.
    """
    del previous_basis, basis
    return _low_rank_states(lambda name, low: low, fresh, old)


def rotate(fresh: PyTree, old: PyTree, previous_basis: Bases, basis: Bases) -> PyTree:
    r"""Dense slots start anew, low-rank momentum is carried into the new basis.

    .. math:: R \leftarrow P_\text{new}^\top P_\text{old} R

    What the old basis holds outside of the new one is lost. That is right for momentum, which is
    linear in the gradients. It takes ``r^2 (m + n)`` multiplications per matrix, at every step: the
    engine chooses between old and restarted states entry by entry.

    Args:
      fresh: the state as ``init`` makes it.
      old: the state before the refresh.
      previous_basis: by stack, ``[*lead, m, r]``; zero before the first refresh.
      basis: by stack, ``[*lead, m, r]``.

    Returns:
      The state, in the dtypes of ``old``.

    Raises:
      ValueError: if the base keeps a second moment (``nu``): squares do not rotate.

    Example:
      >>> import gum_optax
      >>> tx = gum_optax.gum(1e-2, restart=gum_optax.restarts.rotate)

    References:
      Robert et al., LDAdam, arXiv 2410.16103, for the first moment.
    """

    def carried(name: str, low: jax.Array) -> jax.Array:
        rotation = _products.exact(basis[name].mT, previous_basis[name])
        return jnp.matmul(rotation, low.astype(rotation.dtype)).astype(low.dtype)

    _refuse_second_moments(old)
    return _low_rank_states(carried, fresh, old)


def resolve(restart: Any) -> Restart:
    """The function that ``restart`` stands for."""
    if callable(restart):
        return restart
    if not isinstance(restart, bool):
        raise TypeError(
            "`restart` must be True, False or a function (fresh, old, previous_basis, basis) -> "
            f"state, got {restart!r} of type {type(restart).__name__}."
        )
    return everything if restart else slots


def _low_rank_states(
    carried: Callable[[str, jax.Array], jax.Array], fresh: PyTree, old: PyTree
) -> PyTree:
    """``old``, with low-rank states changed by stack name, and dense slots of ``fresh``."""

    def merge(path: Any, new: Any, kept: Any) -> Any:
        if not isinstance(kept, Compressed):
            return kept
        return Compressed(carried(path[-1].key, kept.low), new.full)

    return jax.tree_util.tree_map_with_path(merge, fresh, old, is_leaf=_is_compressed)


def _refuse_second_moments(state: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_compressed)[0]:
        if _is_compressed(leaf) and any(getattr(key, "name", None) == "nu" for key in path):
            raise ValueError(
                "`restart=restarts.rotate` cannot carry the second moment "
                f"`{jax.tree_util.keystr(path)}` of the base into another basis; use True or False."
            )


def _is_compressed(node: Any) -> bool:
    return isinstance(node, Compressed)

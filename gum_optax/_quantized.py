"""`quantized`: keeps the state of any optax transformation in few bits between two steps.

Tests: tests/library/test_quantized.py.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _ledger, _packing, storages
from gum_optax._low_rank import keep_dtypes
from gum_optax._paths import PyTree, is_stand_in
from gum_optax._rounding import RoundingState

_BASIS = storages.field("basis")


def quantized(
    inner: optax.GradientTransformation,
    storage: storages.Storage = storages.float8(),
    *,
    smallest: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the state of an optax transformation in few bits between two steps.

    A step unpacks the state, updates with the inner transformation, and packs the new state:

    .. math::
        (U, S) = \text{inner}(G, \text{unpack}(\hat S)), \qquad \hat S = \text{pack}(S)

    The inner transformation computes on a state in float32 (float64 for float64 parameters),
    whatever the dtype of the parameters; updates have the gradients' dtypes. Integers, keys and
    small arrays are not packed, and neither are bases of `low_rank`: see the option
    ``basis_storage`` of `LowRank`, with which a step computes with one and the same basis.

    It can go around whole optimizers or parts of a chain, inside masks, partitions and
    ``optax.inject_hyperparams``. In a `LowRank` the storage is an option.

    Args:
      inner: any ``optax.GradientTransformation``. The structure of its state must depend on shapes
        and dtypes alone, as in every transformation of optax.
      storage: how arrays are packed, see `storages`; by default in 8 bits of relative precision,
        since Adam divides by a moment. For momentum that is not divided, `storages.int8` is closer.
      smallest: arrays with fewer numbers are not packed, an int >= 0.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is the state of ``inner``, packed;
      with a storage that rounds `storages.at_random` it is a `RoundingState` around this.

    Raises:
      TypeError, ValueError: if an argument is malformed; at ``update`` if the state was made for
        other parameters, another storage or another ``smallest``.

    Example:
      AdamW with both moments in 8 bits:

      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = gum_optax.quantized(optax.adamw(1e-3))
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> state[0].mu["kernel"].codes.dtype, state[0].nu["kernel"].codes.dtype
      (dtype('uint8'), dtype('uint8'))

    References:
      Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """
    _checks.transformation("inner", inner)
    _checks.instance("storage", storage, storages.Storage, "of `gum_optax.storages`")
    smallest = _checks.non_negative_int("smallest", smallest)
    run = optax.with_extra_args_support(inner)
    # Bases of `low_rank` are not packed.
    one = storage._replace(key=None)
    resting = storages.by_path(lambda path: storages.plain() if _BASIS(path) else one)
    pack = partial(_packing.pack, resting, smallest=smallest)

    def init(params: PyTree) -> Any:
        if is_stand_in(params):
            return jnp.zeros(())  # A prefix of every state: `map_params` changes nothing.
        with _ledger.resting(pack):
            packed = pack(run.init(params), fresh=True)
        return packed if storage.key is None else RoundingState(jnp.zeros([], jnp.int32), packed)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if is_stand_in(updates):
            return updates, state
        # 1. The key of this step, if the storage rounds at random.
        step = bits = None
        if storage.key is not None:
            if not isinstance(state, RoundingState):
                # Not `_checks.instance`, which would print all arrays of the state.
                raise TypeError(
                    "`state` must be a `RoundingState`, as `init` makes it if the storage rounds "
                    f"`at_random`, got a {type(state).__name__}."
                )
            step, state = state
            [bits] = _packing.bits_of(storage, step)
        # 2. The shapes of the state before it was packed. `init` has warned already, when the
        #    caller ran it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            like = jax.eval_shape(run.init, updates if params is None else params)
        expected = jax.eval_shape(pack, like)
        containers, state = jax.tree.structure(state), _regrouped(like, expected, state)
        _checks.same_shapes(expected, state)
        # 3. (U, S) = inner(G, unpack(S)), then pack(S), in the dtypes and containers of the state
        #    that came in.
        unpacked = _packing.unpack(resting, state, like, smallest)
        new_updates, new_state = run.update(updates, unpacked, params, **extra_args)
        packed = jax.tree.leaves(keep_dtypes(pack(new_state, bits=bits), state))
        new_state = containers.unflatten(packed)
        new_state = new_state if step is None else RoundingState(step + 1, new_state)
        return keep_dtypes(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _regrouped(like: PyTree, expected: PyTree, state: PyTree) -> PyTree:
    """Puts packed arrays into the containers that ``init`` makes.

    Flax NNX turns the NamedTuples inside its variables into mappings once a step has set them.
    """

    def on_leaf(_: Any, want: PyTree, rest: PyTree) -> PyTree:
        treedef, leaves = jax.tree.structure(want), jax.tree.leaves(rest)
        return treedef.unflatten(leaves) if treedef.num_leaves == len(leaves) else rest

    try:
        return jax.tree.map(on_leaf, like, expected, state)
    except ValueError:
        # The structures differ, so the state was made for other parameters: raise the error that
        # names the array. A masked leaf, which has no array, must count as one for this.
        _checks.same_shapes(_with_masks(expected), _with_masks(state))
        return state


def _with_masks(tree: PyTree) -> PyTree:
    """Replaces every masked leaf by a scalar, so that it counts as an array."""

    def is_mask(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(lambda node: 0.0 if is_mask(node) else node, tree, is_leaf=is_mask)

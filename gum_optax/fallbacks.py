"""Fallbacks: optimizers of embedding, head, norms and biases, from AdamW to hardly any state.

Once compression or few bits have reduced the state of the matrices, AdamW's two moments of tables
dominate: 3.9 of the 5.5 GiB of GUM's state for Llama-3-8B. A `Fallback` is the argument
``fallback`` of an optimizer such as `gum`, or of `for_matrices`, which passes it
``fallback_learning_rate``, weight decay and the mask. The state for a table or head ``[V, d]`` is

============================  =======================  ====================================
fallback                      bytes per parameter      update
============================  =======================  ====================================
``adamw()``                   8 (4 in bfloat16)        Adam's two moments
``adamw(storage=float8())``   2                        Adam's two moments in 8 bits
``factored(0.9)``             1                        Adafactor's update and 8-bit momentum
``factored()``                0 (V + d numbers)        Adafactor's update
``columns()``                 1 for the head           columns of equal norm
============================  =======================  ====================================

Example:
  GUM with 8-bit momentum everywhere and no first moment for embedding and head:

  >>> import gum_optax
  >>> from gum_optax import LowRank, fallbacks, storages
  >>> tx = gum_optax.gum(
  ...     0.02, LowRank(storage=storages.int8()),
  ...     fallback=fallbacks.factored(), fallback_learning_rate=1e-2)

Tests: tests/library/test_fallbacks.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, storages
from gum_optax._columns import normalize_columns
from gum_optax._evidence import is_no_table
from gum_optax._paths import PyTree, is_box, leaves_with_names
from gum_optax._quantized import quantized
from gum_optax._rates import Mask, Number, ScalarOrSchedule, decoupled_decay


class Fallback(NamedTuple):
    """An optimizer of the leaves that are no matrices, before its learning rate is known.

    Attributes:
      make: ``(learning_rate, weight_decay, mask) -> optax.GradientTransformation``.
    """

    make: Callable[[ScalarOrSchedule, Number, Mask], optax.GradientTransformation]


def adamw(
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    storage: storages.Storage | None = None,
) -> Fallback:
    """AdamW as in optax: the default fallback.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, >= 0.
      storage: how both moments are packed between steps, see `quantized`; None: not at all, in the
        dtypes of the parameters.

    Returns:
      The `Fallback`.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      8-bit AdamW for embedding and head:

      >>> import gum_optax
      >>> from gum_optax import fallbacks, storages
      >>> tx = gum_optax.muon(0.02, fallback=fallbacks.adamw(storage=storages.float8()))
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("b2", b2, below=1.0)
    _checks.hyperparameter("eps", eps)
    if storage is None:
        return Fallback(
            lambda rate, decay, mask: optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)
        )
    return _of_direction(quantized(optax.scale_by_adam(b1, b2, eps), storage))


def factored(
    b1: Number = 0.0,
    storage: storages.Storage = storages.float8(),
    *,
    decay_rate: Number = 0.8,
) -> Fallback:
    r"""Adafactor's update: a second moment of rows and columns, with or without momentum.

    With G the gradient ``[..., V, d]``, and R and C the running means of the rows and columns of
    its square with decay :math:`\beta_t = 1 - t^{-0.8}`,

    .. math::
        \hat V_{ij} = R_i C_j / \operatorname{mean}(R), \quad
        U = G / \sqrt{\hat V}, \quad U \leftarrow U / \max(1, \operatorname{rms}(U)), \quad
        M \leftarrow \beta_1 M + (1 - \beta_1) U

    Updates have a root mean square of at most one, like Adam's, so that learning rates carry over;
    Adafactor's scale by the size of the parameters is left out. Arrays without two axes of length
    128 or more keep a second moment for each number. Second moments are in float32.

    Args:
      b1: decay of the bias-corrected momentum of updates, in [0, 1); with a plain 0 there is none.
      storage: how that momentum is packed between steps, see `quantized`.
      decay_rate: the exponent of t in the decay of second moments, without its sign, >= 0.

    Returns:
      The `Fallback`.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import gum_optax
      >>> from gum_optax import fallbacks
      >>> tx = gum_optax.gum(0.02, fallback=fallbacks.factored(b1=0.9))

    References:
      Shazeer and Stern, Adafactor, arXiv 1804.04235.
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("decay_rate", decay_rate)
    # Checked even without momentum, so that a mistake does not depend on `b1`.
    _checks.instance("storage", storage, storages.Storage, "of `gum_optax.storages`")
    # 1. V, by optax. It has the dtype of the parameters there; in bfloat16 it would stop changing
    #    once the decay is within 2 ** -8 of one.
    second = quantized(
        optax.scale_by_factored_rms(decay_rate=decay_rate), storages.cast(jnp.float32), smallest=0
    )
    # 2. U <- U / max(1, rms(U)), and 3. momentum of U. A traced `b1` may be anything.
    direction = optax.chain(second, optax.clip_by_block_rms(1.0))
    if not (isinstance(b1, int | float) and b1 == 0):
        direction = optax.chain(direction, quantized(optax.ema(b1), storage))
    return _of_direction(direction)


def columns(
    b1: Number = 0.9,
    storage: storages.Storage = storages.float8(),
    *,
    is_head: Callable[[str], bool] = is_no_table,
) -> Fallback:
    r"""SCALE's rule: columns of equal norm, momentum for the head alone, and AdamW for vectors.

    .. math::
        M \leftarrow \beta_1 M + (1 - \beta_1) G \quad\text{(head; elsewhere } M = G), \qquad
        U_j = M_j / \operatorname{rms}(M_j)

    Columns are vectors along axis -2, so a column of an embedding ``[V, d]`` holds one feature of
    all tokens. Updates have a root mean square of one. Beside Muon the best learning rate was the
    same as AdamW's, 1e-2, within a factor of two.

    Args:
      b1: decay of the head's momentum, in [0, 1).
      storage: how that momentum is packed between steps, see `quantized`.
      is_head: ``path -> bool`` for paths such as ``"lm_head/kernel"``, true for the arrays with
        momentum; by default those without a name of embeddings or positions. An embedding that is
        also the head needs momentum: pass ``lambda path: True``.

    Returns:
      The `Fallback`.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import gum_optax
      >>> from gum_optax import fallbacks
      >>> tx = gum_optax.for_matrices(
      ...     gum_optax.normalize_columns(), 1e-3, fallback=fallbacks.columns())

    References:
      Glentis et al., SCALE, arXiv 2506.16659.
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.function("is_head", is_head, "path -> bool")

    # The label of each leaf, from its number of axes and its name.
    def kinds(tree: PyTree) -> PyTree:
        # A leaf in a box is labelled with its box, as in `for_matrices`.
        return jax.tree.structure(tree, is_leaf=is_box).unflatten(
            "vector" if len(leaf.shape) < 2 else "head" if is_head(path) else "table"
            for path, leaf in leaves_with_names(tree)
        )

    momentum = quantized(optax.ema(b1, debias=False), storage)
    direction = optax.partition(
        {
            "head": optax.chain(momentum, normalize_columns()),
            "table": normalize_columns(),
            "vector": optax.scale_by_adam(),
        },
        kinds,
    )
    return _of_direction(direction)


def _of_direction(direction: optax.GradientTransformation) -> Fallback:
    """Makes a `Fallback` from a direction: U -> -learning_rate * (U + weight_decay * W)."""

    def make(rate: ScalarOrSchedule, decay: Number, mask: Mask) -> optax.GradientTransformation:
        return optax.chain(
            direction, decoupled_decay(decay, mask), optax.scale_by_learning_rate(rate)
        )

    return Fallback(make)

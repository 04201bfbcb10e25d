r"""Second moments in few numbers: one per block (Adam-mini), or rows and columns (AdaLomo).

Tests: tests/library/test_neighbours.py.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks
from gum_optax._paths import PyTree, leaves_with_names
from gum_optax._rates import Mask, Number, ScalarOrSchedule

Blocks: TypeAlias = Callable[[str, Any], Sequence[int]]
"""``(path, leaf) -> axes``, over which entries share one second moment; no axes: as in Adam."""


class AdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`.

    Attributes:
      count: ``int32[]``, steps taken.
      mu: the first moment, like the parameters.
      nu: the second moment; axes that share one have length one.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree


def by_output(path: str, leaf: Any) -> Sequence[int]:
    """Shares one second moment per output neuron, per token, and per norm.

    A block is the column of a kernel ``[..., inputs, outputs]``, the row of an embedding (a leaf
    with "embed" in its name), or a whole vector; biases keep a moment for each entry. Adam-mini
    shares one per *head* of queries and keys: for kernels ``[width, heads, head size]`` return
    ``(-3, -1)`` in a function of your own.

    Args:
      path: the leaf's path, its parts joined by ``/``.
      leaf: the array, or anything with a shape.

    Returns:
      The axes to average over.

    Example:
      >>> import jax.numpy as jnp
      >>> from gum_optax import by_output
      >>> by_output("layers/0/mlp/kernel", jnp.zeros((8, 4)))
      (-2,)
    """
    words = re.split(r"[^a-z]+", path.lower())
    if len(leaf.shape) < 2:
        return () if "bias" in words or not leaf.shape else (-1,)
    return (-1,) if any("embed" in word for word in words) else (-2,)


def scale_by_adam_mini(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, *, blocks: Blocks = by_output
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam with one second moment for each block of weights: Adam-mini.

    .. math::
        v_b \leftarrow b_2 v_b + (1 - b_2) \text{mean}(G_b^2), \qquad
        U_b = \frac{m_b / (1 - b_1^t)}{\sqrt{v_b / (1 - b_2^t)} + \epsilon}

    It saves nearly all of the second moment, which is half of Adam's state.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      blocks: ``(path, leaf) -> axes`` over which a block extends, see `by_output`. Without axes
        this is Adam.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `AdamMiniState`. Moments have the
      dtypes of the parameters, updates those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import gum_optax
      >>> tx = optax.chain(gum_optax.scale_by_adam_mini(), optax.scale_by_learning_rate(1e-3))
      >>> tx.init({"kernel": jnp.ones((8, 4))})[0].nu["kernel"].shape
      (1, 4)

    References:
      Zhang et al., Adam-mini, arXiv 2406.16793. Its code finds blocks by names of PyTorch modules.
    """
    _checks.hyperparameter("b1", b1, below=1.0)
    _checks.hyperparameter("b2", b2, below=1.0)
    _checks.hyperparameter("eps", eps)
    _checks.function("blocks", blocks, "(path, leaf) -> axes")

    def axes_of(tree: PyTree) -> list[tuple[int, ...]]:
        return [tuple(blocks(path, leaf)) for path, leaf in leaves_with_names(tree)]

    def init(params: PyTree) -> AdamMiniState:
        leaves, treedef = jax.tree.flatten(params)
        # nu: [..., 1, ...], with length one on the axes of a block, so that it broadcasts to them.
        nu = [
            jnp.zeros(jax.eval_shape(lambda x, a=axes: _mean(x, a), leaf).shape, leaf.dtype)
            for leaf, axes in zip(leaves, axes_of(params), strict=True)
        ]
        mu = jax.tree.map(jnp.zeros_like, params)
        return AdamMiniState(jnp.zeros((), jnp.int32), mu, treedef.unflatten(nu))

    def update(
        updates: PyTree, state: AdamMiniState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AdamMiniState]:
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        # 1. m <- b1 m + (1 - b1) G
        mu = jax.tree.map(_average(b1), state.mu, updates)
        # 2. v_b <- b2 v_b + (1 - b2) mean(G_b^2), one number for each block
        leaves, treedef = jax.tree.flatten(updates)
        squares = treedef.unflatten(
            _mean(leaf**2, axes) for leaf, axes in zip(leaves, axes_of(updates), strict=True)
        )
        nu = jax.tree.map(_average(b2), state.nu, squares)
        # 3. U = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        m: Any = optax.tree.bias_correction(mu, b1, count)
        v: Any = optax.tree.bias_correction(nu, b2, count)
        directions = jax.tree.map(
            lambda g, m, v: (m / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, m, v
        )
        return directions, AdamMiniState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def adalomo(
    learning_rate: ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    clip: float = 1.0,
    weight_decay: Number = 0.0,
    weight_decay_mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaLomo's update rule: a factored second moment, no momentum, and relative step sizes.

    Each row and each column of a matrix has a second moment, and there is no first moment:

    .. math::
        \rho \leftarrow \beta \rho + (1 - \beta)\, \text{rowmean}(G^2), \quad
        \kappa \leftarrow \beta \kappa + (1 - \beta)\, \text{colmean}(G^2), \quad
        \beta = 1 - t^{-0.8}

    .. math::
        u = G / \sqrt{\rho \kappa^\top / \text{mean}(\rho)}, \quad
        u \leftarrow u / \max(1, \text{rms}(u) / \text{clip}), \quad
        W \leftarrow W - \eta \max(10^{-3}, \text{rms}(W)) (u + \lambda W)

    The state is ``m + n`` numbers for each matrix. Of leaves with more axes, the two longest axes
    are factored, and root mean squares are taken over the whole leaf. The paper also applies
    updates inside the backward pass, so that not all gradients live at once. No optimizer can do
    this; `backward` has another way to hold fewer gradients.

    Args:
      learning_rate: a number, or a schedule of the step count; the paper advises 5e-4 to 1e-3.
      decay_rate: the power of t in beta, without its sign, >= 0.
      clip: the largest root mean square of a leaf's update before the learning rate, > 0.
      weight_decay: lambda, decoupled; like the update it is multiplied by the weights' root mean
        square.
      weight_decay_mask: which leaves decay, as in ``optax.add_decayed_weights``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose ``update`` needs ``params``. Updates have
      the dtypes of the gradients.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import jax.numpy as jnp
      >>> import gum_optax
      >>> tx = gum_optax.adalomo(1e-3)
      >>> params = {"w": jnp.full((2, 2), 2.0)}
      >>> state = tx.init(params)

    References:
      Lv et al., AdaLomo, arXiv 2310.10195.
    """
    _checks.scalar_or_schedule("learning_rate", learning_rate)
    _checks.hyperparameter("decay_rate", decay_rate)
    _checks.hyperparameter("clip", clip)
    _checks.hyperparameter("weight_decay", weight_decay)
    rule = optax.with_extra_args_support(
        optax.chain(
            # 1. u = G / sqrt(V). Small matrices are factored, too: by default, optax does not
            #    factor those with a side below 128.
            optax.scale_by_factored_rms(
                decay_rate=decay_rate, epsilon=1e-30, min_dim_size_to_factor=1
            ),
            # 2. u <- u / max(1, rms(u) / clip)
            optax.clip_by_block_rms(clip),
            # 3. -eta (u + lambda W)
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
            # 4. Last, so that it scales weight decay as well: times max(1e-3, rms(W)).
            optax.scale_by_param_block_rms(1e-3),
        )
    )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        steps, state = rule.update(updates, state, params, **extra)
        # Weights of a wider dtype must not widen the updates.
        return jax.tree.map(lambda g, u: u.astype(g.dtype), updates, steps), state

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _average(decay: Number) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the running average ``(old, new) -> average``, which keeps the dtype of ``old``."""
    return lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mean over axes, which are kept with length one."""
    # The mean of no entries would be NaN.
    if not axes or math.prod(x.shape) == 0:
        return x
    return jnp.mean(x, axis=axes, keepdims=True)

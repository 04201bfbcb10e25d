r"""Projection granularity: rows of a gradient cut into pieces, or merged, before it is projected.

A gradient G [m, n] of granularity c becomes ``[m c, n / c]``, row by row: every row is cut into c
pieces. With c = 1/f, f rows are merged. The coordinates of a projection to rank r then have
``m c r`` numbers: at a fixed number, finer pieces mean a lower rank. The methods are VLoRP
(`regrained`) and ProjFactor (`projfactor`).

Tests: tests/library/test_granularity.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import _checks, _codec, carries, projectors
from gum_optax._codec import Compressed, Frame, Leaves
from gum_optax._compression import LowRank
from gum_optax._groups import Group
from gum_optax._paths import PyTree, leaves_with_names
from gum_optax.residuals import Residual, State


def regrained(
    inner: optax.GradientTransformation, granularity: float
) -> optax.GradientTransformationExtraArgs:
    r"""Runs a transformation on matrices whose rows are cut into pieces: VLoRP's granularity.

    With Haar bases, as here, the variance of a projection depends only on the number of
    coordinates, not on how they are divided among pieces and rank. With the Gaussian bases of the
    paper, fine pieces have a slightly larger variance; the paper prefers them on empirical grounds.

    Args:
      inner: a transformation of matrices, such as `low_rank`. It projects the shorter side of the
        reshaped matrices ``[m c, n / c]``, which is the paper's side if ``n / c <= m c``.
      granularity: c > 0, either a whole number of pieces per row, or the inverse of a whole number
        of rows to merge.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for trees of matrices ``[..., m, n]``. Its state
      is the state of ``inner`` for matrices ``[..., m c, n / c]``.

    Raises:
      TypeError, ValueError: if an argument is malformed; from ``init`` and ``update``, if a leaf
        has fewer than two axes or cannot be cut into pieces of equal length.

    Example:
      Unbiased VLoRP with SGD. Eight pieces per row at rank 1 need the memory of rank 8 without
      pieces:

      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import carries, projectors, residuals
      >>> compression = gum_optax.LowRank(
      ...     rank=1, period=100, residual=residuals.rescaled(), carry=carries.keep,
      ...     projector=projectors.random_orthonormal)
      >>> vlorp = gum_optax.regrained(gum_optax.low_rank(optax.identity(), compression), 8)

    References:
      Miao et al., VLoRP, arXiv 2505.01744.
    """
    _checks.transformation("inner", inner)
    _checks.hyperparameter("granularity", granularity)
    if granularity <= 0 or (granularity < 1 and not (1 / granularity).is_integer()):
        raise ValueError(
            f"`granularity` must be a whole number of pieces, or one divided by a whole number of "
            f"rows, got {granularity!r}."
        )
    if granularity >= 1 and not float(granularity).is_integer():
        raise ValueError(f"`granularity` must be a whole number of pieces, got {granularity!r}.")
    run: Any = optax.with_extra_args_support(inner)

    # [..., m, n] -> [..., m c, n / c]
    def shape_of(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2:
            raise ValueError(f"`regrained` needs matrices, got shape {shape} at `{path}`.")
        *batch, m, n = shape
        rows, columns = round(m * granularity), round(n / granularity)
        # Equal sizes are not enough: a piece must lie within one row, or consist of whole rows.
        if rows * columns != m * n or (n % columns and columns % n):
            raise ValueError(
                f"`granularity` {granularity!r} does not divide the matrix {m} x {n} at `{path}`."
            )
        return (*batch, rows, columns)

    def cut(tree: PyTree | None) -> PyTree | None:
        if tree is None:
            return None
        # Descriptions in the place of arrays, as `memory_plan` has them, have no `reshape`.
        leaves = [
            jax.ShapeDtypeStruct(shape_of(path, leaf.shape), leaf.dtype)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else jnp.reshape(leaf, shape_of(path, leaf.shape))
            for path, leaf in leaves_with_names(tree)
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        pieces, state = run.update(cut(updates), state, cut(params), **extra)
        return jax.tree.map(lambda p, u: p.reshape(u.shape), pieces, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: run.init(cut(params)), update)


def projfactor(
    rank: Any = 32, period: int = 100, *, b2: float = 0.999, eps: float = 1e-6, **parts: Any
) -> LowRank:
    r"""The compression of ProjFactor: momentum in random bases, a factored second moment outside.

    With ``R = P'G``, and M the momentum that the inner transformation makes of R,

    .. math::
        \hat G = P R, \quad
        \rho \leftarrow b_2 \rho + (1 - b_2)\, \text{rowsum}(\hat G^2), \quad
        \kappa \leftarrow b_2 \kappa + (1 - b_2)\, \text{colsum}(\hat G^2)

    .. math::
        U = P M / (\sqrt{V} + \epsilon) \cdot \sqrt{1 - b_2^t}, \qquad
        V = \rho \kappa^\top / \textstyle\sum \rho

    The inner transformation should be a bias-corrected average, ``optax.ema(0.9)``. The state is
    ``r n + m + n`` numbers beside the basis. Within `regrained`, the second moment has the rows and
    columns of the reshaped matrix; in the paper, those of the original one.

    Args:
      rank: as for `LowRank`.
      period: as for `LowRank`.
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      **parts: any other option of `LowRank`.

    Returns:
      A `LowRank`.

    Raises:
      TypeError, ValueError: as `LowRank` does, and if ``b2`` or ``eps`` is malformed.

    Example:
      >>> import optax
      >>> import gum_optax
      >>> tx = gum_optax.regrained(
      ...     gum_optax.low_rank(optax.ema(0.9), gum_optax.projfactor(rank=1)), granularity=8)

    References:
      Miao et al., VLoRP, arXiv 2505.01744; as in its code, momentum is neither reset nor rotated
      at a refresh.
    """
    _checks.hyperparameter("b2", b2, below=1.0)
    _checks.hyperparameter("eps", eps)
    own = {
        "residual": _factored(b2, eps),
        "projector": projectors.random_orthonormal,
        "carry": carries.keep,
    }
    return LowRank(rank, period, **own | parts)


def _factored(b2: float, eps: float) -> Residual:
    """Makes the rule that divides ``P M`` by the root of a factored second moment of ``P R``."""

    def init(group: Group) -> State:
        shape = (*group.batch, group.m, group.n)
        dtype = group.compute_dtype
        # t, and for each leaf rho [*batch, m] and kappa [*batch, n].
        return (
            jnp.zeros((), jnp.int32),
            tuple(
                (jnp.zeros(shape[:-1], dtype), jnp.zeros((*shape[:-2], group.n), dtype))
                for _ in group.leaves
            ),
        )

    def decode(
        frame: Frame, updates: Compressed, encoded: Compressed, gradients: Leaves, state: State
    ) -> tuple[Leaves, State]:
        count, moments = state
        count = jnp.asarray(optax.safe_increment(count))
        group, leaves, new = frame.group, [], []
        # Leaf by leaf, so that only one leaf has full-size temporaries at a time.
        parts = [_codec.split(group, part) for part in (frame.basis, updates.low, encoded.low)]
        for basis, low, projected, gradient, (rows, columns) in zip(
            *parts, gradients, moments, strict=True
        ):
            # 1. rho and kappa of P R, [*batch, m] and [*batch, n]
            square = (basis @ projected) ** 2
            rows = b2 * rows + (1 - b2) * jnp.sum(square, -1)
            columns = b2 * columns + (1 - b2) * jnp.sum(square, -2)
            new.append((rows, columns))
            # 2. V = rho kappa' / sum(rho), [*batch, m, n]; the sum is zero only as long as all
            #    gradients were.
            total = jnp.sum(rows, -1, keepdims=True)[..., None]
            second = rows[..., :, None] * (columns[..., None, :] / jnp.where(total > 0, total, 1))
            # 3. U = sqrt(1 - b2^t) P M / (sqrt(V) + eps)
            root = jnp.sqrt(1 - jnp.asarray(b2, basis.dtype) ** count)
            divisor = jnp.sqrt(second) + eps
            update = root * (basis @ low) / jnp.where(divisor > 0, divisor, 1)
            leaves.append(_codec.wide(group, update.astype(gradient.dtype)))
        return leaves, (count, tuple(new))

    return Residual(init=init, decode=decode, reads="projection")

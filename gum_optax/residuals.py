r"""Residual rules: the treatment of the part of a gradient outside its basis.

A basis P splits a gradient into its projection and its residual, ``G = P P'G + (G - P P'G)``. The
projection always goes through the inner transformation. The rules differ in the residual:

- `drop` discards it (GaLore); `rescaled` discards it and scales the projection up (VLoRP);
- `sampled` sends the residuals of a few drawn matrices through the inner transformation at full
  size, with weights that make the gradient estimate unbiased (GUM);
- `through` sends it through a separate optax transformation and adds the two updates (Fira,
  FRUGAL);
- `orthogonalized` adds its polar factor;
- `guided` sends the whole gradient through a separate transformation and takes only its update
  (APOLLO);
- `feedback` adds it to the next gradient (LDAdam, Dion).

A rule is a `Residual`: a few functions of one group of matrices. Any `Residual` can be passed as
``LowRank(residual=...)``; ``_replace`` changes functions of an existing one.

Example:
  GaLore-Muon that adds a hundredth of the sign of the residual:

  >>> import optax
  >>> import gum_optax
  >>> from gum_optax import residuals
  >>> sign = optax.chain(optax.scale_by_sign(), optax.scale(0.01))
  >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=64, residual=residuals.through(sign)))

Tests: tests/library/test_residuals.py, tests/library/test_unbiased.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gum_optax import _checks, _codec, samplers
from gum_optax._codec import Compressed, Frame, Leaves
from gum_optax._column_scaling import expanded, factors_of
from gum_optax._columns import normalize_columns
from gum_optax._groups import Group
from gum_optax._orthogonal import scale_by_polar
from gum_optax._projected import Projected
from gum_optax._scheduling import in_sequence, in_turn, takes_turns

_POLAR = scale_by_polar()

State: TypeAlias = Any
"""The state of a rule for one group: any tree of arrays."""


# The defaults of `Residual`: gradients P'G without slots, and updates P L.


def _keep_gradients(group: Group, gradients: Leaves, state: State) -> Leaves:
    del group, state
    return gradients


def _project(frame: Frame, gradients: Leaves) -> Compressed:
    return Compressed(_codec.project(frame, gradients), None)


def _expand(
    frame: Frame, updates: Compressed, encoded: Compressed, gradients: Leaves, state: State
) -> tuple[Leaves, State]:
    del encoded
    return _leaf_by_leaf(frame, lambda basis, low: basis @ low, updates.low, gradients), state


class Residual(NamedTuple):
    """A residual rule, as functions of one group.

    Leaves are arrays ``[*batch, rows, columns]``, in the order of the group. A `Frame` holds the
    group with its bases and slots. The functions are traced and must not depend on values. In each
    step they run in the order ``correct``, ``encode``, inner transformation, ``decode``.

    Attributes:
      init: ``(group) -> state``; by default there is no state.
      correct: ``(group, gradients, state) -> gradients``, the gradients to be projected; by default
        unchanged.
      draw: ``(group, key) -> int32[slots]``, the matrix that each slot serves in a period; only
        called for groups with slots.
      encode: ``(frame, gradients) -> Compressed``, the input of the inner transformation. It also
        encodes parameters, so it must be linear. By default the projection.
      decode: ``(frame, updates, encoded, gradients, state) -> (updates, state)``, from the updates
        of the inner transformation to the updates of the leaves; ``encoded`` is its input. By
        default the expansion of ``updates.low``.
      extra_args: ``(frames) -> dict``, extra arguments for the update of the inner transformation,
        from the frames of all groups by their names; by default there are none.
      slots: ``(group) -> int``, the number of full-size matrices from ``encode`` beside the
        projections; by default 0.
      uncompressed: ``(group) -> str``, the reason why a group should run uncompressed; empty if it
        should not.
      reads: the parts of gradients that these functions read, for `backward`: ``"projection"`` (and
        the residuals of drawn matrices), ``"residual"`` (and the residuals of all matrices), or
        ``"gradient"`` (whole gradients, which the backward pass does not compute).
    """

    init: Callable[[Group], State] = lambda group: ()
    correct: Callable[[Group, Leaves, State], Leaves] = _keep_gradients
    draw: Callable[[Group, jax.Array], jax.Array | None] = lambda group, key: None
    encode: Callable[[Frame, Leaves], Compressed] = _project
    decode: Callable[[Frame, Compressed, Compressed, Leaves, State], tuple[Leaves, State]] = _expand
    extra_args: Callable[[dict[str, Frame]], dict[str, Any]] = lambda frames: {}
    slots: Callable[[Group], int] = lambda group: 0
    uncompressed: Callable[[Group], str] = lambda group: ""
    reads: Literal["projection", "residual", "gradient"] = "gradient"


def drop() -> Residual:
    """Drops the residual: GaLore's rule, which is biased.

    The dropped part never returns. If noise dominates the gradient, it can be the whole signal.

    Returns:
      A `Residual` without state and without slots.

    Example:
      >>> import gum_optax
      >>> galore_muon = gum_optax.gum(0.02, gum_optax.LowRank(residual=gum_optax.residuals.drop()))

    References:
      Zhao et al., GaLore, arXiv 2403.03507.
    """
    return Residual(reads="projection")


def rescaled() -> Residual:
    r"""Drops the residual and multiplies the projection by m / r: unbiased with random bases.

    For bases drawn uniformly, ``E[P P'] = (r / m) I``, so that the mean of ``(m / r) P P'G`` is G
    and its second moment ``(m / r) |G|^2``. With bases from the gradient itself the estimate is
    biased.

    Returns:
      A `Residual` without state and without slots.

    Example:
      >>> import optax
      >>> import gum_optax
      >>> from gum_optax import projectors, residuals
      >>> tx = gum_optax.low_rank(optax.identity(), gum_optax.LowRank(
      ...     residual=residuals.rescaled(), projector=projectors.random_orthonormal))

    References:
      Miao et al., VLoRP, arXiv 2505.01744, with Gaussian matrices instead of bases.
    """

    def encode(frame: Frame, gradients: Leaves) -> Compressed:
        # (m / r) P'G
        factor = frame.group.m / frame.basis.shape[-1]
        return Compressed(factor * _codec.project(frame, gradients), None)

    return Residual(encode=encode, reads="projection")


def sampled(
    full_rank: int | samplers.Sampler = 2,
    *,
    form: Literal["exclusive", "additive"] = "exclusive",
    undrawn: optax.GradientTransformation | None = None,
) -> Residual:
    r"""Sends the residuals of a few drawn matrices on at full size: GUM's rule, which is unbiased.

    In every period each of a group's N matrices is drawn with probability q, which is the same for
    all matrices or, with `samplers.unequal`, different. In the *exclusive* form of the paper, the
    inner transformation sees

    .. math::
        P^\top G / (1 - q) \;\text{(undrawn matrices)}, \qquad
        (G - P P^\top G) / q \;\text{(drawn matrices)}

    and a drawn matrix takes the second update *instead of* the first. In the *additive* form, the
    inner transformation sees ``P'G`` of all matrices, and a drawn matrix takes the update of
    ``(G - P P'G) / q`` *in addition to* the update of its projection, so that it does not lose its
    leading directions for a period. In both forms, the decoded estimate has the expectation G over
    the draw. With s the residual's share of ``|G|^2``, the variances of the two estimates relative
    to ``|G|^2`` are

    .. math::
        (1 - s) \frac{q}{1 - q} + s \frac{1 - q}{q} \quad\text{(exclusive)}, \qquad
        s \frac{1 - q}{q} \quad\text{(additive)}

    Only the gradient estimate is unbiased. The update, after a nonlinear transformation such as
    Adam or Newton-Schulz, is not. With ``undrawn``, the estimate is not unbiased either.

    The group's state holds one slot m x n for each matrix that can be drawn at the same time. A
    group whose matrices are always drawn, such as a group of a single matrix, is uncompressed.

    Args:
      full_rank: gamma, the number of matrices of a group that are drawn in a period, an int >= 0,
        clipped to ``N // 2``; or a function of `gum_optax.samplers`.
      form: ``"exclusive"`` or ``"additive"``, see above.
      undrawn: an optax transformation for the residuals of undrawn matrices, as in `through`, whose
        updates are added to the other updates of these matrices. None: the residuals are dropped.

    Returns:
      A `Residual`.

    Raises:
      TypeError, ValueError: if an argument is malformed.

    Example:
      >>> import gum_optax
      >>> from gum_optax import residuals
      >>> compression = gum_optax.LowRank(rank=64, residual=residuals.sampled(1, form="additive"))

    References:
      Pan et al., arXiv 2510.17802, for the exclusive form.
    """
    sampler = full_rank if callable(full_rank) else samplers.fixed_size(full_rank)
    _checks.function("full_rank", sampler, "(count) -> samplers.Sampling")
    _checks.one_of("form", form, ("exclusive", "additive"))
    # The forms differ in two places: the weight of P'G, and whether a drawn matrix keeps P L beside
    # F, the update of its slot.
    additive = form == "additive"
    transform = None if undrawn is None else _transform_of("undrawn", undrawn)

    # A sampler is asked once for each number of matrices, not at every use.
    of_count = functools.cache(functools.partial(samplers.resolve, sampler))

    def sampling(group: Group) -> samplers.Sampling:
        return of_count(group.count)

    def encode(frame: Frame, gradients: Leaves) -> Compressed:
        # R = P'G, [*lead, r, n], of all matrices.
        low = _codec.project(frame, gradients)
        # (G - P R) / q, [slots, m, n], of drawn ones.
        residual = None
        if frame.slots is not None:
            q = _of_slots(sampling(frame.group).probability, frame)
            residual = _codec.drawn_complements(frame, gradients, low) / q
        return Compressed(low if additive else low / undrawn_share(frame), residual)

    def undrawn_share(frame: Frame) -> Any:
        """Returns 1 - q: one number, or one for each matrix, ``[*lead, 1, 1]``."""
        q = sampling(frame.group).probability
        if isinstance(q, np.ndarray):
            return (1.0 - q).reshape(*frame.group.lead, 1, 1).astype(frame.group.compute_dtype)
        return 1.0 - q

    def decode(
        frame: Frame, updates: Compressed, encoded: Compressed, gradients: Leaves, state: State
    ) -> tuple[Leaves, State]:
        # The state of `undrawn` for each leaf, in the order in which the leaves are expanded.
        new_state = []

        def update_of(basis, low, position, *of_leaf):
            # U = P L, for an undrawn matrix plus its transformed residual if `undrawn` is given.
            expanded = update = basis @ low
            if transform is not None:
                added, of_leaf_state = transform(frame.group, basis, low, *of_leaf)
                new_state.append(of_leaf_state)
                update = expanded + added
            # A drawn matrix has F, the update of its slot; in the additive form P L + F.
            if updates.residual is None:
                return update
            beside = expanded if additive else None
            update = update.astype(gradients[position].dtype)
            return _codec.place(frame, position, update, updates.residual, beside)

        columns = [range(len(gradients))]
        if transform is not None:
            # P'G again, which `encode` has divided by 1 - q.
            share = 1.0 if additive else undrawn_share(frame)
            columns += [_codec.split(frame.group, encoded.low * share), gradients, state]
        leaves = _leaf_by_leaf(frame, update_of, updates.low, gradients, *columns)
        return leaves, tuple(new_state) or state

    return Residual(
        init=Residual().init if undrawn is None else through(undrawn).init,
        draw=lambda group, key: samplers.draw(sampling(group), key),
        encode=encode,
        decode=decode,
        slots=lambda group: sampling(group).slots,
        uncompressed=lambda group: _always_drawn(sampling(group), group),
        reads="projection" if undrawn is None else "residual",
    )


def through(transformation: optax.GradientTransformation) -> Residual:
    r"""Sends the residual through an optax transformation and adds the two updates: Fira, FRUGAL.

    With ``E = G - P P'G``, and D the inner transformation's update of ``P'G``, the update is

    .. math::
        U = P D + \text{transformation}(E)

    The transformation sees the residual of one leaf at a time, as wide matrices ``[*batch, m, n]``,
    m <= n, and has a state for each leaf, which does not change at a refresh. It receives the extra
    arguments ``projected`` (``P'G``) and ``projected_update`` (``D``), both ``[*batch, r, n]``, so
    that it can scale the residual relative to them, and no parameters. A transformation with
    full-size state costs full-size memory, so this rule is meant for stateless ones.

    `normalize_columns` and `scale_by_gain` multiply columns by factors that depend on their norms
    alone. By themselves (not in a chain) they are applied without computing E, which makes an
    update about as fast as with `drop`.

    Args:
      transformation: any optax transformation, for example `gum_optax.normalize_columns`.

    Returns:
      A `Residual` without slots.

    Raises:
      TypeError: if ``transformation`` is no optax transformation.

    Example:
      Low-rank Muon plus the column-normalized residual, without any full-size state:

      >>> import gum_optax
      >>> residual = gum_optax.residuals.through(gum_optax.normalize_columns())
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=64, residual=residual))

    References:
      Chen et al., Fira, arXiv 2410.01623; Zmushko et al., FRUGAL, arXiv 2411.07837.
    """
    transform = _transform_of("transformation", transformation)
    factors = factors_of(transformation)

    def update_of(group, basis, low, projected, gradient, state):
        # U = P D + E diag(c), without E unless the backward pass has computed it already.
        if factors is not None and not isinstance(gradient, Projected):
            matrices = _codec.whole(group, basis, projected, gradient)
            return expanded(factors, basis, low, projected, matrices, state)
        # U = P D + transformation(E)
        sent, state = transform(group, basis, low, projected, gradient, state)
        return basis @ low + sent, state

    return _sent(transformation, update_of)


def orthogonalized(
    scale: float | jax.Array = 4.0, orthogonalizer: optax.GradientTransformation = _POLAR
) -> Residual:
    r"""Adds the polar factor of the residual, without momentum and a few times as large.

    With ``E = G - P P'G`` and D the inner transformation's update of ``P'G``, the update is

    .. math::
        F = \text{NS}(E \,\text{diag}(1 / \|E_j\|)), \qquad
        U = P D + \text{scale}\; (F - P P^\top F)

    A direction without momentum bears larger steps than one with it: the noise of successive
    batches cancels in part. Of the rules without full-size state, this one came closest to
    full-rank Muon in our studies, with low-rank Muon and a scale of 4. An update takes a fifth
    longer than full-rank Muon's, eight times as long as without a residual (measured on a CPU).

    E has no part in the span of P but rounding errors, which are largest if bases are kept in few
    bits. Newton-Schulz lifts them to the size of everything else, and ``F - P P'F`` removes them.

    Args:
      scale: the size of the residual's singular values; those of low-rank Muon's update are one.
      orthogonalizer: the transformation that follows the normalization of columns, by default
        `scale_by_polar()`.

    Returns:
      A `Residual` without slots.

    Raises:
      TypeError, ValueError: if ``scale`` is not a finite number >= 0, or ``orthogonalizer`` no
        optax transformation.

    Example:
      >>> import gum_optax
      >>> from gum_optax import carries, residuals
      >>> compression = gum_optax.LowRank(
      ...     rank=64, residual=residuals.orthogonalized(), carry=carries.rotate)
      >>> tx = gum_optax.gum(3e-3, compression, consistent_rms=0.2)
    """
    _checks.hyperparameter("scale", scale)
    _checks.transformation("orthogonalizer", orthogonalizer)
    direction = optax.chain(normalize_columns(), orthogonalizer)
    transform = _transform_of("orthogonalizer", direction)

    def update_of(group, basis, low, projected, gradient, state):
        def one(gradient, basis, low, projected):
            # wide [*batch, m, n]
            F, new_state = transform(group, basis, low, projected, gradient, state)
            return basis @ (low - scale * (basis.mT @ F)) + scale * F, new_state

        # The whole of it for one matrix after the other, where matrices are large and no part has a
        # state: E, F and the update then exist once and not for a whole stack.
        if isinstance(gradient, Projected) or jax.tree.leaves(state) or not takes_turns(gradient):
            return one(gradient, basis, low, projected)

        def of_matrix(gradient, *row):
            return _codec.wide(group, one(gradient, *row)[0]).astype(gradient.dtype)

        return _codec.wide(group, in_turn(of_matrix, gradient, basis, low, projected)), state

    return _sent(direction, update_of)


def guided(transformation: optax.GradientTransformation) -> Residual:
    r"""Sends the whole gradient through an optax transformation, guided by the projection: APOLLO.

    The inner transformation's update D of ``R = P'G`` is not expanded. The transformation receives
    it as an extra argument, as with `through`, and scales the gradient as D scales R:

    .. math::
        U = \text{transformation}(G;\, R, D)

    Args:
      transformation: an optax transformation of wide matrices ``[*batch, m, n]`` that uses the
        extra arguments ``projected`` and ``projected_update``, such as `gum_optax.scale_by_gain`.

    Returns:
      A `Residual` without slots.

    Raises:
      TypeError: if ``transformation`` is no optax transformation.

    Example:
      >>> import gum_optax
      >>> residual = gum_optax.residuals.guided(gum_optax.scale_by_gain("matrix"))
      >>> tx = gum_optax.adamw(1e-2, gum_optax.LowRank(rank=1, residual=residual))

    References:
      Zhu et al., APOLLO, arXiv 2412.05270, algorithm 1.
    """
    # U = transformation(G)
    return _sent(transformation, _transform_of("transformation", transformation, _codec.whole))


def feedback(decay: float = 0.0) -> Residual:
    r"""Adds the residual to the next gradient: error feedback, as in LDAdam and Dion.

    With an error buffer E that starts at zero, every step projects

    .. math::
        B = G + E, \qquad E \leftarrow B - (1 - \text{decay}) P P^\top B

    With decay 0 nothing is ever lost: the sum of the decoded gradients and the last error equals
    the sum of all gradients. With decay mu, E is Dion's momentum. The basis is also computed from
    B; both methods refresh it at every step, ``LowRank(period=1)``.

    The buffer has the full size of a matrix, so this saves no memory over SGD with momentum. It is
    never restarted, so a non-finite entry stays non-finite.

    Args:
      decay: the share of ``P P'B`` that is kept in the buffer, in [0, 1).

    Returns:
      A `Residual` without slots.

    Raises:
      TypeError, ValueError: if ``decay`` is not a number in [0, 1).

    Example:
      >>> import gum_optax
      >>> from gum_optax import carries, residuals
      >>> compression = gum_optax.LowRank(
      ...     rank=64, period=1, residual=residuals.feedback(), carry=carries.rotate)
      >>> tx = gum_optax.gum(0.02, compression)

    References:
      Robert et al., LDAdam, arXiv 2410.16103; Ahn et al., Dion, arXiv 2504.05295.
    """
    _checks.hyperparameter("decay", decay, below=1.0)

    def init(group: Group) -> State:
        return tuple(
            jnp.zeros(group.shape, group.dtype, device=group.sharding) for _ in group.leaves
        )

    def correct(group: Group, gradients: Leaves, state: State) -> Leaves:
        # B = G + E
        dtype = group.compute_dtype
        return [g.astype(dtype) + e.astype(dtype) for g, e in zip(gradients, state, strict=True)]

    def decode(
        frame: Frame, updates: Compressed, encoded: Compressed, gradients: Leaves, state: State
    ) -> tuple[Leaves, State]:
        # `gradients` are B, the corrected ones. E <- B - (1 - decay) P R, with R = P'B.
        kept, _ = _expand(frame, encoded, encoded, gradients, ())
        error = [b - (1.0 - decay) * k for b, k in zip(gradients, kept, strict=True)]
        # U = P D
        leaves, _ = _expand(frame, updates, encoded, gradients, ())
        return leaves, tuple(error)

    return Residual(init=init, correct=correct, decode=decode)


def _leaf_by_leaf(
    frame: Frame,
    update_of: Callable[..., jax.Array],
    low: jax.Array,
    gradients: Leaves,
    *columns: Sequence[Any],
) -> list[jax.Array]:
    """Makes the updates of a group's leaves, one after the other, in the gradients' dtypes.

    Args:
      frame: the group's bases and slots.
      update_of: ``(basis, low, *column entries) -> wide update``, for one leaf.
      low: the inner transformation's updates, ``[*lead, r, n]``.
      gradients: the leaves, for their dtypes.
      *columns: further arguments of ``update_of``, one entry for each leaf.
    """
    group = frame.group

    def one(low: jax.Array, basis: jax.Array, gradient: jax.Array, *entries: Any) -> jax.Array:
        update = update_of(basis, low, *entries)
        return _codec.wide(group, update.astype(gradient.dtype))

    lows, bases = _codec.split(group, low), _codec.split(group, frame.basis)
    return in_sequence(one, lows, bases, gradients, *columns, after=frame.after)


# (group, basis, P'G [*batch, r, n], leaf) -> wide [*batch, m, n], a part of the gradient of a leaf.
_Part: TypeAlias = Callable[[Group, jax.Array, jax.Array, Any], jax.Array]


def _sent(
    transformation: optax.GradientTransformation, update_of: Callable[..., tuple[jax.Array, State]]
) -> Residual:
    """Makes the rule that sends a part of the gradient through a transformation, leaf by leaf.

    Args:
      transformation: the transformation of the part, whose state each leaf has.
      update_of: ``(group, basis, D, R, gradient, state) -> (wide update, state)`` of one leaf.
    """

    def init(group: Group) -> State:
        shape = (*group.batch, group.m, group.n)
        # The transformation sees wide matrices, so its state is made for such.
        zeros = [jnp.zeros(shape, group.dtype, device=group.wide_sharding) for _ in group.leaves]
        return tuple(map(transformation.init, zeros))

    def decode(
        frame: Frame, updates: Compressed, encoded: Compressed, gradients: Leaves, state: State
    ) -> tuple[Leaves, State]:
        new_state = []

        def of_leaf(basis, low, *others):
            update, of_leaf_state = update_of(frame.group, basis, low, *others)
            new_state.append(of_leaf_state)
            return update

        columns = [_codec.split(frame.group, encoded.low), gradients, state]
        leaves = _leaf_by_leaf(frame, of_leaf, updates.low, gradients, *columns)
        return leaves, tuple(new_state)

    return Residual(init=init, decode=decode, reads="residual")


def _transform_of(
    name: str, transformation: optax.GradientTransformation, part: _Part = _codec.left_out
) -> Callable[..., tuple[jax.Array, State]]:
    """Returns ``transformation.update`` as a function of one leaf's gradient and projections."""
    _checks.transformation(name, transformation)
    inner: Any = optax.with_extra_args_support(transformation)

    def transform(group, basis, projected_update, projected, gradient, state):
        return inner.update(
            part(group, basis, projected, gradient), state, None,
            projected=projected, projected_update=projected_update,
        )  # fmt: skip

    return transform


def _of_slots(q: float | np.ndarray, frame: Frame) -> Any:
    """Returns the probability of each slot's matrix, ``[slots, 1, 1]``, or one for all.

    The probability of an empty slot does not matter, since its residual is zero.
    """
    if not isinstance(q, np.ndarray):
        return q
    assert frame.slots is not None
    inside = jnp.minimum(frame.slots, len(q) - 1)
    return jnp.asarray(q, frame.basis.dtype)[inside][:, None, None]


def _always_drawn(sampling: samplers.Sampling, group: Group) -> str:
    """Returns the reason for no compression if all matrices are always drawn, or ""."""
    if np.any(np.asarray(sampling.probability) < 1.0):
        return ""
    return "single matrix" if group.count == 1 else "always drawn"

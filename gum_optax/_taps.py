r"""Taps: places in a model where the backward pass compresses the gradient of a weight.

For a dense product ``y = x W`` with one token in each row, the gradient of W is
:math:`G = x^\top dy`. Its projection needs no G:

.. math::
    P^\top G = (x P)^\top dy \quad\text{(W is wide)}, \qquad
    P^\top G^\top = (dy\, P)^\top x \quad\text{(W is tall)}

There are two kinds of taps. Both leave the forward pass unchanged, and both are linear in G, so
that several uses of a weight add up, even in loops.

- `product` is a product with a weight. Its backward pass computes ``P'G`` by the formulas above, in
  2 T r (m + n) operations for T tokens instead of 2 T m n, and makes G of drawn matrices only.
- `weight` is the identity on a weight. Its backward pass receives G of this weight alone, and
  passes on the projection, a new basis or the residual. It works for every use of a weight, for
  rules that read whole residuals, and for refreshes, where the new basis comes from G.

A tap returns its results as *cotangents* of arguments that do not take part in the forward pass:
``low`` of the tap for ``P'G``, ``basis`` for a new basis, the weight itself for residuals. Slots
are an argument and a result, so that a loop over layers carries them; in the backward pass every
drawn matrix adds its G to them.

Tests: tests/library/test_backward.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gum_optax import _mesh
from gum_optax._numerics import at_least_float32
from gum_optax.projectors import Projector


class Tap(NamedTuple):
    """The data of a tap for the matrices of one leaf, or of some of its layers.

    Attributes:
      basis: P, ``[*batch, m, r]``; or codes of it with the same leading axes, see `Site`.unpack, so
        that a loop over layers unpacks one layer at a time.
      low: zeros ``[*batch, r, n]``, whose cotangent is ``P'G``; None in the backward pass.
      slot: ``int32[*batch]``, the slot that serves a matrix; the number of slots if none does.
      key: ``uint32[*batch, 2]``, for the projector at a refresh; None in other steps.
    """

    basis: Any
    low: jax.Array | None
    slot: jax.Array
    key: jax.Array | None


class Axis(NamedTuple):
    """An axis of a weight, and its place in the matrices of the leaf.

    Attributes:
      side: ``"batch"``, ``"rows"``, ``"columns"``, or ``"one"`` for other axes of length one.
      stride: the distance of neighbours along rows or columns in row-major order.
      size: the length.
    """

    side: str
    stride: int
    size: int


class Site(NamedTuple):
    """The static part of a tap: all that is known without the values of arrays.

    Attributes:
      axes: the weight's axes.
      low: shape, dtype and sharding of `Tap`.low.
      unpack: ``(codes, batch) -> [*batch, m, r]``, for bases that are codes; None: they are not.
      projector: makes the new basis from G; None: the basis is kept.
      residual: if true, the weight's cotangent is ``G - P P'G``; otherwise it is zero.
    """

    axes: tuple[Axis, ...]
    low: jax.ShapeDtypeStruct
    unpack: Callable[[Any, tuple[int, ...]], jax.Array] | None = None
    projector: Projector | None = None
    residual: bool = False

    def basis_of(self, tap: Tap) -> jax.Array:
        """Returns the basis P of a tap, ``[*batch, m, r]``."""
        return tap.basis if self.unpack is None else self.unpack(tap.basis, tap.slot.shape)


def positions(axes: tuple[Axis, ...], side: str) -> list[int]:
    """Returns the positions of the axes of one side; of rows and columns in row-major order."""
    found = [i for i, axis in enumerate(axes) if axis.side == side]
    return found if side in ("batch", "one") else sorted(found, key=lambda i: -axes[i].stride)


def length(axes: tuple[Axis, ...], side: str) -> int:
    """Returns the product of the lengths of the axes of one side."""
    return math.prod(axis.size for axis in axes if axis.side == side)


# The identity on a weight --------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weight(
    site: Site, value: jax.Array, tap: Tap, slots: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns a weight and the slots unchanged; the backward pass compresses the gradient."""
    del site, tap
    return value, slots


def _weight_forward(site: Site, value: Any, tap: Tap, slots: Any) -> Any:
    # A loop over layers stacks a copy of everything that its backward pass needs and that is not a
    # layer of a stack already. So neither the weight nor the zeros are kept, and what is returned
    # is the weight itself, not the result of an operation: layers that use it read it from their
    # stack, and no copy of the whole model is made.
    return (value, slots), tap._replace(low=None)


def _weight_backward(site: Site, tap: Tap, cotangents: Any) -> Any:
    def compress(tap: Tap, gradient: jax.Array, slots: jax.Array | None) -> Any:
        # 1. The gradient as wide matrices, in the dtype of bases: G [*batch, m, n].
        basis = site.basis_of(tap)
        order = [i for side in _SIDES for i in positions(site.axes, side)]
        shape = (*tap.slot.shape, length(site.axes, "rows"), length(site.axes, "columns"))
        tall = shape[-2] > shape[-1]
        matrices = gradient.transpose(order).reshape(shape).astype(basis.dtype)
        wide = matrices.mT if tall else matrices
        # 2. At a refresh, new bases from the gradient, one matrix after the other.
        new_basis = None
        if site.projector is not None:
            basis = new_basis = _new_basis(site.projector, wide, tap)
        # 3. R = P'G [*batch, r, n], and G of drawn matrices.
        low = basis.mT @ wide
        slots = _add_to_slots(slots, tap.slot, lambda where: wide[where])
        # 4. E = G - P R, in the axes of the weight.
        residual = jnp.zeros_like(gradient)
        if site.residual:
            left_out = wide - basis @ low
            left_out = (left_out.mT if tall else left_out).astype(gradient.dtype)
            left_out = left_out.reshape([gradient.shape[i] for i in order])
            residual = left_out.transpose(np.argsort(order).tolist())
        return residual, new_basis, low, slots

    gradient, slots = cotangents
    like_basis = None if site.projector is None else tap.basis
    residual, new_basis, low, slots = _mesh.in_auto_mode(
        compress, tap, gradient, slots, like=lambda: (gradient, like_basis, site.low, slots)
    )
    return residual, _cotangent(tap, new_basis, low), slots


weight.defvjp(_weight_forward, _weight_backward)

# The order of axes in which a weight is a batch of matrices.
_SIDES = ("one", "batch", "rows", "columns")


def _new_basis(projector: Projector, wide: jax.Array, tap: Tap) -> jax.Array:
    """Makes bases ``[*batch, m, r]`` of wide matrices ``[*batch, m, n]``, one after the other."""
    assert tap.key is not None

    def one(arguments: Any) -> jax.Array:
        key, matrix, previous = arguments
        typed = jax.random.wrap_key_data(key, impl="threefry2x32")
        return projector(typed, matrix, previous.shape[-1], previous).astype(previous.dtype)

    batch = tap.slot.ndim
    if not batch:
        return one((tap.key, wide, tap.basis))
    flat = [x.reshape(-1, *x.shape[batch:]) for x in (tap.key, wide, tap.basis)]
    return jax.lax.map(one, tuple(flat)).reshape(tap.basis.shape)


# A product with a weight ---------------------------------------------------------------------


class Product(NamedTuple):
    """The static part of a dense product of a weight and an activation.

    Attributes:
      site: the weight. The axes of one of its sides are contracted, its batch axes are batch axes
        of the product.
      side: the contracted side, ``"rows"`` or ``"columns"``.
      of_weight: the weight's position among the two operands, 0 or 1.
      dimension_numbers: the argument of ``lax.dot_general``.
      options: the other arguments of ``lax.dot_general``, in pairs of name and value.
    """

    site: Site
    side: str
    of_weight: int
    dimension_numbers: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, value: jax.Array) -> jax.Array:
        """Returns the product of an activation with the weight."""
        operands = (x, value) if self.of_weight else (value, x)
        return jax.lax.dot_general(*operands, self.dimension_numbers, **dict(self.options))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    form: Product, x: jax.Array, value: jax.Array, tap: Tap, slots: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the product, and the slots unchanged; the backward pass makes no full G."""
    del tap
    return form(x, value), slots


def _product_forward(form: Product, x: Any, value: Any, tap: Tap, slots: Any) -> Any:
    return product(form, x, value, tap, slots), (x, value, tap._replace(low=None))


def _product_backward(form: Product, kept: Any, cotangents: Any) -> Any:
    x, value, tap = kept
    dy, slots = cotangents
    # The gradient for earlier layers, as without a tap: dx = dy W'.
    (dx,) = jax.linear_transpose(lambda x: form(x, value), x)(dy)

    def compress(tap: Tap, x: jax.Array, dy: jax.Array, slots: jax.Array | None) -> Any:
        # 1. Tokens in rows: X [*batch, T, contracted side], Y [*batch, T, other side].
        X, Y = _as_tokens(form, x, dy)
        dtype = X.dtype if X.dtype == Y.dtype else at_least_float32(X.dtype, Y.dtype)
        rows, columns = (X, Y) if form.side == "rows" else (Y, X)
        # 2. G = rows' columns or its transpose is wide: short [*batch, T, m], long [*batch, T, n].
        tall = rows.shape[-1] > columns.shape[-1]
        short, long = (columns, rows) if tall else (rows, columns)
        short, long = short.astype(dtype), long.astype(dtype)
        # 3. R = (short P)' long: [*batch, T, r], then [*batch, r, n], summed in the basis' dtype.
        multiply = partial(jnp.matmul, precision=dict(form.options).get("precision"))
        basis = form.site.basis_of(tap)
        narrow = multiply(short, basis.astype(dtype))
        low = multiply(narrow.mT, long, preferred_element_type=basis.dtype)

        # 4. G itself, of drawn matrices only.
        def whole(where: tuple[jax.Array, ...]) -> jax.Array:
            return multiply(short[where].mT, long[where], preferred_element_type=basis.dtype)

        return low, _add_to_slots(slots, tap.slot, whole)

    low, slots = _mesh.in_auto_mode(
        compress, tap, x, dy, slots, like=lambda: (form.site.low, slots)
    )
    return dx, jnp.zeros_like(value), _cotangent(tap, None, low), slots


product.defvjp(_product_forward, _product_backward)


def _as_tokens(form: Product, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns an activation and the cotangent of its product with one token in each row.

    The shapes are ``[*batch, T, contracted side]`` and ``[*batch, T, other side]``, both sides in
    the row-major order of the leaf's matrices.
    """
    # 1. The numbers of `dot_general` for the activation x and for the weight w.
    axes, w = form.site.axes, form.of_weight
    contracted, batch = ((dims[1 - w], dims[w]) for dims in form.dimension_numbers)
    (x_contracted, w_contracted), (x_batch, w_batch) = contracted, batch
    batch_sizes = tuple(axes[i].size for i in positions(axes, "batch"))
    # 2. x -> [*batch, its free axes (tokens), contracted axes in row-major order]. Axes of length
    #    one may be contracted as well; their place does not matter.
    x_free = [i for i in range(x.ndim) if i not in x_contracted and i not in x_batch]
    order = sorted(range(len(w_contracted)), key=lambda k: -axes[w_contracted[k]].stride)
    partner = dict(zip(w_batch, x_batch, strict=True))
    x_batch_order = [partner[i] for i in positions(axes, "batch")]
    X = x.transpose([*x_batch_order, *x_free, *(x_contracted[k] for k in order)])
    inner = math.prod(axes[i].size for i in w_contracted)
    # 3. dy [batch axes in the product's order, free axes of lhs, free axes of rhs] -> [*batch,
    #    tokens, free axes of the weight in row-major order].
    w_free = [i for i in range(len(axes)) if i not in w_contracted and i not in w_batch]
    at_batch = {axis: k for k, axis in enumerate(w_batch)}
    first = len(w_batch)
    x_at, w_at = (first, first + len(x_free)) if w else (first + len(w_free), first)
    place = {axis: w_at + k for k, axis in enumerate(w_free)}
    Y = dy.transpose(
        [
            *(at_batch[i] for i in positions(axes, "batch")),
            *range(x_at, x_at + len(x_free)),
            *(place[i] for i in sorted(w_free, key=lambda i: -axes[i].stride)),
        ]
    )
    outer = math.prod(axes[i].size for i in w_free)
    return X.reshape(*batch_sizes, -1, inner), Y.reshape(*batch_sizes, -1, outer)


# Both ----------------------------------------------------------------------------------------


def _add_to_slots(
    slots: jax.Array | None,
    serving: jax.Array,
    gradient_at: Callable[[tuple[jax.Array, ...]], jax.Array],
) -> jax.Array | None:
    """Adds G of drawn matrices to their slots; G of other matrices is not computed.

    Args:
      slots: ``[slots, m, n]``, or None.
      serving: ``int32[*batch]``, the slot of each matrix.
      gradient_at: maps an index into the batch axes to the matrix's G [m, n].
    """
    if slots is None:
        return None
    number = slots.shape[0]
    # Conditions, not products with zero: a branch that is not taken computes no G.

    def add(slots: jax.Array, slot: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
        return slots.at[slot].add(gradient_at(where).astype(slots.dtype))

    if not serving.ndim:
        return jax.lax.cond(
            serving < number,
            lambda: add(slots, jnp.minimum(serving, number - 1), ()),
            lambda: slots,
        )

    def one(slot: jax.Array, slots: jax.Array) -> jax.Array:
        serves = serving.ravel() == slot
        where = jnp.unravel_index(jnp.argmax(serves), serving.shape)
        return jax.lax.cond(jnp.any(serves), lambda: add(slots, slot, where), lambda: slots)

    return jax.lax.fori_loop(0, number, one, slots)


def _cotangent(tap: Tap, basis: jax.Array | None, low: jax.Array) -> Tap:
    """Returns the cotangent of a tap; without a new basis, zero for the basis."""

    def zero(array: jax.Array) -> Any:
        # Integers have cotangents without values.
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros_like(array)
        return np.zeros(array.shape, jax.dtypes.float0)

    zeros: Tap = jax.tree.map(zero, tap._replace(low=None))
    return zeros._replace(low=low) if basis is None else zeros._replace(basis=basis, low=low)

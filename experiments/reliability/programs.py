"""Random small models, whose gradients compressed in the backward pass are checked.

A model is a sequence of uses of a few weights, each use of a random kind: in dense products from
either side, tied and shared, cast, reshaped to heads, in loops over layers or with one weight in
all turns, in branches, recomputed, mapped over tokens, or elementwise. However
`gum_optax.backward` follows a weight, its projected gradients must be the projections of its
gradients.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from gum_optax import LowRank, backward, residuals

NARROW, WIDE, LAYERS, TOKENS, RANK = 4, 6, 3, 5, 2
# Relative tolerances. Compressed gradients are summed in another order, in float64, or in float32
# where a model casts to it. Measured over 60 models: 5e-16 and 1e-7.
FLOAT64, FLOAT32 = 1e-13, 1e-5


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight.

    Attributes:
      kind: a name in `KINDS`.
      weight: the index of a separate weight, or of a layer of the stack.
      wrap: a name in `WRAPS`: the program around the use.
      cast: whether the weight is cast to float32 first.
    """

    kind: str
    weight: int
    wrap: str
    cast: bool


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of separate weights, two square ones and a stack, and a residual rule.

    Attributes:
      uses: in their order, each a residual block.
      weights: the number of separate weights.
      rule: "drop", or the form of `residuals.sampled`, or "through", which reads whole residuals.
      seed: of weights and tokens.
    """

    uses: tuple[Use, ...]
    weights: int
    rule: str
    seed: int


# Every kind maps x [TOKENS, NARROW] to an array of the same shape; `get` casts a weight.


def _dense(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """From narrow to wide by W and back by its transpose, a weight tied with itself."""
    w = get(params["w"][use.weight])
    return jnp.tanh(x @ w) @ w.T


def _square(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """A square weight, whose shape does not tell its sides apart; odd ones are transposed."""
    w = get(params["square"][use.weight % 2])
    return x @ (w.T if use.weight % 2 else w)


def _heads(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """A weight reshaped to two heads, ``[NARROW, 2, WIDE / 2]``."""
    w = get(params["w"][use.weight]).reshape(NARROW, 2, WIDE // 2)
    return jnp.einsum("the,dhe->td", jnp.tanh(jnp.einsum("td,dhe->the", x, w)), w)


def _loop(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """A scan over the layers of the stack, forwards or backwards."""

    def layer(x: Any, w: Any) -> Any:
        return x + jnp.tanh(x @ get(w)) @ get(w).T, None

    return jax.lax.scan(layer, x, params["stack"], reverse=bool(use.weight % 2))[0]


def _turns(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """A scan of two turns with the same weight, whose gradients add up."""
    w = params["w"][use.weight]
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ get(w)) @ get(w).T, None), x, length=2)[0]


def _layer(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """One layer, sliced from the stack."""
    w = get(params["stack"][use.weight % LAYERS])
    return jnp.tanh(x @ w) @ w.T


def _experts(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """All layers of the stack at once, as experts; `einsum` or batched product."""
    w = get(params["stack"])  # [LAYERS, NARROW, WIDE]
    hidden = jnp.einsum("td,ldf->ltf", x, w) if use.weight % 2 else jnp.stack([x] * LAYERS) @ w
    return jnp.einsum("ltf,ldf->td", jnp.tanh(hidden), w)


def _elementwise(x: Any, params: Any, use: Use, get: Callable) -> Any:
    """A use that is no product, beside which the weight cannot be compressed."""
    return x * jnp.sum(get(params["w"][use.weight]) ** 2)


KINDS = {
    "dense": _dense, "square": _square, "heads": _heads, "loop": _loop, "turns": _turns,
    "layer": _layer, "experts": _experts, "elementwise": _elementwise,
}  # fmt: skip

# Programs around a use, through which the weight must be followed.
WRAPS: dict[str, Callable[[Callable], Callable]] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "each token": lambda f: lambda x, params: jax.vmap(f, (0, None))(x[:, None], params)[:, 0],
    "branch": lambda f: (
        lambda x, params: jax.lax.cond(
            x[0, 0] > 0, lambda: f(x, params), lambda: 2.0 * f(x, params)
        )
    ),
}


@st.composite
def models(draw: Callable, uses: int = 4) -> Model:
    """Draws models with at most `uses` uses."""
    weights = draw(st.integers(2, 4))
    use = st.builds(
        Use,
        kind=st.sampled_from([*KINDS]),
        weight=st.integers(0, weights - 1),
        wrap=st.sampled_from([*WRAPS]),
        cast=st.sampled_from([False, False, False, True]),
    )
    # Few weights and many uses: most weights are shared.
    return Model(
        uses=tuple(draw(st.lists(use, min_size=1, max_size=uses))),
        weights=weights,
        rule=draw(st.sampled_from(["drop", "exclusive", "additive", "through"])),
        seed=draw(st.integers(0, 2**16)),
    )


def parameters(model: Model) -> Any:
    """Draws the weights of a model, float64 NumPy."""
    rng = np.random.default_rng(model.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / 2

    return {
        "w": [normal(NARROW, WIDE) for _ in range(model.weights)],
        "square": [normal(NARROW, NARROW) for _ in range(2)],
        "stack": normal(LAYERS, NARROW, WIDE),
    }


def loss_of(model: Model) -> Callable[[Any, Any], Any]:
    """Returns the model's loss, a function of parameters and tokens ``[TOKENS, NARROW]``."""

    def loss(params: Any, x: Any) -> Any:
        for use in model.uses:
            # Default arguments bind this turn's values; a closure would see the last turn's.
            get = lambda w, c=use.cast: w.astype(jnp.float32) if c else w  # noqa: E731
            apply = functools.partial(KINDS[use.kind], use=use, get=get)
            out = WRAPS[use.wrap](lambda x, params, f=apply: f(x, params))(x, params)
            x = x + out.astype(x.dtype)
        return jnp.mean(x**2)

    return loss


def _columns(key: Any, gradient: Any, rank: int, previous_basis: Any) -> Any:
    """A projector that depends on the gradient and compiles quickly.

    The basis of a zero gradient is zero, as `backward.refresh` makes it for a weight without use.
    Bases are not orthonormal, but of no larger norm, so that ``G - P P'G`` does not magnify
    rounding.
    """
    unit = gradient / (jnp.sqrt(jnp.sum(gradient**2)) + jnp.finfo(gradient.dtype).tiny)
    return unit[:, :rank] + 0.5 * previous_basis


def check(model: Model, **options: Any) -> float:
    """Compares gradients compressed in the backward pass with compressed full gradients.

    Args:
      model: the model.
      **options: of ``jax.jit``.

    Returns:
      The largest difference, relative to the largest number of its array where that exceeds one.

    Raises:
      AssertionError: a basis, a projection, a residual or an update differs.
    """
    rule = {
        "drop": residuals.drop,
        "through": lambda: residuals.through(optax.trace(0.5)),
    }.get(model.rule, lambda: residuals.sampled(1, form=model.rule))  # pyright: ignore[reportArgumentType]
    # Momentum inside, so that a step depends on the state too.
    tx = gum_optax.low_rank(optax.trace(0.9), LowRank(RANK, 2, rule(), _columns))
    loss, x = loss_of(model), np.random.default_rng(model.seed + 1).normal(size=(TOKENS, NARROW))

    def both(params: Any, state: Any) -> Any:
        # 1. The standard step: full gradients, compressed by the optimizer.
        value, full = jax.value_and_grad(loss)(params, x)
        standard = tx.update(full, state, params)
        # 2. The compressed step: a refresh of the bases, then the backward pass.
        renewed = backward.refresh(loss, tx)(params, state, x)
        own_value, compressed = backward.value_and_grad(loss, tx)(params, renewed, x)
        return (value, *standard), (own_value, *tx.update(compressed, renewed, params))

    # 3. Both in one program, in float64.
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, parameters(model))
        expected, found = jax.jit(both, **options)(params, tx.init(params))
    # 4. Compare loss, updates and new state, array by array.
    tolerance = FLOAT32 if any(use.cast for use in model.uses) else FLOAT64
    paths, largest = jax.tree_util.tree_flatten_with_path(expected)[0], 0.0
    for (path, want), got in zip(paths, jax.tree.leaves(found), strict=True):
        difference = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
        error = np.max(difference, initial=0) / np.max(np.abs(np.asarray(want, float)), initial=1)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} differs by {error:.1e}: {model}"
        largest = max(largest, float(error))
    return largest

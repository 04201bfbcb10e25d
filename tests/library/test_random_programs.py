"""Random programs: whatever is built from products, loops and wrappers has projected gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.library.test_interception import SEPARATE, STACKED, TOKENS, check

Block = Callable[[Any, Any], Any]
"""``(params, h) -> h``, with h [tokens, 6].

The parameters have separate matrices [6, 9], and stacks of four layers, [4, 6, 9] and [4, 9, 6].
"""


# Uses of one separate matrix, w [6, 9] --------------------------------------------------------


def _tied(w, h):
    return h + jnp.tanh(h @ w) @ w.T


def _heads(w, h):
    out = jnp.einsum("td,dhe->the", h, w.reshape(6, 3, 3))
    return h + jnp.einsum("the,hed->td", jnp.tanh(out), w.T.reshape(3, 3, 6))


def _slice(w, h):
    return h + (h[:, :3] @ w[:3]) @ w.T


def _lookup(w, h):
    return h + w[np.arange(len(h)) % 6][:, :6]


def _scale(w, h):
    return h * (1 + jnp.mean(w**2))


MATRIX = {use.__name__: use for use in (_tied, _heads, _slice, _lookup, _scale)}


# Uses of the stacks ---------------------------------------------------------------------------


def _layer(h, w):
    return h + jnp.tanh(h @ w["up"]) @ w["down"], None


def _scan(stacks, h):
    return jax.lax.scan(_layer, h, stacks)[0]


def _recomputed(stacks, h):
    return jax.lax.scan(jax.checkpoint(_layer), h, stacks)[0]


def _backwards(stacks, h):
    return jax.lax.scan(_layer, h, stacks, reverse=True)[0]


def _unrolled(stacks, h):
    for i in range(len(stacks["up"])):
        h, _ = _layer(h, jax.tree.map(lambda w, i=i: w[i], stacks))
    return h


def _halves(stacks, h):
    h = _scan(jax.tree.map(lambda w: w[2:], stacks), h)
    return _recomputed(jax.tree.map(lambda w: w[:2], stacks), h)


def _mean(stacks, h):
    return h + jnp.tanh(h @ stacks["up"].mean(0)) @ stacks["down"].mean(0)


STACKS = {use.__name__: use for use in (_scan, _recomputed, _backwards, _unrolled, _halves, _mean)}


# Wrappers of a block --------------------------------------------------------------------------


def _twice(block: Block) -> Block:
    """One jitted function, called twice: JAX traces it once."""
    jitted = jax.jit(block)
    return lambda params, h: jitted(params, jitted(params, h))


def _in_turns(block: Block) -> Block:
    return lambda params, h: jax.lax.scan(lambda h, _: (block(params, h), None), h, length=2)[0]


def _branch(block: Block) -> Block:
    return lambda params, h: jax.lax.cond(h[0, 0] > 9, lambda p, h: h, block, params, h)


def _by_token(block: Block) -> Block:
    return lambda params, h: jax.vmap(lambda row: block(params, row[None])[0])(h)


WRAPPERS: dict[str, Callable[[Block], Block]] = {
    "plain": lambda block: block,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit, checkpoint": lambda block: jax.jit(jax.checkpoint(block)),
    "twice": _twice,
    "in turns": _in_turns,
    "branch": _branch,
    "by token": _by_token,
}


def _block(matrix: int | None, use: str) -> Block:
    if matrix is None:
        return lambda params, h: STACKS[use]({k: params[k] for k in ("up", "down")}, h)
    return lambda params, h: MATRIX[use](params["separate"][matrix], h)


BLOCKS = st.one_of(
    st.tuples(st.integers(0, len(SEPARATE) - 1), st.sampled_from(list(MATRIX))),
    st.tuples(st.none(), st.sampled_from(list(STACKS))),
)
PROGRAMS = st.lists(
    st.tuples(BLOCKS, st.lists(st.sampled_from(list(WRAPPERS)), max_size=2)), min_size=1, max_size=3
)


def _check(program: Any) -> None:
    # A weight without any use has a basis of zeros after a refresh, so that none may be left over.
    used = {matrix for (matrix, _), _ in program}
    params = (STACKED if None in used else {}) | ({"separate": SEPARATE} if used - {None} else {})

    def loss(params: Any, x: Any) -> jax.Array:
        h = x
        for (matrix, use), wrappers in program:
            block = _block(matrix, use)
            for name in wrappers:
                block = WRAPPERS[name](block)
            h = block(params, h)
        others = [w for i, w in enumerate(params.get("separate", [])) if i not in used]
        return jnp.sum(jnp.tanh(h) ** 2) + sum(jnp.sum((x @ w) ** 2) for w in others)

    with jax.enable_x64(True):
        check(loss, params, TOKENS)


# An example takes seconds to compile, so that a search for a smaller one would take minutes.
PHASES = [phase for phase in Phase if phase is not Phase.shrink]


@pytest.mark.filterwarnings("ignore:.*compressed leaves have uses other than dense products")
@settings(max_examples=3, phases=PHASES)
@given(program=PROGRAMS)
def test_a_random_program(program):
    _check(program)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*compressed leaves have uses other than dense products")
@settings(max_examples=60, phases=PHASES)
@given(program=PROGRAMS)
def test_many_random_programs(program):
    _check(program)

"""Random examples for `experiments.fuzz`: trees of leaves, optimizers, options, gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from gum_optax import projectors, samplers


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Example:
    """An optimizer, its arguments, a tree of `Leaf`s, and how large the gradients are."""

    optimizer: str
    options: dict[str, Any]
    tree: Any
    size: str
    other_dtype: bool
    flaw: str | None


# Few distinct shapes, so that compiled operations are met again.
MATRICES = [(1, 1), (1, 4), (3, 5), (5, 3), (4, 4), (2, 3, 5), (3, 4, 4), (2, 2, 5, 3), (0, 4)]
OTHERS = [(), (4,), (0,)]  # no matrices: for whole optimizers, which have a fallback
DTYPES = ["float32", "bfloat16", "float16"]
WHOLE_DTYPES = DTYPES[:2]  # in float16 the `eps` of optax's AdamW is 0, and 0 / 0 not finite
NAMES = ["layers", "q", "w", "block_1", "block_2", "embed"]
SIZES = ["ordinary", "zero", "huge", "tiny", "mixed", "rank one"]
PROJECTORS = [
    projectors.svd,
    projectors.subspace_iteration,
    projectors.randomized_svd,
    projectors.random_orthonormal,
    projectors.switch(projectors.svd, projectors.random_orthonormal, 2),
]
BASES: dict[str, optax.GradientTransformation] = {
    "identity": optax.identity(),
    "trace": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "adamw": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "lion": optax.scale_by_lion(),
}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


def _low_rank(base: str, **options: Any) -> optax.GradientTransformation:
    return gum_optax.low_rank(BASES[base], **options)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "low_rank": _low_rank,
    "scale_by_gum": gum_optax.scale_by_gum,
    "gum": gum_optax.gum,
    "galore": gum_optax.galore,
    "golore": gum_optax.golore,
    "unbiased_adamw": gum_optax.unbiased_adamw,
}
ENGINES = ("low_rank", "scale_by_gum")  # every leaf is a matrix

some_samplers = st.one_of(
    st.integers(0, 3).map(samplers.fixed_size),
    st.sampled_from([0.3, 0.7]).map(samplers.bernoulli),
    st.just(samplers.none),
)
common = {
    "rank": st.integers(1, 5),
    "period": st.integers(1, 3),
    "stack_by": st.sampled_from([gum_optax.by_role, gum_optax.by_shape]),
    "momentum_dtype": st.sampled_from([None, "float32", "bfloat16"]),
    "key": st.integers(0, 2**31 - 1),
}
drawing = {"projector": st.sampled_from(PROJECTORS), "sampler": some_samplers}
muon = drawing | {"restart": st.booleans(), "nesterov": st.booleans()}
whole = {
    "learning_rate": st.sampled_from([0.1, SCHEDULE]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "weight_dimension_numbers": st.just(gum_optax.dimension_numbers.scanned_layers),
}
OPTIONS = {
    "low_rank": common | drawing | {"restart": st.booleans(), "base": st.sampled_from([*BASES])},
    "scale_by_gum": common | muon,
    "gum": common | whole | muon | {"consistent_rms": st.sampled_from([None, 0.2])},
    "galore": common | whole | {"projector": st.sampled_from(PROJECTORS)},
    "golore": common | whole | {"switch_step": st.integers(0, 3)},
    "unbiased_adamw": common | whole | drawing | {"restart": st.booleans()},
}

# flaw -> what is wrong with the options, or with one leaf of an engine's tree; and what is named.
BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 0},
    "period": {"period": 1.5},
    "key": {"key": None},
    "momentum_dtype": {"momentum_dtype": "int32"},
    "stack_by": {"stack_by": "role"},
}
BAD_LEAVES = {
    "a vector": Leaf((3,), "float32"),
    "a scalar": Leaf((), "float32"),
    "integers": Leaf((3, 5), "int32"),
    "complex numbers": Leaf((3, 5), "complex64"),
}
OTHER_GRADIENTS = "gradients of other shapes"


def trees(shapes: list[tuple[int, ...]], dtypes: list[str]) -> st.SearchStrategy:
    """Trees like those of models: leaves, blocks of named leaves, layers of equal blocks, None."""
    leaf = st.builds(Leaf, st.sampled_from(shapes), st.sampled_from(dtypes))
    some = st.one_of(leaf, leaf, leaf, st.none())
    block = st.dictionaries(st.sampled_from(NAMES), some, min_size=1, max_size=4)
    layers = st.tuples(st.one_of(leaf, block), st.integers(2, 5)).map(lambda x: [x[0]] * x[1])
    part = st.one_of(some, block, layers, layers, st.lists(leaf, max_size=4))
    parts = st.one_of(part, st.dictionaries(st.sampled_from(NAMES), part, min_size=1, max_size=3))
    return st.dictionaries(st.sampled_from(NAMES), parts, max_size=5)


@st.composite
def examples(draw: Callable) -> Example:
    """Examples, about one in eight with a flaw."""
    name = draw(st.sampled_from([*OPTIMIZERS]))
    options = draw(st.fixed_dictionaries(OPTIONS[name]))
    engine = name in ENGINES
    tree = draw(trees(MATRICES, DTYPES) if engine else trees(MATRICES + OTHERS, WHOLE_DTYPES))
    flaw = None
    if draw(st.sampled_from([False] * 7 + [True])):
        leaves = [*BAD_LEAVES] if engine else []
        flaw = draw(st.sampled_from([*BAD_OPTIONS, *leaves, OTHER_GRADIENTS]))
    if flaw == OTHER_GRADIENTS:
        tree |= {"changing": Leaf((3, 5), "float32")}
    elif flaw in BAD_LEAVES:
        tree |= {"flawed": BAD_LEAVES[flaw]}
    options |= BAD_OPTIONS.get(flaw or "", {})
    size, other_dtype = draw(st.sampled_from(SIZES)), draw(st.booleans())
    return Example(name, options, tree, size, other_dtype, flaw)


def arrays(tree: Any, size: str, seed: int, other: bool = False) -> Any:
    """The tree's arrays; `other` gives float32 for lower precision and bfloat16 for float32."""
    rng = np.random.default_rng(seed)

    def array(leaf: Leaf) -> jax.Array:
        swapped = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
        dtype = swapped.get(leaf.dtype, leaf.dtype) if other else leaf.dtype
        values = rng.standard_normal(leaf.shape)
        if size == "rank one" and len(leaf.shape) > 1:
            values = values[..., :1] * values[..., :1, :]
        return jnp.asarray(values * _scale(size, leaf, rng), dtype)

    return jax.tree.map(array, tree)


def _scale(size: str, leaf: Leaf, rng: np.random.Generator) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return 1
    # Of the narrower of the two dtypes a gradient may have: 1e28 and 1e-28, or 1e3 and 1e-3.
    huge = float(jnp.finfo(leaf.dtype).max) ** 0.75
    return {
        "zero": 0.0,
        "huge": huge,
        "tiny": 1 / huge,
        "mixed": rng.choice([0.0, 1.0, huge, 1 / huge], leaf.shape),
    }.get(size, 1.0)

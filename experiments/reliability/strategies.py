"""Random trees of parameters, optimizers, compressions and gradients, for `fuzz`.

An example is a description. Parts whose objects have no stable text, such as residual rules, are
described by names and made when the example runs, so that equal examples have equal texts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gum_optax
from gum_optax import carries, projectors, residuals, samplers, storages


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter, described by its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Example:
    """An optimizer with a compression, a tree of parameters, and the size of gradients.

    Attributes:
      optimizer: a name in `OPTIMIZERS`.
      options: its arguments beside the compression.
      parts: the arguments of `compression`.
      tree: the parameters, a tree of `Leaf`.
      size: of the gradients, a name in `SIZES`.
      other_dtype: whether gradients have another dtype than parameters.
      flaw: None, or the name of the one flaw for which the example must be refused.
    """

    optimizer: str
    options: dict[str, Any]
    parts: dict[str, Any]
    tree: Any
    size: str
    other_dtype: bool
    flaw: str | None


# Few distinct shapes, so that compiled operations are reused: tall, wide and square matrices, and
# stacks with one and two axes in front.
MATRICES = [(1, 1), (1, 4), (3, 5), (5, 3), (4, 4), (2, 3, 5), (3, 4, 4), (2, 2, 5, 3), (0, 4)]
OTHERS = [(), (4,), (0,)]  # no matrices: for whole optimizers, which have a fallback
DTYPES = ["float32", "bfloat16", "float16"]
WHOLE_DTYPES = DTYPES[:2]  # in float16 the `eps` of optax's AdamW rounds to 0, and 0 / 0 is NaN
NAMES = ["layers", "q", "w", "block_1", "block_2", "embed"]
SIZES = ["ordinary", "zero", "huge", "tiny", "mixed", "rank one"]
PROJECTORS = [
    projectors.svd,
    projectors.subspace_iteration,
    projectors.randomized_svd,
    projectors.random_orthonormal,
    projectors.grassmann(),
    projectors.switch(projectors.svd, projectors.random_orthonormal, 2),
]
INNERS: dict[str, optax.GradientTransformation] = {
    "identity": optax.identity(),
    "trace": optax.trace(0.9),
    "adam": optax.scale_by_adam(),
    "adamw": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    "lion": optax.scale_by_lion(),
}
# Inner transformations and optimizers whose second moment cannot be rotated into another basis.
SQUARES = ("adam", "adamw", "quantized adamw")
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)

# Transformations of residuals: without state, with a state of every leaf, and one that reads the
# projected gradient as well.
TRANSFORMS: dict[str, optax.GradientTransformation | None] = {
    "nothing": None,
    "columns": gum_optax.normalize_columns(),
    "trace": optax.trace(0.9),
    "gain": gum_optax.scale_by_gain(),
}
STORAGES: dict[str, storages.Storage] = {
    "plain": storages.plain(),
    "float32": storages.cast("float32"),
    "bfloat16": storages.cast("bfloat16"),
    # Blocks so small that even these matrices have several.
    "int8": storages.int8(4),
    "int4": storages.int4(2),
    "bfloat16 at random": storages.at_random(storages.cast("bfloat16")),
    "int8 at random": storages.at_random(storages.int8(4), 3),
}
IN_FEW_BITS = ("int8", "int4", "int8 at random")
SAMPLERS: dict[str, int | samplers.Sampler] = {
    "0": 0, "1": 1, "2": 2, "3": 3, "none": samplers.none,
    "bernoulli 0.3": samplers.bernoulli(0.3), "bernoulli 0.7": samplers.bernoulli(0.7),
}  # fmt: skip


def half(group: gum_optax.Group) -> int:
    """A rank that depends on the shape."""
    return max(group.m // 2, 1)


def by_name(group: gum_optax.Group) -> int:
    """A rank that depends on the group's name, from 1 to 4; at 4 some groups are uncompressed."""
    return 1 + len(group.name) % 4


def residual(rule: Any) -> Any:
    """Makes a residual rule from its description, ``(name, *options)``.

    Anything else is a flawed argument and is returned unchanged.
    """
    if not isinstance(rule, tuple):
        return rule
    name, *options = rule
    if name == "sampled":
        sampler, form, undrawn = options
        return residuals.sampled(SAMPLERS[sampler], form=form, undrawn=TRANSFORMS[undrawn])
    if name in ("through", "guided"):
        return getattr(residuals, name)(TRANSFORMS[options[0]])
    return getattr(residuals, name)(*options)


def compression(method: str, **parts: Any) -> gum_optax.LowRank:
    """Makes a `LowRank`, by its own name or a paper's, with rule and storage from descriptions."""
    make: Any = {"LowRank": gum_optax.LowRank, **{n: getattr(gum_optax, n) for n in PAPERS}}
    storage = parts.pop("storage")
    if isinstance(storage, str):
        # An unknown name belongs to a flaw: a dtype that no state may have.
        storage = STORAGES[storage] if storage in STORAGES else storages.cast(storage)
    if "residual" in parts:
        parts["residual"] = residual(parts["residual"])
    return make[method](storage=storage, **parts)


def _low_rank(compression: gum_optax.LowRank, inner: str) -> optax.GradientTransformationExtraArgs:
    return gum_optax.low_rank(INNERS[inner], compression)


def _for_matrices(
    compression: gum_optax.LowRank, inner: str, **options: Any
) -> optax.GradientTransformationExtraArgs:
    return gum_optax.for_matrices(_low_rank(compression, inner), **options)


def _quantized(compression: gum_optax.LowRank, **options: Any) -> optax.GradientTransformation:
    return gum_optax.quantized(
        gum_optax.adamw(compression=compression, **options), storages.int8(4), smallest=0
    )


def _muon(compression: gum_optax.LowRank, **options: Any) -> optax.GradientTransformation:
    """Full-rank Muon; only the storage of the compression is used."""
    momentum = gum_optax.quantized(optax.trace(0.9), compression.storage, smallest=0)
    return gum_optax.for_matrices(
        optax.chain(momentum, gum_optax.scale_by_polar()),
        fallback=gum_optax.fallbacks.factored(),
        **options,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "low_rank": _low_rank,
    "scale_by_gum": gum_optax.scale_by_gum,
    "gum": gum_optax.gum,
    "adamw": gum_optax.adamw,
    "for_matrices": _for_matrices,
    "quantized adamw": _quantized,
    "muon in few bits": _muon,
}
DIRECTIONS = ("low_rank", "scale_by_gum")  # without a fallback: every leaf must be a matrix

# The arguments of each optimizer beside the compression, as strategies.

inner = {"inner": st.sampled_from([*INNERS])}
muon = {"nesterov": st.booleans()}
whole = {
    "learning_rate": st.sampled_from([0.1, SCHEDULE]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "weight_dimension_numbers": st.just(gum_optax.dimension_numbers.scanned_layers),
}
OPTIONS = {
    "low_rank": inner,
    "scale_by_gum": muon,
    "gum": whole | muon | {"consistent_rms": st.sampled_from([None, 0.2])},
    "adamw": whole | {"b1": st.sampled_from([0.0, 0.9])},
    "for_matrices": whole | inner,
    "quantized adamw": whole,
    "muon in few bits": whole,
}

# Descriptions of residual rules, for `residual`. Sampling is drawn twice as often as each other
# kind.
_sampled = st.tuples(
    st.just("sampled"),
    st.sampled_from([*SAMPLERS]),
    st.sampled_from(["exclusive", "additive"]),
    st.sampled_from(["nothing", *TRANSFORMS]),
)
_sent = st.tuples(st.sampled_from(["through"]), st.sampled_from(["columns", "trace", "gain"]))
_rules = st.one_of(
    _sampled,
    _sampled,
    _sent,
    st.sampled_from([("drop",), ("guided", "gain")]),
    st.sampled_from([("feedback", 0.0), ("feedback", 0.9)]),
)
common = {
    "rank": st.one_of(st.integers(1, 5), st.sampled_from([half, by_name])),
    "period": st.integers(1, 3),
    "storage": st.sampled_from([*STORAGES]),
    "group_by": st.sampled_from([gum_optax.by_role, gum_optax.by_shape]),
    "key": st.integers(0, 2**31 - 1),
}
# Second moments cannot be rotated; `projection_aware` is the carry that estimates them.
CARRIES = [carries.restart, carries.keep, carries.rotate]
_OF_MOMENTS = carries.projection_aware()
PAPERS = ("galore", "golore", "fira", "frugal", "apollo")
PARTS = {
    "LowRank": common
    | {"method": st.just("LowRank"), "residual": _rules}
    | {"projector": st.sampled_from(PROJECTORS), "carry": st.sampled_from(CARRIES)},
    **{name: common | {"method": st.just(name)} for name in ("fira", "frugal", "apollo")},
    "galore": common | {"method": st.just("galore")},
    "golore": common | {"method": st.just("golore"), "switch_step": st.integers(0, 3)},
}

# Flaw -> the wrong part of the compression, or the wrong leaf of a direction's tree. Each error
# must name the flaw.
BAD_PARTS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 0},
    "period": {"period": 1.5},
    "key": {"key": None},
    "dtype": {"storage": "int32"},
    "storage": {"storage": None},
    "carry": {"carry": "keep"},
    "residual": {"residual": None},
    "group_by": {"group_by": "role"},
}
BAD_LEAVES = {
    "a vector": Leaf((3,), "float32"),
    "a scalar": Leaf((), "float32"),
    "integers": Leaf((3, 5), "int32"),
    "complex numbers": Leaf((3, 5), "complex64"),
}
OTHER_GRADIENTS = "gradients of other shapes"


def trees(shapes: list[tuple[int, ...]], dtypes: list[str], parts: int) -> st.SearchStrategy:
    """Draws trees like models': leaves, blocks of named leaves, lists of equal layers, and None.

    Args:
      shapes: of leaves.
      dtypes: of leaves.
      parts: the largest number of parts at the root.
    """
    # Repetitions weigh the choices: three leaves for each None, and twice as many lists of layers.
    leaf = st.builds(Leaf, st.sampled_from(shapes), st.sampled_from(dtypes))
    some = st.one_of(leaf, leaf, leaf, st.none())
    block = st.dictionaries(st.sampled_from(NAMES), some, min_size=1, max_size=4)
    layers = st.tuples(st.one_of(leaf, block), st.integers(2, 5)).map(lambda x: [x[0]] * x[1])
    part = st.one_of(some, block, layers, layers, st.lists(leaf, max_size=4))
    some_parts = st.dictionaries(st.sampled_from(NAMES), part, min_size=1, max_size=3)
    return st.dictionaries(st.sampled_from(NAMES), st.one_of(part, some_parts), max_size=parts)


@st.composite
def examples(draw: Callable, parts_of_tree: int = 5) -> Example:
    """Draws examples, about one in eight of which has a flaw.

    Args:
      draw: given by Hypothesis.
      parts_of_tree: the largest number of parts of a tree.
    """
    # 1. An optimizer and a compression; half of the compressions are a paper's.
    name = draw(st.sampled_from([*OPTIMIZERS]))
    options = draw(st.fixed_dictionaries(OPTIONS[name]))
    method = draw(st.sampled_from([*["LowRank"] * len(PAPERS), *PAPERS]))
    parts = draw(st.fixed_dictionaries(PARTS[method]))
    squares = name in SQUARES or options.get("inner") in SQUARES
    if squares and parts.get("carry") is carries.rotate:
        parts["carry"] = _OF_MOMENTS
    # 2. Parameters: matrices alone for directions, all kinds of leaves for whole optimizers.
    direction = name in DIRECTIONS
    kinds = (MATRICES, DTYPES) if direction else (MATRICES + OTHERS, WHOLE_DTYPES)
    tree = draw(trees(*kinds, parts_of_tree))
    # 3. At most one flaw, so that it is known which error must come.
    flaw = None
    if draw(st.sampled_from([False] * 7 + [True])):
        leaves = [*BAD_LEAVES] if direction else []
        flaw = draw(st.sampled_from([*BAD_PARTS, *leaves, OTHER_GRADIENTS]))
    if flaw == OTHER_GRADIENTS:
        tree |= {"changing": Leaf((3, 5), "float32")}
    elif flaw in BAD_LEAVES:
        tree |= {"flawed": BAD_LEAVES[flaw]}
    parts |= BAD_PARTS.get(flaw or "", {})
    # 4. Gradients.
    size, other_dtype = draw(st.sampled_from(SIZES)), draw(st.booleans())
    few_bits = parts["storage"] in IN_FEW_BITS or "quantized" in name or "few bits" in name
    if few_bits and size in ("huge", "mixed"):
        size = "ordinary"  # squares that overflow spoil their whole block, as documented
    return Example(name, options, parts, tree, size, other_dtype, flaw)


def arrays(tree: Any, size: str, seed: int, other: bool = False) -> Any:
    """Draws the arrays of a tree.

    Args:
      tree: of `Leaf`.
      size: a name in `SIZES`.
      seed: of the numbers.
      other: swaps dtypes: float32 for lower precision, bfloat16 for float32.
    """
    rng = np.random.default_rng(seed)

    def array(leaf: Leaf) -> jax.Array:
        swapped = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
        dtype = swapped.get(leaf.dtype, leaf.dtype) if other else leaf.dtype
        values = rng.standard_normal(leaf.shape)
        if size == "rank one" and len(leaf.shape) > 1:
            values = values[..., :1] * values[..., :1, :]  # a column times a row
        # Rounded by NumPy and then transferred: `jnp.asarray` compiles a program for each shape.
        return jax.device_put((values * _scale(size, leaf, rng)).astype(jnp.dtype(dtype)))

    return jax.tree.map(array, tree)


def _scale(size: str, leaf: Leaf, rng: np.random.Generator) -> Any:
    """Returns the factor of a leaf's numbers, one for all or one for each."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return 1
    # Within the narrower of the two dtypes that a gradient may have: about 1e28 and 1e-28, in
    # float16 1e3 and 1e-3.
    huge = float(jnp.finfo(leaf.dtype).max) ** 0.75
    return {
        "zero": 0.0,
        "huge": huge,
        "tiny": 1 / huge,
        "mixed": rng.choice([0.0, 1.0, huge, 1 / huge], leaf.shape),
    }.get(size, 1.0)

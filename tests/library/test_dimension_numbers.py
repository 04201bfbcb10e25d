"""The choice of matrices by names and shapes of real models, and ways to override it."""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gum_optax
from gum_optax import dimension_numbers
from tests.helpers import QUICK, first_coordinates, tree_of

MuonDims = optax.contrib.MuonDimensionNumbers
LAST_TWO = MuonDims(-2, -1)
RANK_2 = gum_optax.LowRank(rank=2, residual=gum_optax.residuals.drop(), projector=first_coordinates)
D, F, V, L, H, E = 8, 16, 32, 3, 2, 4


def _matrices(params, numbers):
    """The paths that are matrices under a tree of numbers."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    is_leaf = lambda x: x is None or isinstance(x, MuonDims)  # noqa: E731
    chosen = jax.tree.leaves(numbers, is_leaf=is_leaf)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
        for (path, _), number in zip(flat, chosen, strict=True)
        if number is not None
    }


# scheme -> (matrices, everything else).
SCHEMES = {
    "GPT-2 in Flax": (
        {
            "h/0/attn/c_attn/kernel": (3 * D, D),
            "h/0/attn/c_proj/kernel": (D, D),
            "h/0/mlp/c_fc/kernel": (F, D),
            "h/0/mlp/c_proj/kernel": (D, F),
        },
        {
            "wte/embedding": (V, D),
            "wpe/embedding": (L, D),
            "h/0/attn/c_attn/bias": (3 * D,),
            "h/0/ln_1/scale": (D,),
            "h/0/ln_1/bias": (D,),
            "ln_f/scale": (D,),
        },
    ),
    "LLaMA on the hub": (
        {
            "model/layers/0/self_attn/q_proj/kernel": (D, D),
            "model/layers/0/self_attn/k_proj/kernel": (D, D // 2),
            "model/layers/0/self_attn/v_proj/kernel": (D, D // 2),
            "model/layers/0/self_attn/o_proj/kernel": (D, D),
            "model/layers/0/mlp/gate_proj/kernel": (D, F),
            "model/layers/0/mlp/up_proj/kernel": (D, F),
            "model/layers/0/mlp/down_proj/kernel": (F, D),
        },
        {
            "model/embed_tokens/embedding": (V, D),
            "model/layers/0/input_layernorm/weight": (D,),
            "model/layers/0/post_attention_layernorm/weight": (D,),
            "model/norm/weight": (D,),
            "lm_head/kernel": (D, V),
        },
    ),
    "stacked LLaMA vectors": (
        {},
        {
            "layers/input_layernorm/weight": (L, D),
            "layers/post_attention_layernorm/weight": (L, D),
            "layers/mlp_norm/scale": (L, D),
            "layers/attn/q_proj/bias": (L, D),
            "layers/RMSNorm_0/scale": (L, D),
            "layers/LayerNorm_1/bias": (L, D),
            "layers/attn/q_norm/scale": (L, E),
            "layers/ln_1/g": (L, D),
            "layers/ln1/weight": (L, D),
            "layers/attn_norm": (L, D),
            "layers/norm1/weight": (L, D),
            "layers/pre_feedforward_layernorm/scale": (L, D),
        },
    ),
    "MaxText": (
        {
            "params/decoder/layers_0/mlp/wi_0/kernel": (D, F),
            "params/decoder/layers_0/mlp/wi_1/kernel": (D, F),
            "params/decoder/layers_0/mlp/wo/kernel": (F, D),
        },
        {
            "params/token_embedder/embedding": (V, D),
            "params/decoder/logits_dense/kernel": (D, V),
            "params/decoder/decoder_norm/scale": (D,),
            "params/decoder/layers/self_attention/query/kernel": (D, L, H, E),
            "params/decoder/layers/self_attention/out/kernel": (H, L, E, D),
            "params/decoder/layers/pre_self_attention_layer_norm/scale": (D, L),
            "params/decoder/layers/mlp/wi_0/kernel": (D, L, F),
            "params/decoder/position_embedder/embedding": (L, D),
        },
    ),
    "NNX": (
        {"layers/0/attn/q/kernel": (D, D), "layers/0/up/kernel": (D, F)},
        {
            "embed/embedding": (V, D),
            "layers/0/up/bias": (F,),
            "norm/scale": (D,),
            "lm_head/kernel": (D, V),
        },
    ),
    "Gemma in Flax": (
        {"layer_0/mlp/linear": (F, D)},
        {
            "embedder/input_embedding": (V, D),
            "layer_0/attn/q_einsum/w": (H, D, E),
            "layer_0/attn/kv_einsum/w": (2, 1, D, E),
            "layer_0/attn/attn_vec_einsum/w": (H, E, D),
            "layer_0/mlp/gating_einsum": (2, D, F),
            "layer_0/pre_attention_norm/scale": (D,),
            "final_norm/scale": (D,),
        },
    ),
    "nanodo": (
        {"blocks_0/Mlp_0/Dense_0/kernel": (D, F), "blocks_0/Mlp_0/Dense_1/kernel": (F, D)},
        {
            "embed/embedding": (V, D),
            "pos_embed/embedding": (L, D),
            "blocks_0/CausalAttn_0/query/kernel": (D, H, E),
            "blocks_0/CausalAttn_0/attn_out_proj/kernel": (H, E, D),
            "blocks_0/LayerNorm_0/scale": (D,),
            "out_ln/scale": (D,),
        },
    ),
    "ViT": (
        {
            "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (D, F),
            "Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel": (F, D),
        },
        {
            "cls": (1, 1, D),
            "embedding/kernel": (4, 4, 3, D),
            "embedding/bias": (D,),
            "Transformer/posembed_input/pos_embedding": (1, L, D),
            "Transformer/encoderblock_0/LayerNorm_0/scale": (D,),
            "head/kernel": (D, V),
            "head/bias": (V,),
        },
    ),
    "T5 and BERT": (
        {
            "encoder/block/0/layer/0/SelfAttention/q/kernel": (D, D),
            "encoder/block/0/layer/0/SelfAttention/o/kernel": (D, D),
            "encoder/block/0/layer/1/DenseReluDense/wi/kernel": (D, F),
            "bert/encoder/layer/0/attention/self/query/kernel": (D, D),
            "bert/encoder/layer/0/attention/output/dense/kernel": (D, D),
            "bert/encoder/layer/0/intermediate/dense/kernel": (D, F),
        },
        {
            "shared/embedding": (V, D),
            "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (V, H),
            "bert/embeddings/word_embeddings/embedding": (V, D),
            "bert/embeddings/token_type_embeddings/embedding": (2, D),
            "bert/embeddings/position_embeddings/embedding": (L, D),
            "encoder/final_layer_norm/weight": (D,),
        },
    ),
    "hand written": (
        {
            "Wq": (D, D),
            "w1": (D, F),
            "W_o": (D, D),
            "blocks/0/attn/w_qkv": (D, 3 * D),
            "layers/0/attention/heads/kernel": (D, D),
            "multi_head_attention/q/kernel": (D, D),
            "gate": (D, F),
            "down": (F, D),
            "MultiHeadAttention_0/out/kernel": (D, D),
            "multihead/query": (D, D),
            "attn/out_proj": (D, D),
        },
        {
            "tok_emb": (V, D),
            "pos_emb": (L, D),
            "embed": (V, D),
            "wte": (V, D),
            "W_E": (V, D),
            "W_U": (D, V),
            "W_pos": (L, D),
            "unembed": (D, V),
            "output_head": (D, V),
            "token_embedding_table": (V, D),
            "position_embedding_table": (L, D),
            "lm_head": (D, V),
            "lmhead": (D, V),
            "vocab_proj": (D, V),
            "logits": (D, V),
            "tok_embeddings/weight": (V, D),
            "emb/weight": (V, D),
            "posemb": (L, D),
            "classifier/kernel": (D, V),
            "ln": (L, D),
            "b1": (L, D),
            "b_q": (L, D),
        },
    ),
}

# 2-D leaves that the rule misplaces if it sees them alone. A word rule cannot know them all; none
# may be added silently. Beside a named embedding the shape decides: see `test_heads_by_shape`.
ACCEPTED = {
    "W_E",
    "W_U",
    "classifier/kernel",
}

CASES = [
    pytest.param(path, shape, kind == 0, id=f"{scheme}: {path}")
    for scheme, groups in SCHEMES.items()
    for kind, group in enumerate(groups)
    for path, shape in group.items()
    if path not in ACCEPTED
]


@pytest.mark.parametrize(("path", "shape", "expected"), CASES)
def test_default_rule_on_real_names(path, shape, expected):
    params = tree_of({path: shape})
    assert _matrices(params, dimension_numbers.default(params)) == ({path} if expected else set())


@pytest.mark.parametrize("path", sorted(ACCEPTED))
def test_known_limits_of_the_default_rule(path):
    """Documented, so that a change of the rule shows here."""
    params = tree_of({path: (V, D)})
    assert _matrices(params, dimension_numbers.default(params)) == {path}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gum_follows_the_default_rule_and_keeps_matrices_from_the_fallback(scheme):
    matrices, others = ({p: s for p, s in g.items() if p not in ACCEPTED} for g in SCHEMES[scheme])
    params = tree_of({**matrices, **others})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = jax.eval_shape(gum_optax.gum(0.1, RANK_2).init, params)
    fallback = state.inner_states["fallback"].inner_state[0].mu
    assert sum(map(np.size, jax.tree.leaves(fallback))) >= 0
    assert len(jax.tree.leaves(fallback)) == len(others)


# Names: strong words, and weak words as head nouns ------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "norm_mlp/kernel",
        "pos_net/kernel",
        "scale_mlp/kernel",
        "bias_proj/kernel",
        "NormMLP_0/Dense_0/kernel",
        "position_encoder/Dense_0/kernel",
        "batchnorm_net/w",
        "multi_head/kernel",
        "header/kernel",
        "lora_b",
        "b/Dense_0/kernel",
        "table_encoder/kernel",
        "transformer/~/linear/w",
    ],
)
def test_a_weak_word_does_not_name_what_it_only_qualifies(path):
    params = tree_of({path: (D, F)})
    assert _matrices(params, dimension_numbers.default(params)) == {path}


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("embed_tokens/weight", "embed"),
        ("token_embedder/w", "embedder"),
        ("logits_dense/kernel", "logits"),
        # Of flax/examples/lm1b, in one word.
        ("logitdense/kernel", "logitdense"),
        ("TokenEmbedding_0/embedding", "embedding"),
        ("ln_attn/w", "ln"),
        ("final_norm/w", "norm"),
        ("q_norm/w", "norm"),
        ("LayerNorm_1/w", "norm"),
        ("norm_scale", "scale"),
        ("RMSNorm_0/w", "rmsnorm"),
        ("BatchNorm2d_3/w", "norm"),
        ("norm_weight", "norm"),
        ("norm1_w", "norm"),
        ("W_pos", "pos"),
        ("positional_encoding", "positional"),
        ("relative_position_bias_table", "table"),
        ("scale_shift_table", "table"),
        ("LMHead/kernel", "lmhead"),
        ("lm_head_w", "head"),
        ("b_q", "b"),
        ("b1", "b"),
    ],
)
def test_words_that_name(path, word):
    params = tree_of({path: (D, F)})
    numbers = dimension_numbers.resolve(params, None)
    assert dimension_numbers.explain(params, numbers) == [f"name: {word}"]


# Shapes: stacked vectors and heads ----------------------------------------------------------------

READY = ["default", "scanned_layers", "flax", "maxtext", "gemma", "convolutions"]


def _two_axes(spec, ready="default"):
    """The paths of 2-D leaves that are matrices."""
    params = tree_of(spec)
    matrices = _matrices(params, getattr(dimension_numbers, ready)(params))
    return {path for path in matrices if len(spec[path]) == 2}


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"up": (L, D, F), "norm_attn": (L, D), "norm_q/w": (L, E), "bias_up": (L, F)}, set()),
        ({"up": (D, L, F), "norm_attn": (D, L), "final_norm": (D,)}, set()),
        # Without a stack beside it, or with another leading size, it is a network on norms.
        ({"norm_mlp/kernel": (L, D)}, {"norm_mlp/kernel"}),
        ({"up": (L, D, F), "norm_mlp/kernel": (D, F)}, {"norm_mlp/kernel"}),
        ({"up": (L, D, F), "gates": (L, D)}, {"gates"}),
        # d leads the query kernel, but is a width.
        ({"query/kernel": (D, H, E), "norm/scale": (D,), "norm_mlp": (D, F)}, {"norm_mlp"}),
    ],
    ids=["layers first", "layers second", "no stack", "other size", "no word", "width"],
)
def test_stacks_of_vectors_by_shape(spec, expected, ready):
    assert _two_axes(spec, ready) == expected


EMBED, BLOCK = {"embed/embedding": (V, D)}, {"l/0/up": (D, F), "l/0/down": (F, D)}
MODEL = {**EMBED, **BLOCK}
# The spec beside it -> which of its 2-D leaves are matrices.
HEADS = {
    "output": ({**MODEL, "output/kernel": (D, V)}, set(BLOCK)),
    "classifier": ({**MODEL, "classifier/kernel": (D, V)}, set(BLOCK)),
    "decoder": ({**MODEL, "decoder/weight": (V, D)}, set(BLOCK)),
    "readout": ({**MODEL, "readout": (D, V)}, set(BLOCK)),
    "vocabulary embedding": ({**BLOCK, "vocab_embed": (V, D), "readout": (D, V)}, set(BLOCK)),
    "vocabulary projection": (
        {**MODEL, "vocab_proj": (D, V), "adapter": (D, V)},
        {*BLOCK, "adapter"},
    ),
    "transposed embedding": ({**BLOCK, "wte": (D, V), "readout": (D, V)}, set(BLOCK)),
    "Haiku": (
        {
            "embed/embeddings": (V, D),
            "transformer/linear/w": (D, F),
            "transformer/linear_1/w": (F, D),
            "linear/w": (D, V),
            "linear/b": (V,),
        },
        {"transformer/linear/w", "transformer/linear_1/w"},
    ),
    "Haiku in one module": (
        {
            "lm/embed/embeddings": (V, D),
            "lm/linear/w": (D, F),
            "lm/linear_1/w": (F, D),
            "lm/linear_2/w": (D, V),
        },
        {"lm/linear/w", "lm/linear_1/w"},
    ),
    "not the last of its role": (
        {**EMBED, "mlp/2/w": (D, V), "mlp/10/w": (V, F)},
        {"mlp/2/w", "mlp/10/w"},
    ),
    "recurring role": (
        {**EMBED, "l/0/up": (D, V), "l/1/up": (D, V)},
        {"l/0/up", "l/1/up"},
    ),
    "byte level": (
        {"embed": (256, 64), "up": (64, 256), "gate": (64, 256), "down": (256, 64)},
        {"up", "gate", "down"},
    ),
    "vocabulary below the width": (
        {"embed": (H, D), "up": (D, F), "output": (D, H)},
        {"up"},
    ),
    "square": ({"embed": (D, D), "up": (D, D)}, {"up"}),
    "tied": (MODEL, set(BLOCK)),
    "named head": ({**MODEL, "lm_head": (D, V), "adapter": (D, V)}, {*BLOCK, "adapter"}),
    "position table": ({"pos_embed/embedding": (V, D), "up": (D, V)}, {"up"}),
    "position table wpe": ({"wpe": (V, D), "up": (D, V)}, {"up"}),
    "relative positions": ({"relative_attention_bias/embedding": (V, H), "x": (V, H)}, {"x"}),
    "no embedding": ({"up": (D, F), "output": (D, V)}, {"up", "output"}),
    "encoder and decoder": (
        {
            "encoder/embed": (V, D),
            "decoder/embed": (2 * V, D),
            "decoder/readout": (D, 2 * V),
            "encoder/readout": (D, V),
            "up": (D, F),
        },
        {"up"},
    ),
    "two heads of one size": (
        {**EMBED, "decoder_embed": (V, D), "readout": (D, V), "classifier": (D, V)},
        {"readout", "classifier"},
    ),
    "scanned": (
        {**EMBED, "l/up": (L, D, F), "l/norm_attn": (L, D), "output": (D, V)},
        set(),
    ),
}


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize(("spec", "expected"), HEADS.values(), ids=HEADS)
def test_heads_by_shape(spec, expected, ready):
    assert _two_axes(spec, ready) == expected


@pytest.mark.parametrize("embed", [(V, D), (D, V), (H, D), (D, H)], ids=str)
def test_the_vocabulary_is_the_rarer_size(embed):
    (vocabulary,) = set(embed) - {D}
    params = tree_of({"embed": embed, "output": (D, vocabulary), "up": (D, F), "norm": (D,)})
    numbers = dimension_numbers.resolve(params, None)
    reasons = ["name: embed", "vector", f"head: vocabulary {vocabulary}", ""]
    assert dimension_numbers.explain(params, numbers) == reasons


# Reasons ------------------------------------------------------------------------------------------


def test_explain():
    params = tree_of(
        {
            "p": (D,),
            "q/embed": (V, D),
            "r/norm_attn": (L, D),
            "s/output": (D, V),
            "t/up": (L, D, F),
            "u": (D, F),
            "v": (D, F),
        }
    )
    table = ["vector", "name: embed", "stacked vectors", f"head: vocabulary {V}"]
    last = {"u": None, "v": LAST_TWO}
    forms = [
        (None, [*table, "ambiguous axes", "", ""]),
        (dimension_numbers.scanned_layers, [*table, "", "", ""]),
        (
            lambda p: {**dimension_numbers.default(p), **last},
            [*table, "ambiguous axes", "as given", ""],
        ),
        # The user's numbers win over the evidence.
        (dict.fromkeys("qrstuv", LAST_TWO) | {"p": None}, ["vector", *[""] * 6]),
    ]
    for form, expected in forms:
        numbers = dimension_numbers.resolve(params, form)
        assert dimension_numbers.explain(params, numbers) == expected
    assert dimension_numbers.explain({}, []) == []


def test_reasons_fit_a_table():
    params = tree_of({"embed": (999_999, D), "output": (D, 999_999), "unembedding": (D, V)})
    reasons = dimension_numbers.explain(params, [None] * 3)
    assert max(map(len, reasons)) <= 24


# Trees that can be called -------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A model like Equinox's: a registered tree with a ``__call__``."""

    bias: object
    up: object

    def __call__(self, x):
        raise AssertionError("A tree of numbers is no function.")


@pytest.mark.parametrize(
    "numbers",
    [
        None,
        Model(None, LAST_TWO),
        dimension_numbers.default,
        lambda p: Model(None, LAST_TWO),
    ],
    ids=["None", "tree", "ready", "function"],
)
def test_a_callable_tree_is_not_called(numbers):
    model = Model(jnp.ones(D), jnp.ones((D, F)))
    assert dimension_numbers.resolve(model, numbers) == [None, LAST_TWO]


def test_is_function():
    class Rule:
        def __call__(self, params):
            return None

    for function in (dimension_numbers.default, lambda p: p, Rule(), Rule):
        assert dimension_numbers.is_function(function)
    for tree in (Model(None, None), LAST_TWO, {}, None, [dimension_numbers.default]):
        assert not dimension_numbers.is_function(tree)


# Forms of `weight_dimension_numbers` -------------------------------------------------------------

_MATRIX = np.ones((4, 6), np.float32)
PARAMS = {"a": [_MATRIX, _MATRIX], "b": {"w": _MATRIX}}
FORMS = {
    "tree": ({"a": [LAST_TWO, LAST_TWO], "b": {"w": None}}, {"a/0", "a/1"}),
    "prefix": ({"a": LAST_TWO, "b": None}, {"a/0", "a/1"}),
    "root": (LAST_TWO, {"a/0", "a/1", "b/w"}),
    "callable tree": (lambda p: jax.tree.map(lambda _: LAST_TWO, p), {"a/0", "a/1", "b/w"}),
    "callable prefix": (lambda p: {"a": None, "b": LAST_TWO}, {"b/w"}),
    "callable root": (lambda p: LAST_TWO, {"a/0", "a/1", "b/w"}),
    "callable None": (lambda p: None, set()),
    "tuples of axes": ({"a": MuonDims((0,), (1,)), "b": None}, {"a/0", "a/1"}),
    "numpy axes": ({"a": MuonDims(np.int64(0), np.int64(1)), "b": None}, {"a/0", "a/1"}),
    "transposed": ({"a": MuonDims(1, 0), "b": MuonDims(-1, -2)}, {"a/0", "a/1", "b/w"}),
}


@pytest.mark.parametrize(("numbers", "expected"), FORMS.values(), ids=FORMS)
def test_forms(numbers, expected):
    """Leaves of the fallback, and they alone, have a momentum in its state."""
    optimizer = gum_optax.gum(
        0.1, RANK_2, weight_dimension_numbers=numbers, fallback=optax.trace(0.9)
    )
    state = jax.eval_shape(optimizer.init, PARAMS)
    updates, after = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
    for s in (state, after):
        momenta = s.inner_states["fallback"].inner_state.trace
        present = {"a/0": momenta["a"][0], "a/1": momenta["a"][1], "b/w": momenta["b"]["w"]}
        matrices = {name for name, m in present.items() if isinstance(m, optax.MaskedNode)}
        assert matrices == expected


# The same matrix, in other axes ------------------------------------------------------------------

AXES = {
    "transposed": ((6, 9), MuonDims(1, 0), lambda x: x.T),
    "query": ((6, 3, 3), MuonDims(0, (1, 2)), lambda x: x.reshape(6, 9)),
    "out": ((2, 3, 9), MuonDims((0, 1), 2), lambda x: x.reshape(6, 9)),
    "interleaved": ((3, 6, 3), MuonDims(1, (0, 2)), lambda x: x.transpose(1, 0, 2).reshape(6, 9)),
    "order of axes": ((6, 3, 3), MuonDims(0, (2, 1)), lambda x: x.mT.reshape(6, 9)),
    "convolution": ((3, 2, 2, 5), MuonDims((0, 1, 2), 3), lambda x: x.reshape(12, 5)),
    "batch first": ((4, 6, 9), MuonDims(1, 2), lambda x: x),
    "batch last": ((6, 9, 4), MuonDims(0, 1), lambda x: x.transpose(2, 0, 1)),
    "batch between": (
        (6, 4, 3, 3),
        MuonDims(0, (2, 3)),
        lambda x: x.transpose(1, 0, 2, 3).reshape(4, 6, 9),
    ),
    "two batch axes": ((2, 6, 2, 9), MuonDims(1, 3), lambda x: x.transpose(0, 2, 1, 3)),
}


def _direction(**options):
    """GUM without Newton-Schulz, which has no axes of its own and takes long to compile."""
    compression = gum_optax.LowRank(rank=2, period=2, projector=first_coordinates)
    return gum_optax.gum(0.1, compression, orthogonalizer=optax.identity(), **options)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _updates(optimizer, leaves):
    """The updates of three steps, stacked; their gradients are the parameters."""

    def step(state, _):
        updates, state = optimizer.update(leaves, state, leaves)
        return state, updates

    return jax.lax.scan(step, optimizer.init(leaves), length=3)[1]


# Compiled once for all leaves that are the same matrices.
AS_THEY_ARE = _direction(consistent_rms=0.2, weight_dimension_numbers=LAST_TWO)


def _gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("shape", "numbers", "as_matrix"), AXES.values(), ids=AXES)
def test_axes_do_not_matter(shape, numbers, as_matrix):
    """A leaf with dimension numbers gets the update of the same matrix given as it is."""
    leaves = [np.asarray(x, np.float32) for x in _gaussian(2, *shape)]
    matrices = [as_matrix(leaf) for leaf in leaves]
    one = _direction(consistent_rms=0.2, weight_dimension_numbers=numbers)
    got, expected = _updates(one, leaves), _updates(AS_THEY_ARE, matrices)
    for updates, leaf, others in zip(got, leaves, expected, strict=True):
        for update, other in zip(*map(np.asarray, (updates, others)), strict=True):
            assert update.shape == leaf.shape
            # The arithmetic is the same: measured equal.
            np.testing.assert_allclose(as_matrix(update), other, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of .* compressed")
@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_uncompressed_groups_equal_optax_muon(consistent_rms):
    """With a rank above every side nothing is projected, and GUM is Muon, axes and all."""
    params = {name: np.asarray(_gaussian(*shape), np.float32) for name, (shape, *_) in AXES.items()}
    numbers = {name: case[1] for name, case in AXES.items()}
    ours = gum_optax.gum(
        0.1,
        gum_optax.LowRank(rank=99),
        beta=0.9,
        weight_dimension_numbers=numbers,
        consistent_rms=consistent_rms,
    )
    theirs = optax.contrib.muon(
        0.1,
        beta=0.9,
        nesterov=False,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=consistent_rms,
    )
    left, right = jax.jit(ours.update), jax.jit(theirs.update)
    states = jax.jit(lambda: (ours.init(params), theirs.init(params)))()
    for seed in range(3):
        gradients = jax.tree.map(
            lambda p, seed=seed: np.asarray(_gaussian(*p.shape, seed=seed), np.float32), params
        )
        got, a = left(gradients, states[0], params)
        expected, b = right(gradients, states[1], params)
        states = a, b
        for name in AXES:
            # Two orders of float32 operations in Newton-Schulz: measured 2e-7.
            np.testing.assert_allclose(got[name], expected[name], atol=2e-6, err_msg=name)

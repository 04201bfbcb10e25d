"""`dimension_numbers.infer`: matrices found by their use, on models of every framework.

The expected axes are written down by hand, as letters: ``i`` is an axis of the input side, ``o`` of
the output side, ``b`` a batch axis; "" is no matrix.
"""

# optax types a state as any tree of arrays, so its fields are unknown to a type checker.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportIncompatibleVariableOverride=false

import functools
import warnings

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import gum_optax
from gum_optax import dimension_numbers
from tests.helpers import letters

B, T, D, F, V, L, H, K, E = 2, 5, 8, 24, 40, 3, 2, 4, 6
TOKENS = np.zeros((B, T), np.int32)
X = jax.ShapeDtypeStruct((B, T, D), jnp.float32)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def inferred(function, params, *args, **kwargs):
    return letters(params, dimension_numbers.infer(function, params, *args, **kwargs))


# One primitive after the other, on plain functions -----------------------------------------------


def one(function, shape, *args):
    """The letters of a single leaf in ``function(w, x)``."""
    [found] = inferred(function, {"w": f32(*shape)}, *args).values()
    return found


def of_w(function):
    return lambda params, x: function(params["w"], x)


@jax.custom_vjp
def _vjp(x, w):
    return x @ w


_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def _jvp(w):
    return jnp.tanh(w)


_jvp.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0]))


def _layer(x, w):
    return jnp.tanh(x @ w), None


def _carried(w, x):
    """The weights are part of what a loop carries, and leave it as they came."""

    def step(carry, _):
        x, w = carry
        return (jnp.tanh(x @ w), w), None

    return jax.lax.scan(step, (x, w), length=4)[0][0]


def _indexed(w, x):
    return jax.lax.fori_loop(0, L, lambda i, x: jnp.tanh(x @ w[i]), x)


def _while(w, x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x)


def _cond(w, x):
    return jax.lax.cond(jnp.sum(x) > 0, lambda w: x @ w, lambda w: x @ jnp.tanh(w), w)


def _sharded(w, x):
    """A layer whose weights are gathered where they are used."""

    def local(x, w):
        return x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)

    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(None, None, None), P("fsdp", None))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(x, w)


def _fused(w, x):
    """``[d, 3 d]``: one matrix, since its output axis is one."""
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    return jax.nn.softmax(q @ k.mT) @ v


def _three(w, x):
    """``[d, 3, heads, head_dim]``: three matrices, since the product is taken apart."""
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, w) + 1.0, 2, 0)
    return jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)) @ jnp.moveaxis(v, 1, 2)


def _three_in_an_axis(w, x):
    """``[d, heads, 3 head_dim]``: one matrix, of which no whole axis is taken apart."""
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dhk->bthk", x, w).reshape(B, T, H, 3, K), 3, 0)
    return jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)) @ jnp.moveaxis(v, 1, 2)


def _standardized(w, x):
    return x @ ((w - jnp.mean(w, 0)) / jnp.std(w, 0)).astype(jnp.bfloat16)


def _dropped(w, x):
    return x @ jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, w.shape), w, 0.0)


def _quantized(w, x):
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 127
    return x @ (jnp.clip(jnp.round(w / scale), -127, 127) * scale)


def _ragged(w, x):
    return jax.lax.ragged_dot(x[0], w, jnp.ones(E, jnp.int32))


def _looked_up_experts(w, x):
    chosen = jnp.argmax(x[..., :E], -1)
    return jnp.einsum("btd,btdf->btf", x, w[chosen])


CASES = {
    "plain": (lambda w, x: x @ w, (D, F), "io"),
    "transposed": (lambda w, x: x @ w.T, (F, D), "oi"),
    "weights first": (lambda w, x: jnp.einsum("fd,btd->fbt", w, x), (F, D), "oi"),
    "cast": (lambda w, x: x @ w.astype(jnp.bfloat16), (D, F), "io"),
    "query": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (D, H, K), "ioo"),
    "query, heads first": (lambda w, x: jnp.einsum("btd,hdk->bhtk", x, w), (H, D, K), "oio"),
    "out": (lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(B, T, H, K), w), (H, K, D), "iio"),
    "out, merged": (lambda w, x: x @ w.reshape(D, F), (H, K, F), "iio"),
    "split": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w.reshape(D, H, K)), (D, D), "io"),
    "slices": (lambda w, x: (x @ w[:, :D]) * (x @ w[:, D:]), (D, 2 * D), "io"),
    "fused": (_fused, (D, 3 * D), "io"),
    "three in one": (_three, (D, 3, H, K), "iboo"),
    "three in one, taken": (
        lambda w, x: sum(
            jnp.take(jnp.einsum("btd,dchk->btchk", x, w), i, axis=2) for i in range(3)
        ),
        (D, 3, H, K),
        "iboo",
    ),
    "three in one axis": (_three_in_an_axis, (D, H, 3 * K), "ioo"),
    "stacked by index": (lambda w, x: x @ w[0] + x @ w[1], (2, D, F), "bio"),
    "scan": (lambda w, x: jax.lax.scan(_layer, x, w)[0], (L, D, D), "bio"),
    "scan over the second axis": (
        lambda w, x: jax.lax.scan(_layer, x, jnp.moveaxis(w, 1, 0))[0],
        (D, L, D),
        "ibo",
    ),
    "closed over by a scan": (
        lambda w, x: jax.lax.scan(lambda x, _: _layer(x, w), x, length=4)[0],
        (D, D),
        "io",
    ),
    "carried by a scan": (_carried, (D, D), "io"),
    "indexed in a loop": (_indexed, (L, D, D), "bio"),
    "taken by an index": (
        lambda w, x: x @ jnp.take(w, jnp.argmax(x[0, 0]), axis=0),
        (L, D, F),
        "bio",
    ),
    "while": (_while, (D, D), "io"),
    "cond": (_cond, (D, F), "io"),
    "remat": (lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), (D, F), "io"),
    "jit": (lambda w, x: jax.jit(lambda x, w: x @ w)(x, w), (D, F), "io"),
    "custom_vjp": (lambda w, x: _vjp(x[0], w), (D, F), "io"),
    "custom_jvp": (lambda w, x: x @ _jvp(w), (D, F), "io"),
    "vmap over examples": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (D, F), "io"),
    "vmap over layers": (
        lambda w, x: jax.vmap(jnp.matmul)(jnp.stack([x] * L), w),
        (L, D, F),
        "bio",
    ),
    "shard_map": (_sharded, (D, F), "io"),
    "experts": (lambda w, x: jnp.einsum("ecd,edf->ecf", x[:, :1], w), (B, D, F), "bio"),
    "ragged experts": (_ragged, (E, D, F), "bio"),
    "experts looked up": (_looked_up_experts, (E, D, F), "bio"),
    "standardized": (_standardized, (D, F), "io"),
    "dropped weights": (_dropped, (D, F), "io"),
    "quantized": (_quantized, (D, F), "io"),
    "mixed tokens": (lambda w, x: jnp.einsum("btd,ts->bsd", x, w), (T, T), "io"),
    "tied autoencoder": (lambda w, x: jnp.tanh(x @ w) @ w.T, (D, F), "io"),
    "mask of activations": (lambda w, x: (x > 0).astype(jnp.float32) @ w, (D, F), "io"),
    # No matrices.
    "table": (lambda w, x: w[x[..., 0].astype(int)], (V, D), ""),
    "one-hot": (lambda w, x: jax.nn.one_hot(x[..., 0].astype(int), V) @ w, (V, D), ""),
    "tied": (lambda w, x: w[x[..., 0].astype(int)] @ w.T, (V, D), ""),
    "positions": (lambda w, x: jnp.tanh(x + w) @ jnp.ones((D, F)), (T, D), ""),
    "positions, looked up and compared with": (
        lambda w, x: (x + w[jnp.arange(T)]) @ w.T,
        (T, D),
        "",
    ),
    "positions, looked up": (lambda w, x: x + w[jnp.arange(T)], (T, D), ""),
    "bias of heads": (lambda w, x: x.reshape(B, T, H, K) + w, (H, K), ""),
    "stacked scales": (
        lambda w, x: jax.lax.scan(lambda x, w: (x * w, None), x, w)[0] @ jnp.ones((D, F)),
        (L, D),
        "",
    ),
    "scale by einsum": (lambda w, x: jnp.einsum("bhk,hk->bhk", x[..., :H, :K], w), (H, K), ""),
    "one output": (lambda w, x: x @ w, (D, 1), ""),
    "norm of weights beside a table": (
        lambda w, x: jnp.sum(w**2) + w[x[..., 0].astype(int)],
        (V, D),
        "",
    ),
    "probe": (
        lambda w, x: jnp.tile(w, (B, 1, 1)) @ jnp.ones((D, F)) @ jnp.ones((F, D)) * x[:, :1],
        (1, 1, D),
        "",
    ),
}


@pytest.mark.parametrize(("function", "shape", "expected"), CASES.values(), ids=CASES)
def test_one_leaf(function, shape, expected):
    assert one(of_w(function), shape, X) == expected


def test_a_gradient_inside_the_function_changes_nothing():
    """As in a training step, or a loss with a gradient penalty."""

    def step(params, x):
        loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["up"]) @ p["down"].T) ** 2)  # noqa: E731
        grads = jax.grad(loss)(params, x)
        penalty = jnp.mean(jax.grad(loss, argnums=1)(params, x) ** 2)
        return penalty, optax.apply_updates(params, grads)

    params = {"up": f32(D, F), "down": f32(D, F)}
    assert inferred(step, params, X) == {"up": "io", "down": "oi"}


def test_low_rank_adapters_beside_and_merged():
    def beside(p, x):
        return x @ p["w"] + (x @ p["a"]) @ p["b"]

    def merged(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    params = {"w": f32(D, F), "a": f32(D, 2), "b": f32(2, F)}
    for function in (beside, merged):
        assert inferred(function, params, X) == dict.fromkeys("wab", "io")


def test_every_expert_sees_every_token():
    """Experts are batch axes of both layers, though only the second product is batched."""

    def experts(p, x):
        gate = jax.nn.softmax(x @ p["gate"])
        hidden = jnp.einsum("btd,edf->btef", x, p["up"]) * jnp.einsum("btd,edf->btef", x, p["in"])
        return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(hidden), p["down"], gate)

    params = {"gate": f32(D, E), "up": f32(E, D, F), "in": f32(E, D, F), "down": f32(E, F, D)}
    expected = {"gate": "io", "up": "bio", "in": "bio", "down": "bio"}
    assert inferred(experts, params, X) == expected


def test_learned_vectors_that_attend_are_no_matrix_and_their_weights_are():
    """As in pooling by attention: a probe, repeated for each example, is projected to a query."""

    def pool(p, x):
        query = jnp.broadcast_to(p["probe"], (B, T, D)) @ p["query"] + p["bias"]
        return jax.nn.softmax(query @ (x @ p["key"]).mT) @ x

    for probe in (f32(T, D), f32(1, T, D)):
        params = {"probe": probe, "query": f32(D, D), "key": f32(D, D), "bias": f32(D)}
        assert inferred(pool, params, X) == {"probe": "", "query": "io", "key": "io", "bias": ""}


def test_convolutions():
    """Kernels are matrices; depthwise ones and patch embeddings are not."""

    def conv(x, w, stride=1, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def model(p, x):
        x = conv(x, p["patches"], 4)
        x = conv(jnp.tanh(x), p["dense"])
        x = conv(x, p["depthwise"], groups=F)
        x = conv(x, p["down"], 2)
        return x

    params = {
        "patches": f32(4, 4, 3, D),
        "dense": f32(3, 3, D, F),
        "depthwise": f32(3, 3, 1, F),
        "down": f32(2, 2, F, D),
    }
    expected = {"patches": "", "dense": "iiio", "depthwise": "", "down": "iiio"}
    assert inferred(model, params, f32(B, 16, 16, 3)) == expected


# Heads -------------------------------------------------------------------------------------------


def _language_model(p, tokens):
    x = p["embed"][tokens] + p["positions"][jnp.arange(T)]
    x = x + jnp.tanh(x @ p["up"]) @ p["down"]
    return x @ p["output"]


def test_the_head_is_known_by_the_vocabulary():
    params = {
        "embed": f32(V, D),
        "positions": f32(T, D),
        "up": f32(D, F),
        "down": f32(F, D),
        "output": f32(D, V),
    }
    expected = {"embed": "", "positions": "", "up": "io", "down": "io", "output": ""}
    assert inferred(_language_model, params, TOKENS) == expected


def test_a_hidden_layer_as_wide_as_the_vocabulary_is_no_head():
    """Byte-level models: what other parameters follow is no output."""
    params = {
        "embed": f32(V, D),
        "positions": f32(T, D),
        "up": f32(D, V),
        "down": f32(V, D),
        "output": f32(D, V),
    }
    expected = {"embed": "", "positions": "", "up": "io", "down": "io", "output": ""}
    assert inferred(_language_model, params, TOKENS) == expected


def test_a_head_without_a_table_is_known_by_its_name():
    params = {"w": f32(D, F), "lm_head": {"kernel": f32(F, V)}}
    found = inferred(lambda p, x: jnp.tanh(x @ p["w"]) @ p["lm_head"]["kernel"], params, X)
    assert found == {"w": "io", "lm_head/kernel": ""}


# Models of each framework ------------------------------------------------------------------------

_ATTENTION = {
    **{f"{role}/kernel": "ioo" for role in ("query", "key", "value")},
    **{f"{role}/bias": "" for role in ("query", "key", "value", "out")},
    "out/kernel": "iio",
}


def _stacked(expected, axis):
    """The letters of leaves with one more axis, over layers."""
    return {path: axes and axes[:axis] + "b" + axes[axis:] for path, axes in expected.items()}


def _below(prefix, expected):
    return {f"{prefix}/{path}": axes for path, axes in expected.items()}


def _matrices(found):
    return {path: axes for path, axes in found.items() if axes}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(H, qkv_features=D)(y, y)
        return x + nn.Dense(D)(nn.gelu(nn.Dense(F)(x))), None


class LinenModel(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D)(tokens) + self.param("pos", nn.initializers.zeros, (1, T, D))
        blocks = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=L,
        )
        return nn.Dense(V)(blocks(name="blocks")(x, None)[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_linen(axis):
    """Scanned over either axis: the expected letters follow from the axis alone."""
    model = LinenModel(axis)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    block = {
        **_below("MultiHeadDotProductAttention_0", _ATTENTION),
        "Dense_0/kernel": "io",
        "Dense_1/kernel": "io",
    }
    found = inferred(model.apply, variables, TOKENS)
    assert _matrices(found) == _matrices(_below("params/blocks", _stacked(block, axis)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=L)
        @nnx.vmap
        def create(rngs):
            return NnxBlock(rngs)

        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.blocks, self.last = create(rngs), NnxBlock(rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        @functools.partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, block):
            return block(x)

        return self.head(self.last(apply(self.embed(tokens), self.blocks)))


def test_nnx():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    block = {**_below("attention", _ATTENTION), "up/kernel": "io", "down/kernel": "io"}
    expected = _matrices({**_below("last", block), **_below("blocks", _stacked(block, 0))})
    numbers = dimension_numbers.infer(
        lambda params, tokens: nnx.merge(graph, params, rest)(tokens), params, TOKENS
    )
    assert _matrices(letters(params, numbers)) == expected
    # The result fits the boxed parameters of `init` and the plain ones of `update`.
    compression = gum_optax.LowRank(rank=2, residual=gum_optax.residuals.drop())
    tx = gum_optax.gum(0.1, compression, weight_dimension_numbers=numbers)
    state = jax.eval_shape(tx.init, params)
    assert set(optax.tree.get(state, "basis")) == {name.replace("/", ".") for name in expected}
    params, state = nnx.as_pure(params), nnx.as_pure(state)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


class EqxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(H, D, key=key)
        self.mlp = eqx.nn.MLP(D, D, F, 1, key=key)
        self.norm = eqx.nn.LayerNorm(D)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(x)


class EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    stacked: EqxBlock
    last: EqxBlock
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(V, D, key=key)
        self.stacked = eqx.filter_vmap(EqxBlock)(jax.random.split(key, L))
        self.last = EqxBlock(key)
        self.head = eqx.nn.Linear(D, V, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        arrays, static = eqx.partition(self.stacked, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, block: (eqx.combine(block, static)(x), None), x, arrays)
        return jax.vmap(self.head)(self.last(x))


def test_equinox():
    """Weights ``[out, in]``; the module itself is handed over, functions and floats in it."""
    model = eqx.filter_eval_shape(EqxModel, jax.random.key(0))
    numbers = dimension_numbers.infer(lambda model, tokens: jax.vmap(model)(tokens), model, TOKENS)
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    block = {
        **{f"attention/{name}/weight": "oi" for name in projections},
        **{f"mlp/layers/{i}/weight": "oi" for i in range(2)},
    }
    expected = {**_below("last", block), **_below("stacked", _stacked(block, 0))}
    params = jax.tree.map(lambda x: x if hasattr(x, "shape") else None, model)
    assert _matrices(letters(params, numbers)) == expected


def test_haiku():
    def forward(tokens):
        x = hk.Embed(V, D)(tokens) + hk.get_parameter("pos", (T, D), init=jnp.zeros)
        for _ in range(2):
            init = hk.initializers.VarianceScaling(1.0)
            x = x + hk.MultiHeadAttention(H, D // H, w_init=init, name="attn")(x, x, x)
            x = x + hk.nets.MLP([F, D])(hk.LayerNorm(-1, True, True)(x))
        x, _ = hk.LSTM(D)(x[:, 0], hk.LSTM(D).initial_state(B))
        return hk.Linear(V)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    found = inferred(model.apply, params, TOKENS)
    blocks = [f"{name}{i}" for name in ("attn", "mlp") for i in ("", "_1")]
    inner = {"attn": ("query", "key", "value", "linear"), "mlp": ("~/linear_0", "~/linear_1")}
    expected = {f"{b}/{x}/w" for b in blocks for x in inner[b.split("_")[0]]} | {"lstm/linear/w"}
    assert _matrices(found) == dict.fromkeys(expected, "io")


def test_a_list_without_names():
    """As Keras' stateless calls hand them over: only their use tells what they are."""
    shapes = [(V, D), (D, H, K), (H, K), (H, K, D), (D,), (D, F), (F,), (F, D), (D, V), (V,)]

    def apply(params, tokens):
        embed, query, query_bias, out, out_bias, up, up_bias, down, head, head_bias = params
        x = embed[tokens]
        heads = jnp.einsum("btd,dhk->bthk", x, query) + query_bias
        x = x + jnp.einsum("bthk,hkd->btd", heads, out) + out_bias
        x = x + jax.nn.relu(x @ up + up_bias) @ down
        return x @ head + head_bias

    found = inferred(apply, [f32(*shape) for shape in shapes], TOKENS)
    assert list(found.values()) == ["", "ioo", "", "iio", "", "io", "", "io", "", ""]


# What it cannot decide ---------------------------------------------------------------------------


def _sorted(p, x):
    return x @ jnp.sort(p["w"], axis=0) + x @ p["v"]


def _both_ways(p, x):
    return x @ p["w"] + jnp.einsum("btd,de->bte", x, p["w"].reshape(F, D).T) @ p["v"]


UNDECIDED = {
    "unknown primitive": (_sorted, (D, D), "is used by `sort`, for which there is no rule"),
    "unused": (lambda p, x: x @ p["v"], (D, D), "is not used in a product or sum"),
    "cut": (
        lambda p, x: jnp.einsum("btc,csd->btsd", x[..., :2], p["w"].reshape(2, 4, D)) @ p["v"],
        (D, D),
        "has an axis contracted and kept",
    ),
    "two ways": (
        lambda p, x: (
            jnp.einsum("btd,dhk->bthk", x, p["w"])
            + jnp.einsum("btdh,dhk->btk", x[..., None] * jnp.ones(H), p["w"])[:, :, None] @ p["v"]
        ),
        (D, H, D),
        "is contracted in several ways: contracted [0], kept [1, 2] and contracted [0, 1]",
    ),
}


@pytest.mark.parametrize(("function", "shape", "reason"), UNDECIDED.values(), ids=UNDECIDED)
def test_undecided_leaves_are_named_with_the_reason(function, shape, reason):
    params = {"v": f32(D, D), "w": f32(*shape)}
    with pytest.warns(UserWarning, match="cannot decide on 1 of 2 leaves") as caught:
        found = inferred(function, params, X)
    assert found == {"v": "io", "w": ""}
    message = str(caught[0].message)
    assert f"`w` {list(shape)} {reason}" in message
    assert "MuonDimensionNumbers(reduction_axis, output_axis)" in message
    assert caught[0].filename == __file__


def test_what_is_certainly_no_matrix_does_not_warn():
    params = {"scale": f32(L, D), "embed": f32(V, D), "pos": f32(1, T, D), "w": f32(D, F)}

    def model(p, tokens):
        return ((p["embed"][tokens] + p["pos"]) * p["scale"][0]) @ p["w"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _matrices(inferred(model, params, TOKENS)) == {"w": "io"}


def test_integers_are_no_matrices():
    """Counters, keys and codes in a model's variables have no gradients."""
    params = {"w": f32(D, F), "codes": jax.ShapeDtypeStruct((D, F), jnp.int8)}
    found = inferred(lambda p, x: x @ p["w"] + x @ p["codes"].astype(jnp.float32), params, X)
    assert found == {"w": "io", "codes": ""}


def test_a_function_is_needed():
    with pytest.raises(TypeError, match="`function` must be a function of the parameters, got 3"):
        dimension_numbers.infer(3, {})


def test_no_leaves():
    assert dimension_numbers.infer(lambda p, x: x, {}, X) == {}


def test_token_ids_that_a_function_has_captured_are_data():
    """So their table shows the vocabulary, by which an unnamed head is known."""
    tokens = np.arange(6).reshape(2, 3) % V
    params = {"table": f32(V, D), "w": f32(D, D), "out": f32(D, V)}
    found = inferred(lambda p: p["table"][tokens] @ p["w"] @ p["out"], params)
    assert found == {"table": "", "w": "io", "out": ""}


def test_a_use_in_any_branch_counts():
    """The one that is taken is not known, and a leaf may be used in one of them alone."""

    def model(p, x):
        without = lambda: x[..., :1] * jnp.ones(F)  # noqa: E731
        hidden = jax.lax.cond(jnp.sum(x) > 0, without, lambda: x @ p["v"])
        return hidden + jax.lax.cond(jnp.sum(x) > 1, lambda: x @ p["w"], without)

    assert inferred(model, {"v": f32(D, F), "w": f32(D, F)}, X) == {"v": "io", "w": "io"}


def test_what_a_loop_carries_is_followed_until_it_is_stable():
    """The weights enter what is carried in the first turn, and are used in the third."""

    def model(p, x):
        def turn(carry, _):
            x, one, two = carry
            return (jnp.tanh(x @ two), p["w"], one), None

        zeros = jnp.zeros((D, D))
        return jax.lax.scan(turn, (x, zeros, zeros), length=4)[0][0]

    assert inferred(model, {"w": f32(D, D)}, X) == {"w": "io"}


# What it costs, and who can use it ---------------------------------------------------------------


def test_nothing_is_computed():
    """Shapes suffice, and arguments that are no arrays reach the function as they are."""

    def model(params, x, *, train, name):
        assert train is True and name == "a"
        return x @ params["w"]

    found = inferred(model, {"w": f32(D, F)}, X, train=True, name="a")
    assert found == {"w": "io"}


def test_the_tree_is_right_for_optax_muon():
    """`optax.contrib.muon` takes the same tree, and orthogonalizes the same matrices."""

    def model(p, x):
        return jnp.einsum("btd,hdk->bthk", x, p["q"]) + p["bias"]

    params = {"q": np.eye(D, K)[None] * np.ones((H, 1, 1)), "bias": np.zeros((H, K))}
    params = jax.tree.map(np.float32, params)
    numbers = dimension_numbers.infer(model, params, X)
    gradients = jax.tree.map(
        lambda p: np.random.default_rng(0).normal(size=p.shape).astype(np.float32), params
    )
    muon = optax.contrib.muon(
        1.0, ns_steps=12, nesterov=False, muon_weight_dimension_numbers=numbers
    )
    updates, _ = jax.jit(muon.update)(gradients, jax.jit(muon.init)(params), params)
    matrix = np.asarray(updates["q"]).transpose(1, 0, 2).reshape(D, H * K)
    # One matrix D x (H K) of orthonormal columns; Newton-Schulz leaves singular values about 1.
    np.testing.assert_allclose(np.linalg.svd(matrix)[1], 1.0, atol=0.35)

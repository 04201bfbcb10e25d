"""Greedy decoding with a cache against a loop without one, alone, batched and on a mesh."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import decoding, llama, presets
from experiments.trainer import mesh as meshes

TINY = presets.PRESETS["tiny"]
ONE_BLOCK = dataclasses.replace(TINY, layers=1)
ALL = dataclasses.replace(
    ONE_BLOCK,
    tied=True,
    qkv_bias=True,
    head_dim=16,
    norm_eps=1e-3,
    rope_scaling=presets.RopeScaling(8.0, 1.0, 4.0, original_length=64),
)
# Each block has a cache of its own; two of them are in one case, since each takes time to compile.
ARCHITECTURES = {
    "as pretrained": ONE_BLOCK,
    "no shared heads": dataclasses.replace(TINY, kv_heads=TINY.heads),
    "every option": ALL,
}
NEW = 12
NEVER = (TINY.vocab_size, TINY.vocab_size + 1)  # no tokens; as many as stop in other tests
APPLY = jax.jit(llama.apply, static_argnums=0)
LENGTHS = (5, 1, 33, 12, 32)  # both sides of a padded width, and a batch that is not full


def prompts_of(arch, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(arch.vocab_size, size=length).tolist() for length in lengths]


def create(arch, **options):
    """A model with weights so large that its tokens differ, and its biases matter."""
    static, shapes = jax.eval_shape(partial(llama.create, arch, **options))
    rng = np.random.default_rng(1)

    def weights(path, leaf):
        mean = float(path[-1].key == "scale")
        return rng.normal(mean, 0.3, leaf.shape).astype(np.float32)

    return static, jax.tree.map_with_path(weights, shapes)


def without_cache(static, params, prompt, stop=(), new=NEW):
    """One prompt, the whole sequence anew for each token; zeros follow it, which none sees."""
    tokens = list(prompt)
    for _ in range(new):
        window = np.zeros((1, max(LENGTHS) + NEW), np.int32)
        window[0, : len(tokens)] = tokens
        token = int(np.asarray(APPLY(static, params, window))[0, len(tokens) - 1].argmax())
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "no shared heads" else [])
        for name in ARCHITECTURES
    ],
)
def case(request):
    """A model, prompts, and their answers of NEW tokens."""
    static, params = create(ARCHITECTURES[request.param])
    prompts = prompts_of(ARCHITECTURES[request.param])
    return static, params, prompts, [without_cache(static, params, prompt) for prompt in prompts]


# This test comes first, so that the programs that it compiles serve those below.
def test_few_compilations_and_progress():
    static, params = create(ONE_BLOCK)
    done = []
    decode: Any = decoding._decode
    decode.clear_cache()
    prompts = prompts_of(TINY, range(1, 58, 2))
    options = {"stop": NEVER, "max_new_tokens": NEW, "batch_size": 3, "progress": done.append}
    decoding.greedy(static, params, prompts, **options)
    decoding.greedy(static, params, prompts[:5], **options)
    assert done == [3] * 9 + [2, 3, 2]
    assert decode._cache_size() == 2  # up to 32 tokens, and up to 64


# Measured: logits of windows of different lengths differ by up to 1e-5, and of the tokens that are
# chosen in these tests, the closest call is won by 1e-2.
def test_a_batch_is_answered_as_each_prompt_is_without_a_cache(case):
    static, params, prompts, wanted = case
    assert len({token for answer in wanted for token in answer}) > 10, "the model says one thing"
    answers = decoding.greedy(static, params, prompts, stop=NEVER, max_new_tokens=NEW, batch_size=3)
    assert answers == wanted


@pytest.mark.parametrize("case", ["every option"], indirect=True)
def test_a_prompt_is_answered_alone_as_in_a_batch(case):
    static, params, prompts, wanted = case
    for prompt, answer in zip(prompts, wanted, strict=True):
        assert decoding.greedy(static, params, [prompt], stop=(), max_new_tokens=NEW) == [answer]


def test_an_answer_ends_before_the_first_of_the_stop_tokens(case):
    static, params, prompts, unstopped = case
    stop = {unstopped[0][3], unstopped[2][0]}  # one answer ends at once, others never

    def ended(answer):
        return answer[: next((i for i, token in enumerate(answer) if token in stop), NEW)]

    wanted = [ended(answer) for answer in unstopped]
    assert [] in wanted and wanted[0] and any(len(answer) == NEW for answer in wanted)
    # The programs of the batches above.
    options = {"stop": stop, "max_new_tokens": NEW, "batch_size": 3}
    assert decoding.greedy(static, params, prompts, **options) == wanted


def test_decoding_ends_with_the_last_answer():
    """Filling a cache of 20,000 slots, each step reading all of it, would take minutes."""
    static, params = create(ONE_BLOCK)
    every = range(TINY.vocab_size)
    answers = decoding.greedy(static, params, [[1], [2, 3]], stop=every, max_new_tokens=20_000)
    assert answers == [[], []]


def test_an_answer_of_one_token_is_the_prefills():
    static, params = create(ONE_BLOCK)
    wanted = [without_cache(static, params, [1, 2], new=1)]
    assert decoding.greedy(static, params, [[1, 2]], stop=(), max_new_tokens=1) == wanted


def test_nothing_is_asked_nothing_answered():
    static, params = create(ONE_BLOCK)
    assert decoding.greedy(static, params, [], stop=(), max_new_tokens=3) == []
    with pytest.raises(ValueError, match=r"`prompts`: \[1\] are empty"):
        decoding.greedy(static, params, [[1], []], stop=(), max_new_tokens=3)


def test_bfloat16_weights_and_float32_ones_computed_in_bfloat16_answer_alike():
    """The weights are cast to the model's type once, which is what each module does with them."""
    static, params = create(ALL, dtype="bfloat16")
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    options = {"stop": (), "max_new_tokens": NEW}
    first, second = (
        decoding.greedy(static, weights, prompts_of(ALL), **options) for weights in (params, small)
    )
    assert first == second


# Five prompts are not divided evenly by either mesh. Where devices divide prompts alone, they treat
# all models alike. Dividing the weights, they meet shared heads, biases and a tied embedding in one
# model, and a head of its own in the other.
@pytest.mark.parametrize(
    ("case", "text"),
    [
        pytest.param("as pretrained", "data=8", marks=pytest.mark.slow),
        ("no shared heads", "data=2,fsdp=2,tensor=2"),
        ("every option", "data=2,fsdp=2,tensor=2"),
    ],
    indirect=["case"],
)
def test_a_mesh_changes_no_answer(text, case):
    static, params, prompts, wanted = case
    mesh = meshes.build(text)
    assert mesh is not None
    divided = jax.device_put(params, meshes.param_shardings(mesh, params))
    with meshes.use(mesh):
        assert decoding.greedy(static, divided, prompts, stop=(), max_new_tokens=NEW) == wanted

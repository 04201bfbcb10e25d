"""Supervised batches: masks, packed windows, epochs, resuming, rows of processes, errors."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import processors

from experiments.data import answers, tokens
from experiments.tasks.base import Example
from experiments.trainer.options import ConfigError

CHATML = """{% for message in messages %}{% if loop.first and message.role != 'system' %}\
<|im_start|>system
Be brief.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{% for message in messages %}<|start|>{{ message.role }}<|end|>

{{ message.content | trim }}<|eot|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""
LLAMA2 = """{% for message in messages %}{% if message.role == 'user' %}\
[INST] {{ message.content }} [/INST]{% else %} {{ message.content }} {{ eos_token }}\
{% endif %}{% endfor %}"""
NO_END = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
# Name: template, the token that ends a turn, what stands between the prompt and the answer.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", "<|im_start|>assistant\n"),
    "llama3": (LLAMA3, "<|eot|>", "<|start|>assistant<|end|>\n\n"),
    "llama2": (LLAMA2, tokens.END, "[/INST]"),
    "none": (None, tokens.END, "\n"),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
EPOCH = 12  # batches of 4 windows of 128 tokens: all 90 examples fill 11 and a quarter
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()  # noqa: SIM905


def examples(count=90):
    rng = np.random.default_rng(0)
    return [
        Example(
            f"{i}: say {' '.join(rng.choice(WORDS, rng.integers(1, 9)))}?",
            f"It is\n{' '.join(rng.choice(WORDS, rng.integers(1, 15)))} {i}.",
        )
        for i in range(count)
    ]


def tokenizer_of(template) -> Any:  # some of its methods have types for many arguments
    texts = (f"{e.prompt} {e.answer}" for e in examples())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens.train_tokenizer(texts, 400), eos_token=tokens.END
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(CHATML)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return answers.encode(examples(), tokenizer, 128)


def segments(batch):
    """The tokens and the answer mask of each example in a batch, in order."""
    for row, numbers in enumerate(batch["segments"]):
        for number in range(1, numbers.max(initial=0) + 1):
            inside = numbers == number
            yield tuple(batch["tokens"][row, inside]), tuple(batch["answer"][row, inside])


def keys(encoded):
    return [(tuple(e.tokens), tuple(e.answer)) for e in encoded]


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_covers_the_answer_and_the_token_that_ends_it(name):
    template, end, between = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    for example, encoded in zip(
        examples(), answers.encode(examples(), tokenizer, 128), strict=True
    ):
        answer = tokenizer.decode(encoded.tokens[encoded.answer])
        assert answer.replace(" ", "") == (example.answer + end).replace(" ", "")
        prompt = tokenizer.decode(encoded.tokens[~encoded.answer])
        assert prompt.endswith(between)
        assert example.prompt in prompt
        assert np.flatnonzero(encoded.answer)[0] == len(encoded.tokens) - encoded.answer.sum()


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_starts_from_the_tokens_before_the_answer(name):
    tokenizer = tokenizer_of(TEMPLATES[name][0])
    encoded = answers.encode(examples(), tokenizer, 128)
    prompts = [example.tokens[~example.answer].tolist() for example in encoded]
    assert answers.prompt_ids(examples(), tokenizer) == prompts


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_at_the_end_of_the_turn_or_of_the_text(name):
    template, end, _ = TEMPLATES[name]
    tokenizer = tokenizer_of(template)
    expected = {tokenizer.convert_tokens_to_ids(token) for token in (end, tokens.END)}
    assert answers.stop_tokens(tokenizer) == expected


def test_the_conversation_is_that_of_the_template_alone(tokenizer):
    (example, *_), (encoded, *_) = examples(), answers.encode(examples()[:1], tokenizer, 128)
    assert tokenizer.decode(encoded.tokens) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{example.prompt}<|im_end|>\n"
        f"<|im_start|>assistant\n{example.answer}<|im_end|>"
    )


def test_an_end_is_added_where_the_template_has_none():
    tokenizer = tokenizer_of(NO_END)
    (encoded,) = answers.encode([Example("a", "b")], tokenizer, 128)
    assert tokenizer.decode(encoded.tokens) == f"user: a\nassistant: b\n{tokens.END}"
    assert encoded.tokens[encoded.answer][-1] == tokenizer.eos_token_id


def test_without_a_template_the_tokenizers_first_token_stays():
    tokenizer = tokenizer_of(None)
    first = "<|start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
    )
    (encoded,) = answers.encode([Example("a", "b")], tokenizer, 128)
    assert tokenizer.decode(encoded.tokens) == f"{first}a\nb{tokens.END}"
    tokenizer.chat_template = CHATML
    (encoded,) = answers.encode([Example("a", "b")], tokenizer, 128)
    assert tokenizer.decode(encoded.tokens[:1]) == "<|im_start|>"


def test_a_window_is_made_of_whole_examples_apart_from_each_other(encoded):
    expected = set(keys(encoded))
    batches = take(answers.batches(encoded, 128, 4, 0), 12)
    for batch in batches:
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
            "tokens": ((4, 129), np.int32),
            "positions": ((4, 129), np.int32),
            "segments": ((4, 129), np.int32),
            "answer": ((4, 129), np.bool_),
        }
        assert set(segments(batch)) <= expected
        for numbers, positions in zip(batch["segments"], batch["positions"], strict=True):
            count = numbers.max()
            assert count >= 1
            parts = [positions[numbers == number] for number in range(1, count + 1)]
            np.testing.assert_array_equal(np.concatenate(parts), positions[numbers > 0])
            assert all(np.array_equal(part, np.arange(len(part))) for part in parts)
            assert np.all(np.diff(numbers[numbers > 0]) >= 0)
            assert np.all(numbers[np.count_nonzero(numbers) :] == 0)
        padding = batch["segments"] == 0
        assert not any(value[padding].any() for value in batch.values())


def test_a_trained_position_predicts_within_its_own_example(encoded):
    for batch in take(answers.batches(encoded, 128, 4, 0), 12):
        answer, numbers = batch["answer"], batch["segments"]
        assert not answer[:, 0].any()
        predicted = answer[:, 1:]
        np.testing.assert_array_equal(numbers[:, 1:][predicted], numbers[:, :-1][predicted])


def test_most_of_a_window_is_filled(encoded):
    longest = max(len(e.tokens) for e in encoded)
    for batch in take(answers.batches(encoded, 256, 4, 0), 12):
        # An example is left for the next windows only when it fits in none of these.
        assert np.mean(batch["segments"] == 0) < longest / 257


def test_every_example_comes_once_in_each_epoch(encoded):
    """After windows that were packed together, what came is a prefix of shuffled epochs."""
    stream = answers.batches(encoded, 128, 4, 0)
    counts, epochs = Counter(), 0.0
    for _ in range(12):
        for batch in take(stream, answers._TOGETHER):
            counts.update(segments(batch))
        epochs = counts.total() / len(encoded)
        often = [counts[key] for key in keys(encoded)]
        assert set(often) <= {int(epochs), int(epochs) + 1}
        assert counts.keys() <= set(keys(encoded))
    assert epochs > 3


def test_epochs_differ_and_the_seed_decides_the_order(encoded):
    first, again, other = (take(answers.batches(encoded, 128, 4, seed), 12) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert any(np.any(a["tokens"] != b["tokens"]) for a, b in zip(first, other, strict=True))


def test_epochs_are_in_different_orders(encoded):
    """With few windows packed together, an example's place tells where the shuffle had it."""
    batches = take(answers.batches(encoded, 128, 1, 0), 120)
    order = [key for batch in batches for key in segments(batch)]
    place = {key: i for i, key in enumerate(keys(encoded))}
    size = len(encoded)
    epochs = [[place[key] for key in order[i * size : (i + 1) * size]] for i in range(2)]
    first, second = ({example: i for i, example in enumerate(epoch)} for epoch in epochs)
    both = [(example, first[example], second[example]) for example in first.keys() & second.keys()]
    # Correlations of random orders of 90 are 0.1 on average; of one order packed twice, above 0.9.
    assert np.all(np.abs(np.triu(np.corrcoef(np.transpose(both)), 1)) < 0.4)


@pytest.fixture(scope="module")
def states_and_batches(encoded):
    """Batches of one iterator, and its state before each of them."""
    stream, states, batches = answers.batches(encoded, 128, 4, 0), [], []
    for _ in range(45):
        states.append(json.dumps(stream.get_state()))
        batches.append(next(stream))
    return states, batches


# Windows of 4 batches are packed together: within, at the end, just after, and in later epochs.
@pytest.mark.parametrize("read", [0, 1, 3, 4, 5, 8, 31])
def test_a_restored_iterator_goes_on_exactly(encoded, states_and_batches, read):
    states, batches = states_and_batches
    assert len(batches) > read + EPOCH
    state, expected = json.loads(states[read]), batches[read : read + EPOCH]
    restored = answers.batches(encoded, 128, 4, 0)
    restored.set_state(state)
    assert_equal(take(restored, EPOCH), expected)
    # An iterator that has already read, and prefetched, can be set back too.
    restored.set_state(state)
    assert_equal(take(restored, EPOCH), expected)


def test_the_rows_of_all_processes_make_the_batch_and_the_state_is_the_same(encoded):
    every = answers.batches(encoded, 128, 4, 0)
    parts = [answers.batches(encoded, 128, 4, 0, rows) for rows in ([0, 3], [2], [1])]
    for _ in range(10):
        batch, (first, second, third) = next(every), [next(part) for part in parts]
        for name in batch:
            together = [first[name][0], third[name][0], second[name][0], first[name][1]]
            np.testing.assert_array_equal(batch[name], together)
        assert all(part.get_state() == every.get_state() for part in parts)
    # A process with other rows goes on where one with these stopped.
    other = answers.batches(encoded, 128, 4, 0, [1, 2])
    other.set_state(parts[0].get_state())
    assert_equal([next(other)], [{name: value[[1, 2]] for name, value in next(every).items()}])


def test_held_out_batches_have_every_example_once(encoded):
    batches = answers.held_out_batches(encoded, 128, 4)
    assert Counter(key for batch in batches for key in segments(batch)) == Counter(keys(encoded))
    assert_equal(batches, answers.held_out_batches(encoded, 128, 4))
    place = {key: i for i, key in enumerate(keys(encoded))}
    windows = [
        {name: value[[row]] for name, value in b.items()} for b in batches for row in range(4)
    ]
    begins = [place[next(segments(window))] for window in windows if window["segments"].any()]
    assert begins == sorted(begins)
    assert all(batch["tokens"].shape == (4, 129) for batch in batches)
    assert_equal(
        answers.held_out_batches(encoded, 128, 4, [3, 1]),
        [{name: value[[3, 1]] for name, value in batch.items()} for batch in batches],
    )


def test_the_last_held_out_batch_is_filled_up_with_empty_windows(encoded):
    (batch,) = answers.held_out_batches(encoded[:2], 256, 4)
    assert [numbers.max() for numbers in batch["segments"]] == [2, 0, 0, 0]
    assert not any(value[1:].any() for value in batch.values())
    assert [value.dtype for value in batch.values()] == [np.int32, np.int32, np.int32, np.bool_]


def test_examples_longer_than_a_window_are_counted_and_the_length_that_would_do_is_named(
    tokenizer, encoded
):
    lengths = sorted(len(e.tokens) for e in encoded)
    seq_len = lengths[-4] - 1
    too_long = sum(length > seq_len + 1 for length in lengths)
    told = f"`seq_len` is {seq_len}; {too_long} of 90 .* would suffice"
    with pytest.raises(ConfigError, match=told):
        answers.encode(examples(), tokenizer, seq_len)
    assert len(answers.encode(examples(), tokenizer, lengths[-1] - 1)) == 90


def test_a_template_that_gives_the_prompt_otherwise_is_refused():
    template = "{{ messages | length }} {{ messages[0].content }}: {{ messages[-1].content }}"
    with pytest.raises(ConfigError, match=r"`model`: .* does not begin as the prompt.*'0: say"):
        answers.encode(examples(), tokenizer_of(template), 128)


def test_a_tokenizer_must_be_able_to_end_an_answer():
    tokenizer = tokenizer_of(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"`model`: .* no token that ends"):
        answers.encode(examples(), tokenizer, 128)

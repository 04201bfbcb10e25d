"""Examples to batches for supervised fine-tuning: chat template, answer mask, packed windows.

A window holds several whole examples, one after the other; what remains at its end is padding. An
example's positions start at 0, and its segment number tells it from its neighbours.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, ThreadPrefetchIterDataset

from experiments.data import templates
from experiments.tasks.base import Example
from experiments.trainer.options import ConfigError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, np.ndarray]

# Batches packed at once in training: on GSM8K, with 8 windows of 512, 8 % of the tokens are padding
# with 4, 11 % with 1 and 7 % with 16.
_TOGETHER = 4
_SERIAL = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the examples are in memory


class Encoded(NamedTuple):
    """Tokens of an example up to the one that ends the turn, and which of them are the answer."""

    tokens: np.ndarray
    answer: np.ndarray


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", seq_len: int
) -> list[Encoded]:
    """Tokens of each example, with the tokenizer's chat template if it has one.

    Without a template an example is prompt, line break, answer and the end-of-text token. The
    answer includes the token that ends it, and nothing that a template puts after that.

    Raises:
      ConfigError: an example is longer than a window, or the template does not let an answer
        follow the prompt as it is given in generation.
    """
    end = _end_of_turn(tokenizer)
    prompts, wholes = _ids(examples, tokenizer), _ids(examples, tokenizer, answered=True)
    _check_begins(examples, prompts, wholes)
    encoded = [_encoded(*pair, end) for pair in zip(prompts, wholes, strict=True)]
    _check_lengths(encoded, seq_len)
    return encoded


def prompt_ids(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast"
) -> list[list[int]]:
    """For each example, the tokens after which the model is to generate an answer."""
    return _ids(examples, tokenizer)


def stop_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """The tokens that end an answer: of the text, and of the turn in the chat template."""
    end_of_text: Any = tokenizer.eos_token_id
    return {_end_of_turn(tokenizer)} | ({end_of_text} - {None})


def longest_answer(encoded: Sequence[Encoded]) -> int:
    """The most tokens of an answer, with the one that ends it."""
    return max(int(example.answer.sum()) for example in encoded)


def batches(
    encoded: Sequence[Encoded],
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of packed batches; the examples are shuffled anew in each epoch.

    Each batch is of arrays `[len(rows), seq_len + 1]`: int32 `tokens`, `positions` and `segments`
    (0 is padding), and bool `answer`. Examples come in the order of the shuffle, but for the
    packing of a few batches together. `get_state()` and `set_state()` resume exactly; the state is
    the same whatever the rows: each process packs all of them.
    """
    order = grain.MapDataset.source(encoded).shuffle(seed).repeat()
    windows = _pack(order, seq_len, batch_size * _TOGETHER, shuffle=True)
    stacked = windows.batch(batch_size, batch_fn=lambda batch: _stack(batch, rows))
    return iter(ThreadPrefetchIterDataset(stacked, prefetch_buffer_size=2 * _TOGETHER))


def held_out_batches(
    encoded: Sequence[Encoded], seq_len: int, batch_size: int, rows: Sequence[int] | None = None
) -> list[Batch]:
    """All examples in order, packed; the last batch is filled up with empty windows."""
    windows = list(_pack(grain.MapDataset.source(encoded), seq_len, batch_size, shuffle=False))
    empty = {name: np.zeros_like(value) for name, value in windows[0].items()}
    windows += [empty] * (-len(windows) % batch_size)
    starts = range(0, len(windows), batch_size)
    return [_stack(windows[start : start + batch_size], rows) for start in starts]


def _end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The special token that the chat template puts after an answer, or that of the text's end."""
    probe = [Example("a", "b")]
    (prompt,), (whole,) = _ids(probe, tokenizer), _ids(probe, tokenizer, answered=True)
    added = tokenizer.added_tokens_decoder
    special = [token for token in whole[len(prompt) :] if token in added and added[token].special]
    if special:
        return special[0]
    end_of_text: Any = tokenizer.eos_token_id
    if end_of_text is None:
        raise ConfigError("`model`: its tokenizer has no token that ends a text or a turn")
    return end_of_text


def _ids(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", *, answered: bool = False
) -> list[list[int]]:
    """Token numbers of each prompt, ready for its answer, or of each example with its answer."""
    template = bool(tokenizer.chat_template)
    render = partial(_render, tokenizer) if template else _plain
    # A template writes special tokens itself.
    return tokenizer(render(examples, answered), add_special_tokens=not template)["input_ids"]


def _plain(examples: Sequence[Example], answered: bool) -> list[str]:
    return [f"{e.prompt}\n{e.answer if answered else ''}" for e in examples]


def _render(
    tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], answered: bool
) -> list[str]:
    turns = [
        [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.answer}]
        for e in examples
    ]
    try:
        template = tokenizer.get_chat_template()
    except Exception as error:  # several templates, and none of them is the default
        raise ConfigError(f"`model`: its tokenizer's chat template: {reason(error)}") from error
    return templates.render(
        template,
        turns if answered else [both[:1] for both in turns],
        dict(tokenizer.special_tokens_map),
        generate=not answered,
    )


def _encoded(prompt: list[int], whole: list[int], end: int) -> Encoded:
    """Cut after the last `end`; one that is missing is added."""
    answer = whole[len(prompt) :] if end in whole[len(prompt) :] else [*whole[len(prompt) :], end]
    while answer[-1] != end:
        answer.pop()
    tokens = np.asarray([*prompt, *answer], np.int32)
    return Encoded(tokens, np.arange(len(tokens)) >= len(prompt))


def _check_begins(examples: Sequence[Example], prompts: list, wholes: list) -> None:
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise ConfigError(
                "`model`: with its tokenizer and template a prompt with an answer does not begin "
                "as the prompt alone does: generation would differ from training; the first is "
                f"{example.prompt[:80]!r}"
            )


def _check_lengths(encoded: Sequence[Encoded], seq_len: int) -> None:
    lengths = [len(example.tokens) for example in encoded]
    too_long = sum(length > seq_len + 1 for length in lengths)
    if too_long:
        raise ConfigError(
            f"`seq_len` is {seq_len}; {too_long} of {len(lengths)} examples are longer than a "
            f"window; {max(lengths) - 1} would do"
        )


def _pack(
    order: grain.MapDataset[Encoded], seq_len: int, windows: int, *, shuffle: bool
) -> grain.IterDataset[Batch]:
    """Windows packed so many at a time, each time until the next example fits in none of them."""
    return BestFitPackIterDataset(
        order.map(Encoded._asdict).to_iter_dataset(_SERIAL),
        length_struct={"tokens": seq_len + 1, "answer": seq_len + 1},
        num_packing_bins=windows,
        meta_features=("answer",),  # its segments and positions are those of the tokens
        shuffle_bins=shuffle,
    )


def _stack(windows: Sequence[Batch], rows: Sequence[int] | None) -> Batch:
    """The given rows of a batch; all of them if none are given."""
    chosen = windows if rows is None else [windows[row] for row in rows]
    names = {"tokens": "tokens", "positions": "tokens_positions"}
    names |= {"segments": "tokens_segment_ids", "answer": "answer"}
    return {name: np.stack([window[key] for window in chosen]) for name, key in names.items()}

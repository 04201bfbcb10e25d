"""Batches for supervised fine-tuning: chat template, answer mask, packed windows.

1. Render each example as text with the tokenizer's chat template, and encode it.
2. Mark the tokens of its answer: only they count in the loss.
3. Pack whole examples into windows, one after the other; the end of a window is padding. Positions
   of an example start at 0, and its segment number separates it from its neighbours.

In training an example is encoded with its answer, in generation its prompt alone. Both must agree
up to the answer, or the model would be trained on other prompts than it is asked (`_check_begins`).
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

# Batches that are packed at a time in training. On GSM8K, with 8 windows of 512 tokens, the share
# of padding is 11 % with 1, 8 % with 4 and 7 % with 16.
_TOGETHER = 4
_SERIAL = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the examples are in memory


class Encoded(NamedTuple):
    """An example: int32 `[L]` tokens up to the end of the turn, and the bool `[L]` answer mask."""

    tokens: np.ndarray
    answer: np.ndarray


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerFast", seq_len: int
) -> list[Encoded]:
    """Encodes each example, with the tokenizer's chat template if it has one.

    Without a template, an example is prompt, line break, answer and the end-of-text token. The
    answer includes the token that ends it, and nothing that a template adds after that.

    Args:
      examples: prompts with answers.
      tokenizer: the tokenizer.
      seq_len: tokens in a window; an example may have one more, as the last token is only a target.

    Raises:
      ConfigError: an example is longer than a window, or does not begin with its prompt as given in
        generation.
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
    """Returns the tokens of each example after which the model generates an answer."""
    return _ids(examples, tokenizer)


def stop_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Returns the tokens that end an answer: at the end of the text or of the assistant's turn."""
    end_of_text: Any = tokenizer.eos_token_id
    return {_end_of_turn(tokenizer)} | ({end_of_text} - {None})


def longest_answer(encoded: Sequence[Encoded]) -> int:
    """Returns the number of tokens of the longest answer, including the one that ends it."""
    return max(int(example.answer.sum()) for example in encoded)


def batches(
    encoded: Sequence[Encoded],
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator of packed batches, reshuffled in each epoch.

    A batch has arrays `[len(rows), seq_len + 1]`: int32 `tokens`, `positions` and `segments` (0 is
    padding), and bool `answer`. Examples come in shuffled order, except that a few batches are
    packed together. `get_state()` and `set_state()` resume exactly. The state does not depend on
    the rows, as each process packs all of them.

    Args:
      encoded: the examples.
      seq_len: tokens in a window; a row has one more, for the last target.
      batch_size: windows in a batch of all processes.
      seed: seed of the order.
      rows: the windows of each batch that this process reads. None: all.
    """
    # 1. Examples in order, packed into the windows of four batches at a time.
    order = grain.MapDataset.source(encoded).shuffle(seed).repeat()
    windows = _pack(order, seq_len, batch_size * _TOGETHER, shuffle=True)
    # 2. Rows of batches, prepared in a thread ahead of training.
    stacked = windows.batch(batch_size, batch_fn=lambda batch: _stack(batch, rows))
    return iter(ThreadPrefetchIterDataset(stacked, prefetch_buffer_size=2 * _TOGETHER))


def held_out_batches(
    encoded: Sequence[Encoded], seq_len: int, batch_size: int, rows: Sequence[int] | None = None
) -> list[Batch]:
    """Returns packed batches of all examples in order; empty windows fill the last batch."""
    windows = list(_pack(grain.MapDataset.source(encoded), seq_len, batch_size, shuffle=False))
    empty = {name: np.zeros_like(value) for name, value in windows[0].items()}
    windows += [empty] * (-len(windows) % batch_size)
    starts = range(0, len(windows), batch_size)
    return [_stack(windows[start : start + batch_size], rows) for start in starts]


def _end_of_turn(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Returns the special token after an answer in the template, or else the end-of-text token."""
    # The first special token after a short answer; neither letter is one.
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
    """Returns the token ids of each prompt, ready for its answer, or of each example as a whole."""
    template = bool(tokenizer.chat_template)
    render = partial(_render, tokenizer) if template else _plain
    # A template writes special tokens itself; the tokenizer would add a second start of text.
    return tokenizer(render(examples, answered), add_special_tokens=not template)["input_ids"]


def _plain(examples: Sequence[Example], answered: bool) -> list[str]:
    """Renders examples without a template."""
    return [f"{e.prompt}\n{e.answer if answered else ''}" for e in examples]


def _render(
    tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], answered: bool
) -> list[str]:
    """Renders examples by the chat template: a user's turn and, if answered, the assistant's."""
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
    """Cuts an example after its last `end` token, which is added if missing; marks its answer."""
    answer = whole[len(prompt) :] if end in whole[len(prompt) :] else [*whole[len(prompt) :], end]
    while answer[-1] != end:
        answer.pop()
    tokens = np.asarray([*prompt, *answer], np.int32)
    return Encoded(tokens, np.arange(len(tokens)) >= len(prompt))


def _check_begins(examples: Sequence[Example], prompts: list, wholes: list) -> None:
    """Raises `ConfigError` unless each example begins with the tokens of its prompt."""
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise ConfigError(
                "`model`: with its tokenizer and template, a prompt with its answer does not begin "
                "as the prompt alone, so generation would differ from training; the first is "
                f"{example.prompt[:80]!r}"
            )


def _check_lengths(encoded: Sequence[Encoded], seq_len: int) -> None:
    """Raises `ConfigError` if an example does not fit a window of `seq_len + 1` tokens."""
    lengths = [len(example.tokens) for example in encoded]
    too_long = sum(length > seq_len + 1 for length in lengths)
    if too_long:
        raise ConfigError(
            f"`seq_len` is {seq_len}; {too_long} of {len(lengths)} examples are longer than a "
            f"window; {max(lengths) - 1} would suffice"
        )


def _pack(
    order: grain.MapDataset[Encoded], seq_len: int, windows: int, *, shuffle: bool
) -> grain.IterDataset[Batch]:
    """Packs so many windows at a time, each time until the next example fits in none of them."""
    # Best fit: an example goes into the fullest window with room for it.
    return BestFitPackIterDataset(
        order.map(Encoded._asdict).to_iter_dataset(_SERIAL),
        length_struct={"tokens": seq_len + 1, "answer": seq_len + 1},
        num_packing_bins=windows,
        meta_features=("answer",),  # its segments and positions are those of the tokens
        shuffle_bins=shuffle,
    )


def _stack(windows: Sequence[Batch], rows: Sequence[int] | None) -> Batch:
    """Stacks the given rows of a batch, all if `rows` is None, under the names of `Batch`."""
    chosen = windows if rows is None else [windows[row] for row in rows]
    # Our name of an array -> grain's name.
    names = {"tokens": "tokens", "positions": "tokens_positions"}
    names |= {"segments": "tokens_segment_ids", "answer": "answer"}
    return {name: np.stack([window[key] for window in chosen]) for name, key in names.items()}

"""Parts that tasks share: items, judges of answers, and the choice of held-out items.

An *item* (`Example`) is a prompt with the answer to learn. No item is both for training and held
out: if its source does not have splits, a hash of its prompt decides, so that equal prompts are on
the same side.

An answer may be a chain of thought that ends with `####` and a *result*, as in GSM8K; the result
alone is judged.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from experiments.data import text as corpus
from experiments.trainer.options import ConfigError

HELD_OUT_SHARE = 0.2  # of the prompts of a source without splits

_MARK = "####"
# A minus sign, unless it follows a digit or a point as in 5-3; a dollar sign; digits with commas;
# decimals.
_NUMBER = re.compile(r"(?:(?<![\d.])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile("<<[^<>]*>>")  # GSM8K's calculator calls, such as <<48/2=24>>


@dataclasses.dataclass(frozen=True)
class Example:
    """An item: a prompt, and the whole text to learn, chain of thought included."""

    prompt: str
    answer: str


class Task(NamedTuple):
    """Items to train on, held-out items, and `correct(text, item)`, the judge of an answer."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    correct: Callable[[str, Example], bool]


class Items(NamedTuple):
    """Items of a source by their use."""

    train: Sequence[Example]
    held_out: Sequence[Example]


class Sizes(NamedTuple):
    """Numbers of items, and the seed of those to train on and of their order.

    Held-out items are the same for every seed, so that runs can be compared item by item.
    """

    train_examples: int
    eval_examples: int
    seed: int


def same_result(text: str, example: Example) -> bool:
    """Whether a text comes to the example's result, judged as in GSM8K's evaluation.

    The result of an answer is the text after its last `####`. If the result is a number, a text is
    right if the number after its own last `####`, or else its last number, is equal; `$`, commas
    and a full stop are ignored. Any other result, or an answer without `####`, must be repeated
    exactly.

    Args:
      text: the generated answer.
      example: the item with the expected answer.
    """
    expected = _result(example.answer)
    if _MARK in example.answer and _NUMBER.fullmatch(expected):
        return stated_number(text) == stated_number(example.answer)
    return _result(text) == expected if _MARK in example.answer else text.strip() == expected


def stated_number(text: str) -> Decimal | None:
    """Returns the first number after the last `####`, or else the last number in the text."""
    numbers = _NUMBER.findall(_result(text))
    if not numbers:
        return None
    # Decimal: 18 and 18.00 are equal, and no decimal is rounded.
    return Decimal(re.sub("[$,]", "", numbers[0 if _MARK in text else -1]))


def same_number(text: str, example: Example) -> bool:
    """Whether the number that a text states, alone or last in a sentence, equals the answer."""
    return stated_number(text) == Decimal(example.answer)


def example(prompt: str, answer: str) -> Example:
    """Makes an item, without white space around the answer and without GSM8K's annotations."""
    answer = answer.strip()
    return Example(prompt, _ANNOTATION.sub("", answer) if _MARK in answer else answer)


def is_held_out(example: Example) -> bool:
    """Whether an item of a source without splits is held out, by a hash of its prompt."""
    return corpus.held_out(example.prompt, HELD_OUT_SHARE)


def generate(
    name: str, answer: Callable[[dict[str, Any]], str], sizes: Sizes, **options: int
) -> Items:
    """Generates items of a data set of reasoning-gym, as many as asked for.

    Args:
      name: the data set.
      answer: from a generated item to the text to learn.
      sizes: numbers of items, and their seed.
      **options: options of the data set.
    """
    # Two streams: held-out items from seed 0 in every run, training items from any other. The same
    # prompt may come in both, so each stream keeps the prompts of its side only.
    train, held_out = (_stream(name, answer, seed, options) for seed in (sizes.seed + 1, 0))
    return Items(
        list(itertools.islice(itertools.filterfalse(is_held_out, train), sizes.train_examples)),
        list(itertools.islice(filter(is_held_out, held_out), sizes.eval_examples)),
    )


def sample(items: Items, name: str, sizes: Sizes) -> Items:
    """Draws as many items as asked for from all items of a source.

    Args:
      items: all items of the source.
      name: its name, for messages.
      sizes: numbers of items, and their seed.

    Raises:
      ConfigError: the source has fewer.
    """
    train, held_out = len(items.train), len(items.held_out)
    wanted = {
        "train_examples": (sizes.train_examples, train),
        "eval_examples": (sizes.eval_examples, held_out),
    }
    for field, (asked, there) in wanted.items():
        if asked > there:
            raise ConfigError(
                f"`{field}` is {asked}; {name} has {train} items to train on "
                f"and {held_out} held out"
            )
    # Held-out items with the fixed seed 0: the same in every run.
    return Items(
        _draw(items.train, sizes.train_examples, sizes.seed),
        _draw(items.held_out, sizes.eval_examples, 0),
    )


def _result(text: str) -> str:
    """Returns the text after the last `####`; all of it if there is none."""
    return text.rpartition(_MARK)[2].strip()


def _stream(
    name: str, answer: Callable[[dict[str, Any]], str], seed: int, options: dict[str, int]
) -> Iterator[Example]:
    """Yields generated items without end.

    A data set of reasoning-gym draws item `i` from its seed plus `i`, so that neighbouring seeds
    share nearly all items. Streams of different seeds are 2^32 items apart.
    """
    import reasoning_gym  # slow to import

    # reasoning-gym has data sets of a fixed size: one after the other makes a stream.
    size = 1024
    for start in itertools.count(seed * 2**32, size):
        for item in reasoning_gym.create_dataset(name, size=size, seed=start, **options):
            yield example(item["question"], answer(item))


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Returns `count` examples in random order."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[:count]]

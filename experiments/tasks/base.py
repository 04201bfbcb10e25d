"""What tasks share: items, what counts as a right answer, and which items are held out.

An item is never both for training and held out: where the source does not say which it is, a hash
of its prompt decides, so that equal prompts are on one side.
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

HELD_OUT_SHARE = 0.2  # of the prompts, where the source has no held-out items of its own

_MARK = "####"
_NUMBER = re.compile(r"(?:(?<![\d.])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile("<<[^<>]*>>")  # GSM8K's calls of a calculator, as in <<48/2=24>>


@dataclasses.dataclass(frozen=True)
class Example:
    """An item: what is asked, and all the text to be learned, chain of thought included."""

    prompt: str
    answer: str


class Task(NamedTuple):
    """Items to train on, items held out, and how a generated answer to one is judged."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    correct: Callable[[str, Example], bool]


class Items(NamedTuple):
    """All items of a source."""

    train: Sequence[Example]
    held_out: Sequence[Example]


class Sizes(NamedTuple):
    """How many items are wanted, and the seed of those to train on and of their order.

    The held-out items are the same for every seed, so that runs can be compared item by item.
    """

    train_examples: int
    eval_examples: int
    seed: int


def same_result(text: str, example: Example) -> bool:
    """Whether a text comes to the example's result, as GSM8K's evaluation judges it.

    The result of an answer is what follows its last `####`. If that is a number, the text is right
    when the number it gives there, or else its last number, is equal; `$`, commas and a full stop
    do not count. Any other result, or an answer without `####`, must be repeated exactly.
    """
    expected = _result(example.answer)
    if _MARK in example.answer and _NUMBER.fullmatch(expected):
        return stated_number(text) == stated_number(example.answer)
    return _result(text) == expected if _MARK in example.answer else text.strip() == expected


def stated_number(text: str) -> Decimal | None:
    """The number after the last `####`, without one the last number in the text, if any."""
    numbers = _NUMBER.findall(_result(text))
    if not numbers:
        return None
    return Decimal(re.sub("[$,]", "", numbers[0 if _MARK in text else -1]))


def same_number(text: str, example: Example) -> bool:
    """Whether the number that a text states, alone or last in a sentence, is the answer."""
    return stated_number(text) == Decimal(example.answer)


def example(prompt: str, answer: str) -> Example:
    """White space around an answer is left out, and GSM8K's annotations are."""
    answer = answer.strip()
    return Example(prompt, _ANNOTATION.sub("", answer) if _MARK in answer else answer)


def is_held_out(example: Example) -> bool:
    """Whether an item is held out where its source does not say, by a hash of its prompt."""
    return corpus.held_out(example.prompt, HELD_OUT_SHARE)


def generate(
    name: str, answer: Callable[[dict[str, Any]], str], sizes: Sizes, **options: int
) -> Items:
    """Items of a data set of reasoning-gym, as many as are wanted.

    Args:
      name: the data set.
      answer: from a generated item to the text that is to be learned.
      sizes: how many items, and their seed.
      **options: of the data set.
    """
    train, held_out = (_stream(name, answer, seed, options) for seed in (sizes.seed + 1, 0))
    return Items(
        list(itertools.islice(itertools.filterfalse(is_held_out, train), sizes.train_examples)),
        list(itertools.islice(filter(is_held_out, held_out), sizes.eval_examples)),
    )


def sample(items: Items, name: str, sizes: Sizes) -> Items:
    """Draws as many items as are wanted from all those of a source.

    Raises:
      ConfigError: there are fewer.
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
    return Items(
        _draw(items.train, sizes.train_examples, sizes.seed),
        _draw(items.held_out, sizes.eval_examples, 0),
    )


def _result(text: str) -> str:
    return text.rpartition(_MARK)[2].strip()


def _stream(
    name: str, answer: Callable[[dict[str, Any]], str], seed: int, options: dict[str, int]
) -> Iterator[Example]:
    """Generated items without end.

    A data set of reasoning-gym draws item `i` from its seed plus `i`, so that neighbouring seeds
    share nearly all items. Seeds here are 2^32 items apart.
    """
    import reasoning_gym  # slow to import

    size = 1024
    for start in itertools.count(seed * 2**32, size):
        for item in reasoning_gym.create_dataset(name, size=size, seed=start, **options):
            yield example(item["question"], answer(item))


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[:count]]

"""Tasks with a score: prompts, answers to learn, and what counts as a right answer.

Items are generated (reasoning-gym), read from local files, or a Hugging Face data set. An item is
never both for training and held out: where the source does not say which it is, a hash of its
prompt decides, so that equal prompts are on one side.
"""

import dataclasses
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import text
from experiments.trainer.config import ConfigError, choose, flag

HELD_OUT_SHARE = 0.2  # of the prompts, where the source has no held-out items of its own

_MARK = "####"
_NUMBER = re.compile(r"(?:(?<![\d.])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOTATION = re.compile("<<[^<>]*>>")  # GSM8K's calls of a calculator, as in <<48/2=24>>
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SPLITS = ("test", "validation")  # the first there is holds the held-out items
_SUFFIXES = (".jsonl", ".jsonl.xz")


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


class Generator(NamedTuple):
    """A data set of reasoning-gym: its options, the text to be learned, and the judge."""

    options: dict[str, int]
    answer: Callable[[dict[str, Any]], str]
    correct: Callable[[str, Example], bool]


def load(
    name: str,
    *,
    train_examples: int,
    eval_examples: int,
    seed: int,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> Task:
    """The task called `name`, with as many items as asked for.

    Args:
      name: `chain_sum` (sums and differences of two numbers, both of one digit or both of two) or
        `gsm_symbolic`, generated; `gsm8k`; a `.jsonl` or `.jsonl.xz` file; a directory with such
        files called train and test; a data set on the Hugging Face hub, as `name[:subset]`.
      train_examples: number of items to train on.
      eval_examples: number of held-out items.
      seed: which items to train on, and their order. The held-out ones are the same for every
        seed, so that runs can be compared item by item.
      prompt_field: column of prompts in files and data sets.
      answer_field: column of answers.

    Raises:
      ConfigError: the items cannot be read, or there are too few.
    """
    if name in _GENERATORS or name in _FIELDS:
        _check_default("prompt_field", prompt_field, "prompt", name)
        _check_default("answer_field", answer_field, "answer", name)
    if name in _GENERATORS:
        items = _generate(name, train_examples, eval_examples, seed)
        return Task(name, *items, _GENERATORS[name].correct)
    source, fields = _FIELDS.get(name, (name, (prompt_field, answer_field)))
    items = _sample(_read(source, fields), name, train_examples, eval_examples, seed)
    return Task(name, *items, same_result)


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


_TWO_SHORT_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
_GENERATORS = {
    "chain_sum": Generator(_TWO_SHORT_TERMS, lambda item: item["answer"], same_number),
    "gsm_symbolic": Generator({}, lambda item: item["metadata"]["answer_cot"], same_result),
}
# Data sets with a short name: the name on the hub, and the columns.
_FIELDS = {"gsm8k": ("openai/gsm8k:main", ("question", "answer"))}


def _result(text: str) -> str:
    return text.rpartition(_MARK)[2].strip()


def _example(prompt: str, answer: str) -> Example:
    """White space around an answer is left out, and GSM8K's annotations are."""
    answer = answer.strip()
    return Example(prompt, _ANNOTATION.sub("", answer) if _MARK in answer else answer)


def _held_out(example: Example) -> bool:
    return text.held_out(example.prompt, HELD_OUT_SHARE)


def _check_default(field: str, value: str, default: str, name: str) -> None:
    if value != default:
        raise ConfigError(f"{flag(field)} has no effect on {name}, whose columns are known")


def _generate(name: str, train_examples: int, eval_examples: int, seed: int) -> Items:
    train, held_out = _stream(name, seed + 1), _stream(name, 0)
    return Items(
        list(itertools.islice(itertools.filterfalse(_held_out, train), train_examples)),
        list(itertools.islice(filter(_held_out, held_out), eval_examples)),
    )


def _stream(name: str, seed: int) -> Iterator[Example]:
    """Generated items without end.

    A data set of reasoning-gym draws item `i` from its seed plus `i`, so that neighbouring seeds
    share nearly all items. Seeds here are 2^32 items apart.
    """
    import reasoning_gym  # slow to import

    options, answer, _ = _GENERATORS[name]
    size = 1024
    for start in itertools.count(seed * 2**32, size):
        for item in reasoning_gym.create_dataset(name, size=size, seed=start, **options):
            yield _example(item["question"], answer(item))


def _sample(items: Items, name: str, train_examples: int, eval_examples: int, seed: int) -> Items:
    train, held_out = len(items.train), len(items.held_out)
    wanted = {"train_examples": (train_examples, train), "eval_examples": (eval_examples, held_out)}
    for field, (asked, there) in wanted.items():
        if asked > there:
            raise ConfigError(
                f"{flag(field)} is {asked}; {name} has {train} items to train on "
                f"and {held_out} held out"
            )
    return Items(_draw(items.train, train_examples, seed), _draw(items.held_out, eval_examples, 0))


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order[:count]]


def _read(name: str, fields: tuple[str, str]) -> Items:
    """All items of a source, without training items that ask the same as one held out."""
    splits = _splits(name)

    def examples(split: str) -> list[Example]:
        found = [_of_row(row, name, fields) for row in splits[split]]
        if not found:
            raise ConfigError(f"--task: {name} holds no {split} items")
        return found

    train = examples("train")
    split = next((split for split in _SPLITS if split in splits), None)
    if split is None:
        return Items(list(itertools.filterfalse(_held_out, train)), list(filter(_held_out, train)))
    held_out = examples(split)
    prompts = {example.prompt for example in held_out}
    return Items([example for example in train if example.prompt not in prompts], held_out)


def _of_row(row: Mapping[str, Any], name: str, fields: tuple[str, str]) -> Example:
    prompt, answer = map(partial(_text, row, name), fields, ("prompt_field", "answer_field"))
    return _example(prompt, answer)


def _text(row: Mapping[str, Any], name: str, column: str, field: str) -> str:
    if column not in row:
        raise ConfigError(
            f"{flag(field)}: {name} has no column {column!r}; its columns are {', '.join(row)}"
        )
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float):
        return str(value)
    raise ConfigError(
        f"{flag(field)}: column {column!r} of {name} has {value!r} where text should be"
    )


def _splits(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The rows of a source by split; one file is all for training, to be divided."""
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": _rows(path)}
    if path.is_dir():
        return _directory(path)
    if not name.endswith(_SUFFIXES) and _HUB_NAME.fullmatch(name):
        return _hub(name)
    if "/" not in name and not name.endswith(_SUFFIXES):
        choose("task", name, [*_GENERATORS, *_FIELDS])
    raise ConfigError(f"--task: there is no file or directory {name}")


def _directory(path: Path) -> dict[str, Iterator[dict[str, Any]]]:
    files = {
        split: file
        for split in ("train", *_SPLITS)
        for suffix in _SUFFIXES
        if (file := path / (split + suffix)).is_file()
    }
    if "train" not in files:
        raise ConfigError(f"--task: {path} has no train.jsonl or train.jsonl.xz")
    return {split: _rows(file) for split, file in files.items()}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a `.jsonl` file, which may be compressed by xz."""
    read = lzma.open if file.suffix == ".xz" else open
    try:
        with read(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"line {number} of {file}")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigError(f"--task: cannot read {file}: {error}") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"--task: {where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"--task: {where} is no JSON object, but {line.strip()[:80]}")
    return row


def _hub(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    import datasets  # slow to import, and needed here only

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
    hub, _, subset = name.partition(":")
    try:
        splits: Any = datasets.load_dataset(hub, subset or None)
    except Exception as error:  # `datasets` raises many types; each means: cannot be read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"--task: cannot read {name}: {reason}") from error
    if "train" not in splits:
        raise ConfigError(f"--task: {name} has no train split; its splits are {', '.join(splits)}")
    return splits

"""Tasks from a user's data: .jsonl files, a directory of them, or a data set on the hub.

A source with a test or validation split holds out those items, and drops training items with the
same prompt. A source without one is divided by `base.is_held_out`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.data import rows
from experiments.tasks.base import (
    Example,
    Items,
    Sizes,
    Task,
    example,
    is_held_out,
    same_result,
    sample,
)
from experiments.trainer.options import ConfigError, one_line, reason

_SPLITS = ("test", "validation")  # the first one that exists has the held-out items
_SUFFIXES = (".jsonl", ".jsonl.xz")


def load(name: str, sizes: Sizes, prompt_field: str, answer_field: str) -> Task:
    """Loads the items of a file, directory or data set; answers are judged by `same_result`.

    Args:
      name: a file, a directory, or a data set on the Hugging Face hub as `owner/name[:subset]`.
      sizes: numbers of items, and their seed.
      prompt_field: column of prompts.
      answer_field: column of answers.

    Raises:
      ConfigError: the items cannot be read, or there are too few.
    """
    items = sample(_read(name, (prompt_field, answer_field)), name, sizes)
    return Task(name, *items, same_result)


def is_source(name: str) -> bool:
    """Whether a name can stand for a file, a directory or a data set."""
    there = Path(name).expanduser().exists()
    return there or "/" in name or name.endswith(_SUFFIXES)


def _read(name: str, fields: tuple[str, str]) -> Items:
    """Reads all items of a source, without training items whose prompt is held out."""
    splits = _splits(name)

    def examples(split: str) -> list[Example]:
        found = [_of_row(row, name, fields) for row in splits[split]]
        if not found:
            raise ConfigError(f"`task`: {name} holds no {split} items")
        return found

    # 1. Training items, or all items of a source without splits, which are divided here.
    train = examples("train")
    split = next((split for split in _SPLITS if split in splits), None)
    if split is None:
        return Items(
            list(itertools.filterfalse(is_held_out, train)), list(filter(is_held_out, train))
        )
    # 2. Held-out items; public data sets repeat some of them among the training items.
    held_out = examples(split)
    prompts = {item.prompt for item in held_out}
    return Items([item for item in train if item.prompt not in prompts], held_out)


def _of_row(row: Mapping[str, Any], name: str, fields: tuple[str, str]) -> Example:
    """Makes an item from the two columns of a row."""
    prompt, answer = map(partial(_text, row, name), fields, ("prompt_field", "answer_field"))
    return example(prompt, answer)


def _text(row: Mapping[str, Any], name: str, column: str, field: str) -> str:
    """Returns the text in a column; raises `ConfigError` about the option that names the column."""
    if column not in row:
        raise ConfigError(
            f"`{field}`: {name} has no column {column!r}; its columns are "
            f"{one_line(', '.join(map(str, row)))}"
        )
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    # Answers of arithmetic data sets may be numbers.
    if isinstance(value, int | float):
        return str(value)
    raise ConfigError(
        f"`{field}`: column {column!r} of {name} has {one_line(repr(value), 80)} where text "
        "should be"
    )


def _splits(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Returns the rows of a source by split; a file is one split, "train", to be divided."""
    path = Path(name).expanduser()
    # A path that exists wins over the name of a data set.
    if path.is_file():
        return {"train": rows.read(path, "task", kept=True)}
    if path.is_dir():
        return _directory(path)
    if not name.endswith(_SUFFIXES) and rows.HUB_NAME.fullmatch(name):
        return _hub(name)
    raise ConfigError(f"`task`: there is no file or directory {name}")


def _directory(path: Path) -> dict[str, Iterator[dict[str, Any]]]:
    """Returns the rows of the files in a directory that have the name of a split."""
    files = {
        split: file
        for split in ("train", *_SPLITS)
        for suffix in _SUFFIXES
        if (file := path / (split + suffix)).is_file()
    }
    if "train" not in files:
        raise ConfigError(f"`task`: {path} has no train.jsonl or train.jsonl.xz")
    return {split: rows.read(file, "task", kept=True) for split, file in files.items()}


def _hub(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Loads a data set of the Hugging Face hub."""
    import datasets  # slow to import, and needed here only

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
    hub, _, subset = name.partition(":")
    try:
        splits: Any = datasets.load_dataset(hub, subset or None)
    except Exception as error:  # `datasets` raises many types; each means that it cannot be read
        raise ConfigError(f"`task`: cannot read {name}: {reason(error)}") from error
    if "train" not in splits:
        raise ConfigError(f"`task`: {name} has no train split; its splits are {', '.join(splits)}")
    return splits

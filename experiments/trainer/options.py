"""Dataclasses of options with their checks, and `ConfigError`, the error for a user's mistake.

A dataclass of options derives from `Checked`. A field with values of its type that are not allowed
is made by `option`, with a default and checks:

    @dataclasses.dataclass(frozen=True)
    class Walk(Checked):
        steps: int = option(600, at_least(1))

`Walk(steps=0)` then raises "`steps` is 0; it must be at least 1", in Python and on the command
line. None stands for "not given" and passes every check.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A mistake of the user who started a run; the text is one line and names the option."""


class Check(NamedTuple):
    """A condition on a value: a predicate, and its wording after "it must be"."""

    holds: Callable[[Any], bool]
    reason: str


def at_least(least: int) -> Check:
    """Requires a number that is not smaller than `least`."""
    return Check(lambda value: value >= least, f"at least {least}")


def one_of(names: Iterable[str]) -> Check:
    """Requires one of `names`."""
    names = list(names)
    return Check(lambda value: value in names, f"one of {', '.join(names)}")


# NaN compares false, so it passes none of these.
positive = Check(lambda value: 0 < value < math.inf, "positive and finite")
not_negative = Check(lambda value: 0 <= value < math.inf, "zero or more, and finite")
share = Check(lambda value: 0 <= value <= 1, "between 0 and 1")
proper_share = Check(lambda value: 0 < value < 1, "above 0 and below 1")
decay = Check(lambda value: 0 <= value < 1, "at least 0 and below 1")


def option(default: Any, *checks: Check) -> Any:
    """Makes a field with a default and the checks of its value, or of each entry of a tuple."""
    return dataclasses.field(default=default, metadata={"checks": checks})


@dataclasses.dataclass(frozen=True)
class Checked:
    """Options that are checked when they are made.

    Raises:
      ConfigError: a value fails a check of its field.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for check in field.metadata.get("checks", ()):
                # A tuple is checked entry by entry.
                for each in value if isinstance(value, tuple) else (value,):
                    _demand(field.name, each, check)


def _demand(name: str, value: Any, check: Check) -> None:
    # Traced values (`together` maps a program over learning rates) cannot be compared, and were
    # checked as numbers before.
    if isinstance(value, int | float | str) and not check.holds(value):
        raise ConfigError(f"`{name}` is {value}; it must be {check.reason}")


def choose(field: str, value: str, names: Iterable[str]) -> str:
    """Returns `value` if it is one of `names`; raises a `ConfigError` with a suggestion if not."""
    names = list(names)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    raise ConfigError(f"`{field}`: there is no {value!r}; {hint}")


def reason(error: BaseException) -> str:
    """Returns the message of another library's error on one line, or else the error's type."""
    return one_line(error) or type(error).__name__


def is_fault(error: BaseException) -> bool:
    """Whether an error of another library means that a file cannot be read.

    Libraries written in Rust (`tokenizers`) raise a `PanicException` when they fail. It derives
    from `BaseException`, as KeyboardInterrupt does, so it is recognized by its name.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(content: object, most: int = 300) -> str:
    """Returns at most so many characters of a text on one line, printable ones only.

    Texts from files may hold control sequences, which a terminal would obey.
    """
    # Line breaks and runs of spaces become one space.
    words = " ".join(str(content).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:most])


def make_directory(field: str, path: Path) -> None:
    """Makes a directory with its parents; raises a `ConfigError` about `field` if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`{field}`: cannot make {path}: {error.strerror}") from error

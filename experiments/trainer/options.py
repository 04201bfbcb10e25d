"""Options with their checks beside them, and the one kind of error that a person causes.

A dataclass of options derives from `Checked`, and a field that not every value of its type suits is
made by `option`:

    @dataclasses.dataclass(frozen=True)
    class Walk(Checked):
        steps: int = option(600, at_least(1))

`Walk(steps=0)` then raises "`steps` is 0; it must be at least 1", from Python and from the command
line alike. None stands for "not given" and passes every check.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class ConfigError(ValueError):
    """A mistake of the person who started a run; its text is one line and names the option."""


class Check(NamedTuple):
    """What a value must be, as a test and in words that follow "it must be"."""

    holds: Callable[[Any], bool]
    reason: str


def at_least(least: int) -> Check:
    """A whole number that is not smaller than `least`."""
    return Check(lambda value: value >= least, f"at least {least}")


def one_of(names: Iterable[str]) -> Check:
    """One of the names of a table."""
    names = list(names)
    return Check(lambda value: value in names, f"one of {', '.join(names)}")


positive = Check(lambda value: 0 < value < math.inf, "positive and finite")
not_negative = Check(lambda value: 0 <= value < math.inf, "zero or more, and finite")
share = Check(lambda value: 0 <= value <= 1, "between 0 and 1")
proper_share = Check(lambda value: 0 < value < 1, "above 0 and below 1")
decay = Check(lambda value: 0 <= value < 1, "at least 0 and below 1")


def option(default: Any, *checks: Check) -> Any:
    """A field with a default, and what its value must be; of a tuple, what each entry must be."""
    return dataclasses.field(default=default, metadata={"checks": checks})


@dataclasses.dataclass(frozen=True)
class Checked:
    """Options that are checked where they are made.

    Raises:
      ConfigError: a value is not what its field asks for.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for check in field.metadata.get("checks", ()):
                for each in value if isinstance(value, tuple) else (value,):
                    _demand(field.name, each, check)


def _demand(name: str, value: Any, check: Check) -> None:
    # Numbers that a program is traced with are arrays, which no one can have mistyped.
    if isinstance(value, int | float | str) and not check.holds(value):
        raise ConfigError(f"`{name}` is {value}; it must be {check.reason}")


def choose(field: str, value: str, names: Iterable[str]) -> str:
    """Returns `value` if it is one of `names`; raises `ConfigError` with a suggestion if not."""
    names = list(names)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    raise ConfigError(f"`{field}`: there is no {value!r}; {hint}")


def reason(error: BaseException) -> str:
    """What another library says went wrong, in one line."""
    return one_line(error) or type(error).__name__


def is_fault(error: BaseException) -> bool:
    """Whether an error of another library means: this cannot be read.

    What libraries written in Rust raise where they stop is no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(content: object, most: int = 300) -> str:
    """At most so many characters of a text, without what a terminal would take for a command."""
    words = " ".join(str(content).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:most])


def make_directory(field: str, path: Path) -> None:
    """Makes a directory with its parents; raises `ConfigError` if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`{field}`: cannot make {path}: {error.strerror}") from error

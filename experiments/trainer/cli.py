"""Command lines made from dataclasses by tyro: the `#:` comment above a field is its help text.

Tyro prints the lines of such a comment as one paragraph, if each begins with a letter; it would
break docstrings of several lines in the middle of a sentence. A remark that is not help text needs
an empty line below it.

An option may be a union of dataclasses, such as the optimizer of a run. The command line then names
one of them, `optimizer:adamw`, and offers its options alone. Without a name the default one is
used: `--optimizer.rank 64` is GUM's.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from experiments.trainer.options import ConfigError

T = TypeVar("T")


def parse(kind: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Parses `arguments` into the dataclass `kind`.

    Args:
      kind: the dataclass.
      program: name of the module, for messages.
      arguments: the command line.
      default: values of options that are not given; None: the defaults of the fields.

    Returns:
      An instance of `kind`.

    Raises:
      SystemExit: an option or value is unknown and tyro has printed an error, or it has printed the
        help.
      ConfigError: a value fails a check of its field.
    """
    return tyro.cli(
        kind,
        prog=f"python -m {program}",
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        # Options of the run may stand before or after the name of an optimizer.
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def run(main: Callable[[Sequence[str]], int], program: str) -> int:
    """Calls `main` with the command line; returns its exit code.

    A `ConfigError` is printed on one line and gives 2; an interruption gives 130 or its own `code`,
    such as 75 when the time of a set of runs is up.
    """
    try:
        with warnings.catch_warnings():
            # A run prints this note with its memory plan: once, and not in every process.
            warnings.filterwarnings("ignore", ".*run through the inner transformation uncompressed")
            return main(sys.argv[1:])
    except ConfigError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{program}: {stop or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "code", 130)


def flag(name: str) -> str:
    """Returns the spelling of an option on the command line, for programs that start others."""
    return "--" + name.replace("_", "-")

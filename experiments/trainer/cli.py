"""Command lines made from dataclasses: field docstrings are the help, tyro words its errors.

Where an option is a union of dataclasses, such as the optimizer of a run, the command line first
names one of them, `optimizer:adamw`, and then has the options of that one alone. Without a name the
default is meant: `--optimizer.rank 64` is GUM's.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from experiments.trainer.options import ConfigError

T = TypeVar("T")


def parse(kind: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Reads `arguments` into the dataclass `kind`.

    Args:
      kind: the dataclass.
      program: the module, for messages.
      arguments: the command line.
      default: what options have that are not given; None: the defaults of the fields.

    Raises:
      SystemExit: an option or a value is not known, and tyro has said so; or it has shown the help.
    """
    return tyro.cli(
        kind,
        prog=f"python -m {program}",
        args=arguments,
        default=tyro.MISSING_NONPROP if default is None else default,
        # Options of the run may stand before and after the name of an optimizer.
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


def run(main: Callable[[Sequence[str]], int], program: str) -> int:
    """Calls `main` with the command line; returns its exit code, or 2 for a `ConfigError`.

    An interruption is 130, or the `code` that it has.
    """
    try:
        with warnings.catch_warnings():
            # A run prints it with its memory plan, once and not in every process.
            warnings.filterwarnings("ignore", ".*run through the inner transformation uncompressed")
            return main(sys.argv[1:])
    except ConfigError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{program}: {stop or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "code", 130)


def flag(name: str) -> str:
    """The spelling of an option on the command line, for programs that start others."""
    return "--" + name.replace("_", "-")

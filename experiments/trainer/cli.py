"""Command lines generated from dataclasses; a mistake is one line on stderr and exit code 2."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from experiments.trainer.config import ConfigError

T = TypeVar("T")


def parse(kind: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """Reads `arguments` into the dataclass `kind`, whose field docstrings are the help text.

    Args:
      kind: the dataclass.
      program: the module, for messages.
      arguments: the command line.
      default: what options have that are not given; None: the defaults of the fields.

    Raises:
      ConfigError: an option or a value is not known; the parser's text in one line.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide(not {"-h", "--help"} & set(arguments)):
            prog = f"python -m {program}"
            if default is None:
                return tyro.cli(kind, prog=prog, args=arguments)
            return tyro.cli(kind, prog=prog, args=arguments, default=default)
    except SystemExit as end:
        if not end.code:
            raise
    raise ConfigError(_one_line(errors.getvalue(), program))


def run(main: Callable[[Sequence[str]], int], program: str) -> int:
    """Calls `main` with the command line; returns its exit code, or 2 for a `ConfigError`.

    An interruption is 130, or the `code` that it has.
    """
    try:
        return main(sys.argv[1:])
    except ConfigError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{program}: {stop or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "code", 130)


@contextlib.contextmanager
def _wide(active: bool):
    """Keeps the parser from wrapping its messages."""
    before = os.environ.get("COLUMNS")
    if active:
        os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if active:
            os.environ.pop("COLUMNS")
            os.environ.update({"COLUMNS": before} if before else {})


def _one_line(box: str, program: str) -> str:
    """The reason in the parser's box, and the option it suggests."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    lines = lines or box.split("\n")
    rule = next((i for i, line in enumerate(lines) if line.startswith("───")), len(lines))
    reason = " ".join(" ".join(lines[:rule]).split())
    asked = [i for i, line in enumerate(lines) if line.startswith("Perhaps you meant")]
    hint = f"; did you mean {lines[asked[0] + 1].split()[0]}?" if asked else ""
    return f"{reason}{hint} (python -m {program} --help lists all)"

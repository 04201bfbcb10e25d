"""Renders chat templates, as a program with limits that only `templates` starts.

A chat template is a program written by the author of the model, and untrusted. Here it runs in
Jinja's sandbox, in a process without environment variables that cannot write files and has bounds
on memory, time and output. The process imports no package but Jinja: it starts in a tenth of a
second, and holds nothing that a template could steal.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes, sandbox, utils


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text in some templates, and renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, as Python's internals do."""

    def __init__(self, *pairs: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*pairs, **values).items():
            self[name] = value

    def __setitem__(self, name: Any, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not have the name {name!r}")
        super().__setitem__(name, value)


def compiled(template: str, date: str) -> jinja2.Template:
    """Compiles a template, with the filters and functions that chat templates expect.

    Args:
      template: a Jinja template.
      date: the text that `strftime_now` returns, whatever the format.
    """

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def fail(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    # The settings, extensions and names of transformers, for which templates are written.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    # A template that asks for today's date gets the same date every day, so that runs can resume.
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": lambda _format: date,
        "namespace": Namespace,
    }
    return environment.from_string(template)


def bounded(parts: Iterator[str], most: int) -> str:
    """Joins the parts of a text; raises `ValueError` as soon as it exceeds `most` characters."""
    text = ""
    for part in parts:
        text += part
        if len(text) > most:
            raise ValueError(f"it writes more than {most} characters for one conversation")
    return text


def main() -> None:
    """Reads a request from stdin; writes the texts, or else the reason of a failure, to stdout."""
    request = json.load(sys.stdin)
    # 1. Limits, before the template is even parsed.
    memory, seconds = request["memory"], request["seconds"]
    with contextlib.suppress(ValueError):  # macOS knows no limit on memory
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # the answer goes into a pipe
    # 2. A list of texts, or a text that says what went wrong.
    try:
        template = compiled(request["template"], request["date"])
        answer: Any = [
            bounded(template.generate(**request["variables"], messages=messages), request["most"])
            for messages in request["conversations"]
        ]
    except MemoryError:
        answer = f"it takes more than {memory >> 20} MiB of memory"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"[:300]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

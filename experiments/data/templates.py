"""Chat templates: untrusted programs, so they are rendered in another process with limits."""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments.data import rendering
from experiments.trainer.options import ConfigError, one_line

Conversation = list[dict[str, str]]

# Templates of LLaMA 3.1 and 3.2 tell the model a date: by default 3.1 this one, and 3.2 today's,
# with which no run could be resumed on another day.
_DATE = "26 Jul 2024"

# Processor time: 5 seconds, and one more for each 1000 conversations; ten thousand short ones take
# a second.
_SECONDS, _EACH = 5, 1000
# Seconds on the clock for each second of processor time, on a machine that does other work too.
_PATIENCE = 10.0
_MEMORY = 2**29
# Characters that a template may add to a conversation: a system prompt, and the marks of turns.
_MOST_ADDED = 100_000


def render(
    template: str,
    conversations: Sequence[Conversation],
    variables: dict[str, Any],
    *,
    generate: bool,
) -> list[str]:
    """Renders conversations as texts.

    Args:
      template: a Jinja template from a Hugging Face tokenizer.
      conversations: lists of messages with `role` and `content`.
      variables: further names that a template may use, such as the texts of special tokens.
      generate: whether a text ends with the start of the assistant's turn.

    Returns:
      One text for each conversation.

    Raises:
      ConfigError: the template fails, or takes more time or memory than any template needs.
    """
    return list(_render(json.dumps({
        "template": template,
        "conversations": list(conversations),
        "variables": {
            **variables,
            "date_string": _DATE, "add_generation_prompt": generate, "tools": None,
            "documents": None,
        },
        "date": _DATE,
        "memory": _MEMORY + 100 * sum(map(_length, conversations)),
        "seconds": _SECONDS + len(conversations) // _EACH,
        "most": _MOST_ADDED + 10 * max(map(_length, conversations), default=0),
    })))  # fmt: skip


@functools.lru_cache(maxsize=4)  # the same short conversation shows how each text ends
def _render(request: str) -> tuple[str, ...]:
    """Renders a request in a process of its own; see `rendering`."""
    # 1. `-I`: neither the directory nor the environment adds to what Python imports.
    command = [sys.executable, "-I", rendering.__file__]
    # 2. The process limits its own processor time; this timeout ends one that waits or is starved.
    patience = _PATIENCE * json.loads(request)["seconds"]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, env={}, timeout=patience
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(f"it did not end within {patience:g} s") from error
    # 3. A process that was ended by a limit writes no answer.
    if done.returncode < 0:
        raise _refusal("it does not end, or takes too much memory, and was stopped")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise _refusal(one_line(done.stderr.decode("utf-8", "replace")[-200:])) from error
    # 4. A list of texts is the answer; a text alone is the reason of a failure.
    if isinstance(answer, str):
        raise _refusal(one_line(answer))
    return tuple(answer)


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"`model`: its chat template cannot be rendered: {why}")


def _length(conversation: Conversation) -> int:
    return sum(len(message["content"]) for message in conversation)

"""How many held-out items a model answers right, by greedy generation."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.data import answers
from experiments.models import decoding
from experiments.models.llama import Params
from experiments.tasks.base import Example, Task
from experiments.trainer import processes

_BAR = "{desc} |{bar:24}| {n_fmt}/{total_fmt} answers [{elapsed}, {remaining} left]"
_Z = 1.959964  # standard deviations of a normal distribution that 95 % lie within


class Answer(NamedTuple):
    """An item, what the model made of it, and whether that is right."""

    prompt: str
    expected: str
    generated: str
    correct: bool


class Accuracy(NamedTuple):
    """The answers to all items."""

    answers: list[Answer]

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(answer.correct for answer in self.answers)

    @property
    def share(self) -> float:
        """The share of right answers."""
        return self.right / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence limits of the share."""
        return wilson(self.right, len(self.answers))

    def summary(self) -> dict[str, Any]:
        """What result files keep."""
        return {
            "right": self.right,
            "of": len(self.answers),
            "share": self.share,
            "interval": self.interval,
            "first": [answer._asdict() for answer in self.answers[:10]],
        }

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.share:.1%} ({self.right} of {len(self.answers)}; 95 % interval "
            f"{low:.1%} to {high:.1%})"
        )


def measure(
    static: Any,
    params: Params,
    tokenizer: Any,
    task: Task,
    *,
    longest: int,
    batch_size: int,
    title: str,
    show: bool = True,
) -> Accuracy:
    """Lets the model answer every held-out item of a task.

    Args:
      static: the model, as `model.create` returns it.
      params: its weights.
      tokenizer: its tokenizer.
      task: the items, and what a right answer is.
      longest: tokens of an answer, at most.
      batch_size: items answered at a time.
      title: of the progress bar.
      show: whether there is one.
    """
    prompts = answers.prompt_ids(task.held_out, tokenizer)
    visible = show and processes.is_first()
    with tqdm(
        desc=title, total=len(prompts), bar_format=_BAR, disable=not visible, file=sys.stderr
    ) as bar:
        generated = decoding.greedy(
            static,
            params,
            prompts,
            stop=answers.stop_tokens(tokenizer),
            max_new_tokens=longest,
            batch_size=batch_size,
            progress=bar.update,
        )
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    pairs = zip(task.held_out, texts, strict=True)
    return Accuracy([_answer(task, item, text.strip()) for item, text in pairs])


class Loss(NamedTuple):
    """A mean loss over tokens, with 95 % confidence limits."""

    mean: float
    low: float
    high: float
    windows: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


def loss(by_window: Callable, params: Params, batches: Iterable[Any]) -> Loss:
    """The mean loss of all tokens that count, and what the choice of windows leaves open.

    The limits are those of a ratio of two sums over windows (Cochran, Sampling Techniques, 2.11).

    Args:
      by_window: from weights and a batch to each window's sum of losses and number of tokens.
      params: the weights.
      batches: what to read.
    """
    evaluate = jax.jit(by_window)
    sums = [processes.gather(evaluate(params, batch)) for batch in batches]
    totals, counts = (np.concatenate(parts).astype(np.float64) for parts in zip(*sums, strict=True))
    totals, counts = totals[counts > 0], counts[counts > 0]
    mean, n = totals.sum() / counts.sum(), len(counts)
    spread = np.sum((totals - mean * counts) ** 2) * n / max(n - 1, 1)
    half = _Z * np.sqrt(spread) / counts.sum()
    return Loss(float(mean), float(mean - half), float(mean + half), n)


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % limits of a share by Wilson's score interval, which holds near 0 and 1 too."""
    from scipy.stats import binomtest  # slow to import

    low, high = binomtest(right, of).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def examples(answers: Sequence[Answer]) -> str:
    """Items with their answers, for the terminal."""
    return "\n".join(
        f"  {'right' if a.correct else 'wrong'}: {_line(a.prompt)}\n"
        f"    expected {_line(a.expected)}\n    answered {_line(a.generated)}"
        for a in answers
    )


def _answer(task: Task, item: Example, text: str) -> Answer:
    return Answer(item.prompt, item.answer, text, task.correct(text, item))


def _line(text: str, width: int = 160) -> str:
    """The text on one line, its middle left out if it is long."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else f"{line[: width // 2]} ... {line[-width // 2 :]}"

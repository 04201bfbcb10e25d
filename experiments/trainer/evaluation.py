"""Evaluation on held-out items: share of right answers by greedy generation, and mean loss.

Both come with 95 % confidence limits, which cover the choice of the items or windows and nothing
else: not the seed of the training run.
"""

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
_Z = 1.959964  # 97.5 % quantile of the standard normal distribution: 95 % lie within +-_Z


class Answer(NamedTuple):
    """An item, the answer that the model generated, and whether it is right."""

    prompt: str
    expected: str
    generated: str
    correct: bool


class Accuracy(NamedTuple):
    """The answers to all held-out items of a task."""

    answers: list[Answer]

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(answer.correct for answer in self.answers)

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence limits of the share, by Wilson's score interval."""
        return wilson(self.right, len(self.answers))

    def summary(self) -> dict[str, Any]:
        """Returns the fields that result files keep."""
        # Ten answers are enough to see how a model fails; all would swell the file.
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
      static: static part of the model, from `llama.create`.
      params: its weights.
      tokenizer: its tokenizer.
      task: the items, and the judge of an answer.
      longest: tokens of an answer, at most.
      batch_size: items to answer at a time.
      title: title of the progress bar.
      show: whether to show a progress bar; only the first process does.
    """
    # 1. Prompts to tokens, with the chat template if there is one.
    prompts = answers.prompt_ids(task.held_out, tokenizer)
    visible = show and processes.is_first()
    # 2. Generate. All processes take part, as weights may be divided among them.
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
    # 3. Judge the texts.
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
    """Returns the mean loss over all tokens that count, with limits for the choice of windows.

    With n windows of summed loss ``t_i`` and ``c_i`` tokens, the mean is the ratio of two sums, and
    its variance that of a ratio estimate (Cochran, Sampling Techniques, 2.11)::

        R = sum t_i / sum c_i,    Var R ~ n / (n - 1) * sum (t_i - R c_i)^2 / (sum c_i)^2

    Args:
      by_window: from weights and a batch to sums of losses `[B]` and numbers of tokens `[B]`.
      params: the weights.
      batches: the batches to read.
    """
    evaluate = jax.jit(by_window)
    sums = [processes.gather(evaluate(params, batch)) for batch in batches]
    # [windows] each. Windows without a token fill the last batch, and are not part of the sample.
    totals, counts = (np.concatenate(parts).astype(np.float64) for parts in zip(*sums, strict=True))
    totals, counts = totals[counts > 0], counts[counts > 0]
    mean, n = totals.sum() / counts.sum(), len(counts)
    # Var R times the square of all tokens; a single window has none.
    spread = np.sum((totals - mean * counts) ** 2) * n / max(n - 1, 1)
    half = _Z * np.sqrt(spread) / counts.sum()
    return Loss(float(mean), float(mean - half), float(mean + half), n)


def wilson(right: int, of: int) -> tuple[float, float]:
    """Returns 95 % limits of a share by Wilson's score interval, valid near 0 and 1 too."""
    from scipy.stats import binomtest  # slow to import

    # Not share +- _Z * standard error: that has width 0 at 0 and at 1.
    low, high = binomtest(right, of).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def examples(answers: Sequence[Answer]) -> str:
    """Formats items with their answers for the terminal."""
    return "\n".join(
        f"  {'right' if a.correct else 'wrong'}: {_line(a.prompt)}\n"
        f"    expected {_line(a.expected)}\n    answered {_line(a.generated)}"
        for a in answers
    )


def _answer(task: Task, item: Example, text: str) -> Answer:
    return Answer(item.prompt, item.answer, text, task.correct(text, item))


def _line(text: str, width: int = 160) -> str:
    """Returns the text on one line, without its middle if it is long."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else f"{line[: width // 2]} ... {line[-width // 2 :]}"

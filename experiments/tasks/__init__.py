"""Tasks: prompts, answers to learn, and a judge of generated answers.

Each task is a module with a function `load(sizes) -> Task` and one entry in `TASKS`. Any other name
stands for a user's own data: files or a data set on the Hugging Face hub (`files`).
"""

from experiments.tasks import chain_sum, files, gsm8k, gsm_symbolic
from experiments.tasks.base import Sizes, Task
from experiments.trainer.options import ConfigError, choose

TASKS = {"chain_sum": chain_sum.load, "gsm_symbolic": gsm_symbolic.load, "gsm8k": gsm8k.load}


def load(
    name: str,
    *,
    train_examples: int,
    eval_examples: int,
    seed: int,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> Task:
    """Loads the task called `name`, with as many items as asked for.

    Args:
      name: one of `TASKS`; a `.jsonl` or `.jsonl.xz` file; a directory with such files called train
        and test; a data set on the Hugging Face hub, as `name[:subset]`.
      train_examples: number of items to train on.
      eval_examples: number of held-out items.
      seed: seed of the choice of items to train on, and of their order. Held-out items are the same
        for every seed, so that runs can be compared item by item.
      prompt_field: column of prompts in files and data sets.
      answer_field: column of answers.

    Raises:
      ConfigError: there is no such task, its items cannot be read, or there are too few.
    """
    sizes = Sizes(train_examples, eval_examples, seed)
    if name in TASKS:
        _check_default("prompt_field", prompt_field, "prompt", name)
        _check_default("answer_field", answer_field, "answer", name)
        return TASKS[name](sizes)
    # A bare word that is no file is a misspelled task; `choose` suggests the nearest name.
    if not files.is_source(name):
        choose("task", name, TASKS)
    return files.load(name, sizes, prompt_field, answer_field)


def _check_default(field: str, value: str, default: str, name: str) -> None:
    """Raises `ConfigError` for an option that would silently have no effect."""
    if value != default:
        raise ConfigError(f"`{field}` has no effect on {name}, whose columns are known")

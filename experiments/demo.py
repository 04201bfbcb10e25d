"""Trains a small language model with GUM and with AdamW, in minutes: `python -m experiments.demo`.

It prints a table and a verdict, and leaves loss curves and a result file in `run_dir`.
"""

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import reporting
from experiments.reporting import loss_curves
from experiments.trainer import cli
from experiments.trainer.config import Config, change
from experiments.trainer.options import ConfigError

if TYPE_CHECKING:
    from experiments.trainer.loop import Result

PROGRAM = "experiments.demo"

# The best learning rate of each optimizer in a grid on this model and corpus, the same for all
# weights: python -m experiments.tune.
LEARNING_RATES = {"gum": 1e-2, "adamw": 1e-3}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small LLaMA twice, with GUM and with AdamW, and compare loss, memory and time."""

    #: All other options, as in experiments.pretrain; the demo chooses optimizer and learning rate.
    #: It empties the directories of its two runs in `run_dir` first.
    base: Config = dataclasses.field(
        default_factory=lambda: Config(run_dir="runs/demo", validate_every=50)
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns the exit code."""
    # 1. Options. A resumed run would be compared with one that starts anew.
    base = cli.parse(Demo, PROGRAM, arguments).base
    if base.resume:
        raise ConfigError("`resume`: the demo always starts anew")
    # Imported here because data, checkpoints and the model take seconds; `--help` needs none.
    from experiments.trainer.pretraining import train

    # 2. One run after the other, each in an empty directory.
    print(introduction(base))
    results = {}
    for number, (optimizer, rate) in enumerate(LEARNING_RATES.items(), 1):
        config = run_config(base, optimizer)
        shutil.rmtree(config.run_dir, ignore_errors=True)
        print(f"\n[{number} of {len(LEARNING_RATES)}] {optimizer}, learning rate {rate:g}")
        results[optimizer] = train(config)
        # Both runs or nothing: the demo has no resume.
        if stopped_by := results[optimizer].stopped_by:
            print(f"{PROGRAM}: stopped after step {results[optimizer].step}; nothing to compare")
            return 128 + stopped_by

    # 3. Figure, result file, and the comparison in words.
    directory = Path(base.run_dir)
    curves = {name: result.metrics for name, result in results.items()}
    title = f"{base.preset} LLaMA on {reporting.title(*base.corpus)}, seed {base.seed}"
    picture = loss_curves(curves, directory / "demo.png", title)
    record = directory / "demo.json"
    record.write_text(json.dumps(summary(base, results), indent=2) + "\n")
    print(f"\n{table(results)}\n\n{verdict(results)}\n\nloss curves: {picture}\nnumbers: {record}")
    return 0


def run_config(base: Config, optimizer: str) -> Config:
    """Returns the configuration of one of the demo's two runs."""
    return change(
        base,
        optimizer=optimizer,
        learning_rate=LEARNING_RATES[optimizer],
        run_dir=f"{base.run_dir}/{optimizer}",
    )


def introduction(base: Config) -> str:
    """Explains to the user what the demo is about to do."""
    gum: Any = run_config(base, "gum").optimizer
    return (
        f"The same LLaMA ({base.preset}) learns the same text, {' '.join(base.corpus)}, twice: "
        "once with GUM, once with AdamW.\n"
        "AdamW keeps two numbers for every weight. GUM keeps a momentum of rank "
        f"{gum.rank} for each hidden matrix,\nand for {gum.full_rank_layers} layer(s) of each "
        f"role, drawn anew every {gum.period} steps, what that rank leaves out.\n"
        "Lower validation loss is better; it is measured on documents that no run trains on.\n"
        "The first run also prepares the text and compiles: the bar starts to move after that."
    )


def table(results: dict[str, "Result"]) -> str:
    """Formats a table with one line for each optimizer."""
    return reporting.aligned(
        ("optimizer", "learning rate", "validation loss", "optimizer state", "s per step"),
        (
            (
                name,
                LEARNING_RATES[name],
                f"{result.validation_loss:.4f}",
                reporting.size(result.state_bytes),
                f"{result.seconds_per_step:.3f}",
            )
            for name, result in results.items()
        ),
    )


def verdict(results: dict[str, "Result"]) -> str:
    """Compares the two runs in a sentence, whichever of them is ahead."""
    gum, adamw = results["gum"], results["adamw"]
    gap = gum.validation_loss - adamw.validation_loss
    sentence = (
        f"GUM held {gum.state_bytes / adamw.state_bytes:.0%} of AdamW's optimizer state, took "
        f"{gum.seconds_per_step / adamw.seconds_per_step:.2f} times its time per step, and ended "
        f"{abs(gap):.4f} nats per token {'above' if gap > 0 else 'below'} its validation loss "
        f"({'AdamW' if gap > 0 else 'GUM'} is ahead; one seed)."
    )
    # Measured: with a second learning rate for the fallback the two are level at this size.
    caveat = (
        "Both use one learning rate for everything; what a second one for embedding and head "
        "changes is in experiments/LOG.md."
    )
    return "\n".join([*textwrap.wrap(sentence, 80), *textwrap.wrap(caveat, 80)])


def summary(base: Config, results: dict[str, "Result"]) -> dict:
    """Returns the content of the result file: each run with its description and its numbers."""
    runs = {}
    for name, result in results.items():
        config = run_config(base, name)
        described = json.loads((Path(config.run_dir) / "config.json").read_text())
        numbers = result._asdict()
        # Weights stay out of the file, and of the records only the validation losses go in.
        records, _ = numbers.pop("metrics"), numbers.pop("params")
        held_out = [r for r in records if "validation_loss" in r]
        curve = [[r["step"], r["validation_loss"]] for r in held_out]
        runs[name] = described | numbers | {"curve": curve}
    return {"seed": base.seed, "runs": runs}


if __name__ == "__main__":
    sys.exit(cli.run(main, PROGRAM))

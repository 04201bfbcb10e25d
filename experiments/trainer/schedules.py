"""The learning rate along a run: linear warm-up, then cosine decay."""

from typing import TYPE_CHECKING

import optax

if TYPE_CHECKING:
    from experiments.trainer.config import Training


def schedule(run: "Training", peak: float | None = None) -> optax.Schedule:
    """Linear warm-up to the peak learning rate, then cosine decay."""
    peak = run.learning_rate if peak is None else peak
    share = share_of_peak(run)
    return lambda step: peak * share(step)


def share_of_peak(run: "Training") -> optax.Schedule:
    """The learning rate as a share of its peak: the same for all rates of a run."""
    warmup = round(run.warmup * run.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=1 / (warmup + 1),
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=max(run.steps, warmup + 1),
        end_value=run.final_learning_rate,
    )

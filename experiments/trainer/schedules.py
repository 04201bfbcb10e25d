"""Learning rate schedule of a run: linear warm-up, then cosine decay."""

from typing import TYPE_CHECKING

import optax

if TYPE_CHECKING:
    from experiments.trainer.config import Training


def schedule(run: "Training", peak: float | None = None) -> optax.Schedule:
    """Returns the schedule with the given peak; None: the run's learning rate."""
    peak = run.learning_rate if peak is None else peak
    share = share_of_peak(run)
    return lambda step: peak * share(step)


def share_of_peak(run: "Training") -> optax.Schedule:
    """Returns the learning rate as a share of its peak, the same for all rates of a run.

    With w warm-up steps it is ``1 / (w + 1)`` at step 0, so that the first step moves the weights,
    1 at step w, and `final_learning_rate` at the end.
    """
    warmup = round(run.warmup * run.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=1 / (warmup + 1),
        peak_value=1.0,
        warmup_steps=warmup,
        decay_steps=max(run.steps, warmup + 1),
        end_value=run.final_learning_rate,
    )

"""Tables of measurements in README and docs: `python -m experiments.results.readme` renews them.

All of their numbers come from the result files. A test compares the tables with the pages, so that
the two cannot drift apart.

A *table* is a function that returns Markdown. A *fact* is a row of the long table of
`docs/results.md`: what was measured, its value, and the command that measures it again.
"""

import functools
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import reporting
from experiments.benchmarks import communication, pods, step
from experiments.benchmarks import training as whole_steps
from experiments.results import contenders, one_seed, overview
from experiments.studies import finetuning as answers
from experiments.studies import frontier
from experiments.studies import pretraining as comparison
from experiments.trainer.cli import flag

RESULTS = Path(__file__).parent
ROOT = Path(__file__).parents[2]
COMPILED = "benchmarks/compiled.json"
# Contenders of the benchmarks -> their names in texts.
_NAMES = {"adamw": "AdamW", "optax muon": "Muon", "galore": "GaLore", "gum": "GUM"} | {
    "optax galore": "optax GaLore"
}
# Ratios are GUM's seconds over another's; "floor" is the lower bound of `benchmarks.floors`.
_PERFORMANCE_HEAD = (
    "LLaMA", "GUM, plain step", "/ optax Muon", "/ AdamW", "/ optax GaLore", "refresh / plain",
    "refreshes' share", "SVD refresh / ours", "/ floor",
)  # fmt: skip
# The result file has two sets of runs, of which this command makes the first.
_CURVES_COMMAND = (
    "python -m experiments.tune --optimizers gum --learning-rates 1e-2 --seeds 0 1 2 "
    "--base.steps 300 --base.optimizer.period 50 --out experiments/results/projector_curves.json"
)


def table() -> str:
    """Returns the table of all facts, in the order of `FACTS`."""
    rows = (row for fact in FACTS for row in fact())
    return reporting.markdown(
        ("what", "measured", "command"),
        ((what, how, f"`{command}`") for what, how, command in rows),
    )


def performance() -> str:
    """Returns seconds of GUM's update beside others', a row for each preset and layout timed."""
    timed = step.stored(RESULTS / "benchmarks")
    # (preset, layout) -> GUM's measured seconds over their lower bound; also decides the rows.
    floors = {
        (c["preset"], c["layout"]): c["measured_over_floor"]
        for c in timed["costs"]
        if c["contender"] == "gum"
    }
    return reporting.markdown(
        _PERFORMANCE_HEAD,
        (
            (f"{preset}, {layout}", *_cells(timed["pairs"], preset, layout), f"{over_floor:.2f}")
            for (preset, layout), over_floor in floors.items()
        ),
    )


def pretraining() -> str:
    """Returns the study of pretraining: each optimizer at its best rate, on each corpus."""
    # 1. One row per optimizer and corpus. Time, state and order are those of the first corpus.
    _, finals = comparison.stored(RESULTS / "studies/pretraining.json", "pretraining")
    rows = {c: {r["optimizer"]: r for r in comparison.compare(es)} for c, es in finals.items()}
    reference = next(iter(rows))
    head = ["optimizer", "learning rate", "state", *(Path(c).name for c in rows)]
    head += ["time per step", "steps to AdamW's loss", "time to it"]
    # 2. Times are relative to AdamW's: of a step, and of its whole run.
    adamw = rows[reference]["adamw"]
    whole = finals[reference][0]["config"]["steps"] * adamw["seconds_per_step"]
    lines = []
    for name, row in sorted(rows[reference].items(), key=lambda item: item[1]["loss"]):
        losses = [f"{r[name]['loss']:.3f} ({r[name]['deviation']:.3f})" for r in rows.values()]
        time = f"{row['seconds_per_step'] / adamw['seconds_per_step']:.2f}"
        # Cells stay empty for an optimizer that did not reach AdamW's loss with every seed.
        reached = ["", ""]
        if row["steps_to_adamw"] is not None:
            steps, seconds = row["steps_to_adamw"], row["seconds_to_adamw"]
            reached = [f"{steps:.0f}", f"{seconds / whole:.2f}"]
        state = f"{row['state_bytes'] / 2**20:.1f} MiB"
        rate = f"{row['learning_rate']:g}"
        lines.append([reporting.STYLES[name].name, rate, state, *losses, time, *reached])
    return reporting.markdown(head, lines)


def costs() -> str:
    """Returns the time of an update by optimizer, over GaLore-Muon's in the same process."""
    ratios: dict[str, dict[str, float]] = _read("benchmarks/variants/60m.json")["ratios"]
    return reporting.markdown(
        ("update", "over GaLore-Muon's (least, largest of a turn)"),
        (
            (
                _COSTS.get(name, name),
                f"{ratio['of_medians']:.2f} ({ratio['min']:.2f}, {ratio['max']:.2f})",
            )
            for name, ratio in sorted(ratios.items(), key=lambda item: item[1]["of_medians"])
        ),
    )


# Names in the result file that need more words on a page.
_COSTS = {
    "columns of the residual": "low-rank Muon + columns",
    "orthogonalized residual": "low-rank Muon + orthogonalized residual",
}


def times() -> str:
    """Returns steps and time to AdamW's last loss in the frontier study, on each corpus."""
    result = _read("studies/time_to_loss.json")
    ratios = {key: each["over_adamw"] for key, each in result["seconds"].items()}
    head = ["optimizer", "time per step (least, largest of a turn)"]
    head += [f"steps, time: {Path(corpus).name}" for corpus in result["rows"]]
    lines = []
    for key, ratio in ratios.items():
        each = [of[key] for of in result["rows"].values()]
        reached = [
            "not reached"
            if row["steps_to_adamw"] is None
            else f"{row['steps_to_adamw']:,.0f}, {row['time_to_adamw']:.2f}"
            for row in each
        ]
        per_step = f"{ratio['of_medians']:.2f} ({ratio['min']:.2f}, {ratio['max']:.2f})"
        lines.append([overview.SHOWN[key][0].name, per_step, *reached])
    return reporting.markdown(head, lines)


def finetuning() -> str:
    """Returns the study of fine-tuning: each optimizer at its best rate, the least loss first."""
    rows = _finetuned()
    head = ["optimizer", "learning rate", "state", "right answers, by seed", "95 % interval"]
    head += ["loss of answers, by seed", "95 % interval of the last", "time per step"]
    lines = []
    adamw = next(row["seconds_per_step"] for row in rows if row["optimizer"] == "adamw")
    for row in sorted(rows, key=lambda row: row["loss"]):
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        lines.append([
            reporting.STYLES[row["optimizer"]].name,
            f"{row['learning_rate']:g}",
            f"{row['state_bytes'] / 2**20:.0f} MiB",
            ", ".join(f"{share:.1%}" for share in row["shares"]),
            "{:.1%} to {:.1%}".format(*row["interval"]),
            losses,
            "{:.2f} to {:.2f}".format(*row["loss_interval"]),
            f"{row['seconds_per_step'] / adamw:.2f}",
        ])  # fmt: skip
    return reporting.markdown(head, lines)


def plans() -> str:
    """Returns the optimizer state of large models, and GUM's share for embedding and head."""
    # The columns are the optimizers of the result file, the same for all models.
    models = _read("plans.json")["models"]
    head = ["model", *next(iter(models.values()))["state"], "of GUM's, embedding and head"]
    lines = []
    for name, each in models.items():
        cells = (f"{row['bytes'] / 2**30:.1f} GiB" for row in each["state"].values())
        words = each["state"]["GUM"]["embedding_and_head_bytes"] / 2**30
        lines.append([name, *cells, f"{words:.1f} GiB"])
    return reporting.markdown(head, lines)


def tpu() -> str:
    """Returns the memory of training steps on one TPU, by its compiler: steps by models."""
    # The result file has steps on other chips, too.
    rows = [row for row in _read("tpu.json")["rows"] if row["kind"] == "v5p"]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        model = f"{row['model']}, {row['batch']}"
        # A step that was not compiled for a model has an empty cell.
        found.setdefault(model, {})[row["step"]] = _gibibytes(row)
    return reporting.markdown(
        ("training step", *found),
        (
            (name, *(of.get(step, "") for of in found.values()))
            for step, name in _STEPS.items()
            if any(step in of for of in found.values())
        ),
    )


# Steps of `experiments.benchmarks.tpu` in the order of rows -> their names in the documentation.
_STEPS = {
    "8-bit AdamW": "AdamW, moments in 8 bits, blocks of 256",
    "8-bit AdamW, layer by layer": "AdamW, moments in 8 bits, blocks of 256, layer by layer",
    "8-bit AdamW, a scale per row": "AdamW, moments in 8 bits, a scale per row",
    "8-bit AdamW, rounded at random": "the same, rounded at random",
    "AdamW": "AdamW",
    "Muon": "`optax.contrib.muon`",
    "8-bit Muon in blocks, lean": "`muon` in 8 bits, blocks of 256, `fallbacks.factored()`",
    "8-bit Muon, lean": "`muon` in 8 bits, a scale per row, `fallbacks.factored()`",
    "6-bit Muon, lean": "`muon` in 6 bits, a scale per row, `fallbacks.factored()`",
    "6-bit Muon, lean, layer by layer": "the same, layer by layer",
    "compact, lean": "`compact` with a quarter of the width, `fallbacks.factored()`",
    "compact, lean, layer by layer": "the same, layer by layer",
    "GaLore": "GaLore",
    "GUM": "GUM",
    "GUM, projected": "GUM, compressed gradients",
    "GUM, refresh": "GUM, refresh",
    "lean GUM, projected": "lean GUM, compressed gradients",
    "lean GUM, refresh": "lean GUM, refresh",
    "lean GUM, both": "lean GUM, refresh and step in one program",
    "lean GUM, one drawn layer, projected": "lean GUM, compressed gradients, one drawn layer",
    "lean GUM, one drawn layer, refresh": "lean GUM, one drawn layer, refresh",
    "lean low-rank Muon, projected": "lean GUM, compressed gradients, no drawn layers",
    "lean low-rank Muon, refresh": "lean GUM, no drawn layers, refresh",
}


def chips() -> str:
    """Returns the memory of training steps on smaller TPUs, which not all steps fit."""
    rows = [row for row in _read("tpu.json")["rows"] if row["kind"] in ("v6e", "v5e")]
    # The order of models on the page, then AdamW before ours.
    rows.sort(key=lambda row: (row["kind"], row["model"], list(_STEPS).index(row["step"])))
    return reporting.markdown(
        ("TPU", "model, tokens", "training step", "memory"),
        (
            (row["kind"], f"{row['model']}, {row['batch']}", _STEPS[row["step"]], _gibibytes(row))
            for row in rows
        ),
    )


def in_few_bits() -> str:
    """Returns the memory of steps of Llama-3-8B with states in few bits, in a loop and without."""
    found = {
        row["step"]: _gibibytes(row)
        for row in _read("tpu.json")["rows"]
        if (row["kind"], row["model"]) == ("v5p", "Llama-3-8B")
    }
    steps = [step for step in _STEPS if "-bit" in step and "layer by layer" not in step]
    return reporting.markdown(
        ("state in few bits", "whole stacks", "layer by layer"),
        ((_STEPS[step], found[step], found.get(f"{step}, layer by layer", "")) for step in steps),
    )


def _gibibytes(row: dict[str, Any]) -> str:
    """Formats the compiler's own total of a step, or what a step that does not fit would need."""
    if told := row.get("out_of_memory"):  # "used 59.63G of 31.25G"
        _, needed, _, available = told.replace("G", "").split()
        return f"does not fit: {float(needed):.1f} of {float(available):.1f} GiB"
    return f"{row['peak_bytes'] / 2**30:.1f} GiB"


def collectives() -> str:
    """Returns the collectives of an update on each mesh that shards parameters."""
    # Data parallelism alone replicates the state, so that updates send nothing.
    rows = _read("sharding.json")["rows"]
    return communication.table([row for row in rows if row["mesh"] != "data=8"])


def slices() -> str:
    """Returns the memory and collectives of updates and steps on slices of TPUs."""
    return pods.table(_read("pods.json")["rows"])


def headline() -> str:
    """Returns the README's table of findings, a line for each question."""
    return reporting.markdown(
        ("question", "measured", "command"),
        ((question, answer, f"`{command}`") for question, answer, command in _answers()),
    )


def _answers() -> Iterator[tuple[str, str, str]]:
    """Yields question, answer and command."""
    # 1. Memory of a training step.
    peaks = {
        row["step"]: _gibibytes(row)
        for row in _read("tpu.json")["rows"]
        if (row["model"], row["kind"]) == ("Llama-3-8B", "v5p")
    }
    yield (
        "Memory of a training step of Llama-3-8B, bfloat16, 1 x 2,048 tokens, by the compiler of a "
        "TPU v5p (15.0 GiB are weights)",
        f"AdamW {peaks['AdamW']}, Muon {peaks['Muon']}, 8-bit Muon with `fallbacks.factored()` "
        f"{peaks['8-bit Muon, lean']}, GUM {peaks['GUM']}, GUM with compressed gradients "
        f"{peaks['GUM, projected']}, with 8-bit momenta and bases and no AdamW "
        f"{peaks['lean GUM, projected']}, the same without drawn layers "
        f"{peaks['lean low-rank Muon, projected']}; refreshes take less",
        "python -m experiments.benchmarks.tpu",
    )
    # 2. Memory of the state.
    state = _read("plans.json")["models"]["Llama-3-8B"]["state"]
    yield (
        "Optimizer state of Llama-3-8B in bfloat16, counted",
        ", ".join(
            f"{name} {state[key]['bytes'] / 2**30:.1f} GiB"
            for key, name in (
                ("AdamW", "AdamW"),
                ("GaLore", "GaLore"),
                ("8-bit Muon, lean", "8-bit Muon without AdamW"),
                ("8-bit GUM, lean", "8-bit GUM without AdamW"),
            )
        ),
        "python -m experiments.benchmarks.large_models",
    )
    # 3. Loss of pretraining above Muon's: contender -> corpus -> a difference for each seed.
    gaps = {
        name: [of[name].above for of in contenders.points().values()]
        for name in ("muon_rows8", "adamw", "gum", "galore_muon")
    }
    # The sentence below says "in every seed": renewing the table fails if it no longer holds.
    pairs = zip(*gaps["gum"], *gaps["galore_muon"], strict=True)
    ahead = all(a < c and b < d for a, b, c, d in pairs)
    assert ahead
    words = {"muon_rows8": "8-bit Muon", "adamw": "AdamW", "gum": "GUM"} | {
        "galore_muon": "GaLore-Muon"
    }
    yield (
        "Pretraining, 4,000 steps, two corpora: validation loss above Muon's, nats",
        ", ".join(
            f"{words[name]} " + " and ".join(f"{abs(statistics.mean(g)):.2f}" for g in pair)
            for name, pair in gaps.items()
        )
        + "; GUM is below GaLore-Muon in every seed",
        "python -m experiments.studies.frontier",
    )
    # 4. Embedding, head and norms.
    losses = rest_of_model()
    # "in every seed" must hold, as above.
    assert max(losses["fallback_factored"]) < min(losses["fallback_adamw"])
    yield (
        "Embedding, head and norms beside Muon, 4,000 steps: validation loss, mean of "
        f"{len(losses['fallback_adamw'])} seeds",
        f"AdamW {statistics.mean(losses['fallback_adamw']):.3f}, `fallbacks.factored()` "
        f"{statistics.mean(losses['fallback_factored']):.3f}, with hardly any state, and lower in "
        f"every seed; the same beside 8-bit Muon {statistics.mean(losses['lean_muon8']):.3f}. On a "
        f"second corpus, beside 6-bit Muon, {-one_seed.found('lean_muon6').above:.2f} below Muon "
        "beside AdamW (one seed)",
        "python -m experiments.studies.frontier --tuning-runs first --tuning-steps 4000 --corpora "
        "stdlib --contenders fallback_factored fallback_adamw lean_muon8 --out "
        # The table puts backticks around the whole.
        "experiments/results/studies/frontier_fallbacks.json`, and `python -m "
        "experiments.studies.frontier --tuning-runs none --corpora runs/sotu --seeds 0 "
        "--contenders muon lean_muon6 --out experiments/results/studies/frontier_speeches.json",
    )
    # 5. Loss and state of fine-tuning.
    rows = {row["optimizer"]: row for row in _finetuned()}
    losses = [row["loss"] for row in rows.values()]
    yield (
        "Fine-tuning SmolLM2-135M, 2 seeds: five optimizers",
        f"level, mean losses within {max(losses) - min(losses):.3f}; state: GUM "
        f"{rows['gum']['state_bytes'] / 2**20:.0f} MiB, Muon "
        f"{rows['muon']['state_bytes'] / 2**20:.0f}, AdamW "
        f"{rows['adamw']['state_bytes'] / 2**20:.0f}",
        "python -m experiments.studies.finetuning",
    )
    # 6. Time of an update.
    costs = _read("benchmarks/variants/60m.json")["ratios"]
    yield (
        "Time of an update of 60M parameters over GaLore-Muon's, 2 CPU cores",
        ", ".join(
            f"{name} {costs[key]['of_medians']:.1f}"
            for key, name in (
                ("Muon", "Muon"),
                ("Muon, 8 bits", "8-bit Muon"),
                ("MUD, 8 bits", "8-bit MUD"),
                ("SWAN by MUD", "SWAN by MUD"),
                ("GUM", "GUM"),
                ("columns of the residual", "low-rank Muon with the column-normalized residual"),
                ("SCALE", "SCALE"),
                ("AdamW", "AdamW"),
            )
        ),
        "python -m experiments.benchmarks --studies variants --presets 60m --repeats 7",
    )
    # 7. The counterexample.
    gaps_left = _read("counterexample.json")["final_relative_gap"]
    yield (
        "The paper's counterexample: gap left, median of 10 seeds",
        ", ".join(f"{name} {_power(statistics.median(v))}" for name, v in gaps_left.items()),
        "python -m experiments.studies.counterexample",
    )


def claims() -> str:
    """Returns what GUM's paper claims beside what was found here, and over which horizon."""
    return reporting.markdown(("the paper", "found here", "over"), _claims())


def _claims() -> Iterator[tuple[str, str, str]]:
    """Yields claim, finding and horizon."""
    # 1. The counterexample.
    gaps = _read("counterexample.json")["final_relative_gap"]
    gum, biased = (_power(statistics.median(gaps[name])) for name in ("GUM", "GaLore-Muon"))
    yield (
        "GUM converges where GaLore with Muon does not (Figure 1)",
        f"holds: of the gap at the start, {gum} is left with GUM and {biased} with GaLore-Muon",
        f"the paper's problem, median of {len(gaps['GUM'])} seeds",
    )
    # 2. Memory.
    state = _read(COMPILED)["state_bytes"]["1b"]["separate"]
    yield (
        "the memory of low-rank methods",
        f"holds: {_mebibytes({name: state[name] for name in ('gum', 'galore', 'optax muon')})}",
        "LLaMA 1b in float32, rank 128, gamma 2, counted",
    )
    # 3. Bias.
    yield (
        "the gradient estimate is unbiased, and GUM has Muon's guarantee",
        "the estimate is, over all draws; an update after Newton-Schulz is not linear in it, and "
        "not unbiased",
        "by enumeration",
    )
    # 4. Pretraining beside GaLore, over short and long runs; "each seed" must hold, as above.
    above = {
        name: [of[name].above for of in contenders.points().values()]
        for name in ("gum", "galore_muon", "adamw")
    }
    leads = [
        [b - a for a, b in zip(*pair, strict=True)]
        for pair in zip(above["gum"], above["galore_muon"], strict=True)
    ]
    assert min(map(min, leads)) > 0
    _, finals = comparison.stored(RESULTS / "studies/pretraining.json", "pretraining")
    short = [
        {row["optimizer"]: row["loss"] for row in comparison.compare(entries)}
        for entries in finals.values()
    ]
    yield (
        "pretraining: a lower loss than GaLore's",
        "level: GaLore-Muon's loss less GUM's is "
        + " and ".join(f"{loss['galore_muon'] - loss['gum']:.3f}" for loss in short),
        "400 steps, 8 periods, two corpora",
    )
    yield (
        "",
        "holds: it is "
        + " and ".join(f"{statistics.mean(lead):.3f}" for lead in leads)
        + ", positive in each seed",
        "4,000 steps, 20 periods, two corpora",
    )
    # 5. Pretraining beside full-parameter training.
    over_muon = [statistics.mean(gap) for gap in above["gum"]]
    over_adamw = [
        gum - statistics.mean(adamw) for gum, adamw in zip(over_muon, above["adamw"], strict=True)
    ]
    yield (
        "pretraining: a lower loss than full-parameter training's",
        "not found: {:.2f} and {:.2f} above Muon, ".format(*over_muon)
        + "{:.2f} and {:.2f} above AdamW".format(*over_adamw),
        "4,000 steps, 20 periods, two corpora",
    )
    # 6. Stable rank. Both parts of the sentence must hold on both corpora.
    ranks = list(contenders.stable_ranks().values())
    assert all(of["galore_20"] < of["gum_20"] and of["gum_1"] < of["gum_4"] for of in ranks)
    yield (
        "weights of a higher stable rank than GaLore's, which explains a lower loss",
        "higher: with K = 20, {:.0f} and {:.0f} with GUM, {:.0f} and {:.0f} with ".format(
            *(of["gum_20"] for of in ranks), *(of["galore_20"] for of in ranks)
        )
        + "GaLore-Muon. But a rank explains no loss: without any state SWAN's are {:.0f} and "
        "{:.0f}, 6-bit Muon's {:.0f} and {:.0f}".format(
            *(of["swan"] for of in ranks), *(of["muon_int6"] for of in ranks)
        ),
        "4,000 steps, two corpora",
    )
    # 7. Fine-tuning.
    losses = {row["optimizer"]: row["loss"] for row in _finetuned()}
    yield (
        "fine-tuning: better than GaLore and full-parameter training",
        "level: losses of answers are GUM {gum:.3f}, GaLore {galore:.3f}, Muon {muon:.3f}, AdamW "
        "{adamw:.3f}, within the intervals".format(**losses),
        "SmolLM2-135M, 24 steps, 2 seeds",
    )


@functools.cache
def rest_of_model() -> dict[str, list[float]]:
    """Returns the losses of the fallbacks beside Muon: contender -> a loss for each seed."""
    contenders = ("fallback_factored", "fallback_adamw", "lean_muon8")
    config = frontier.Config(
        contenders=contenders, tuning_steps=frontier.STEPS, corpora=("stdlib",),
        out=RESULTS / "studies/frontier_fallbacks.json",
    )  # fmt: skip
    _, found = frontier.finished(config)
    return {
        key: [entry["validation_loss"] for entry in entries]
        for key, entries in found["stdlib"].items()
    }


@functools.cache
def _finetuned() -> list[dict[str, Any]]:
    """Reads the rows of the study of fine-tuning."""
    # Cached for the two tables that need them: intervals by resampling take a second.
    return answers.compare(answers.finals_of(_read("studies/finetuning.json")))


def _cells(pairs: list[dict[str, Any]], preset: str, layout: str) -> Iterator[str]:
    """Yields the cells of `performance` for one preset and layout, in the order of its head."""
    found = {p["other"]: p for p in pairs if (p["preset"], p["layout"]) == (preset, layout)}
    ours = [p["gum_costs"] for p in found.values() if "note" not in p]
    # GUM was timed anew in each pair: the median over pairs is its time.
    yield f"{1000 * statistics.median(each['plain']['median'] for each in ours):.0f} ms"
    for other in ("optax muon", "adamw", "optax galore"):
        ratio = found.get(other, {}).get("plain_ratio")
        yield (
            f"{ratio['of_medians']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        )
    yield f"{statistics.median(each['refresh_over_plain'] for each in ours):.1f}"
    yield f"{100 * statistics.median(each['refresh_share'] for each in ours):.1f} %"
    svd = found.get("gum, svd", {}).get("svd_refresh_ratio")
    yield f"{svd['of_medians']:.0f}" if svd else ""


def counterexample() -> Iterator[tuple[str, str, str]]:
    """Yields the final gap of each method on the paper's counterexample."""
    result = _read("counterexample.json")
    gaps = result["final_relative_gap"]
    worst = max(gaps["GUM"])
    medians = ", ".join(f"{name} {_power(statistics.median(v))}" for name, v in gaps.items())
    yield (
        f"Counterexample: final gap / gap at the start, median of {len(gaps['GUM'])} seeds",
        f"{medians} (worst seed of GUM {_power(worst)})",
        "python -m experiments.studies.counterexample",
    )


def memory() -> Iterator[tuple[str, str, str]]:
    """Yields state and temporaries for LLaMA presets of GaLore's paper."""
    result = _read(COMPILED)
    rank, gamma = result["config"]["rank"], result["config"]["full_rank_layers"]
    command = "python -m experiments.benchmarks --studies compiled"
    for preset in ("350m", "1b"):
        yield (
            f"Optimizer state, LLaMA {preset}, float32, rank {rank}, gamma {gamma}",
            _mebibytes(result["state_bytes"][preset]["separate"]),
            command,
        )
    for preset in ("60m", "1b"):
        yield (
            f"Temporaries of the compiled update, LLaMA {preset}, {result['device']['platform']}",
            _mebibytes(result["temporary_bytes"][preset]["separate"]),
            command,
        )


def grid() -> Iterator[tuple[str, str, str]]:
    """Yields the best validation loss of GUM and AdamW over one grid of learning rates."""
    # The best rate is chosen by seed 0; the losses of all seeds at that rate are shown.
    entries, best = _grid_entries(), best_of_grid()
    cells = []
    for name in ("gum", "adamw"):
        rate = best[name]["learning_rate"]
        losses = [
            e["validation_loss"]
            for e in entries
            if e["config"]["optimizer"] == name and e["config"]["learning_rate"] == rate
        ]
        each = " and ".join(f"{loss:.2f}" for loss in losses)
        cells.append(f"{name} {each} (learning rate {rate:g})")
    steps = best["gum"]["steps"]
    yield (
        f"Validation loss of the demo's model, {steps} steps, learning rate from one grid, by seed",
        ", ".join(cells),
        "python -m experiments.tune",
    )


def demo() -> Iterator[tuple[str, str, str]]:
    """Yields the numbers that the demo printed when its result was committed."""
    runs = _read("demo.json")["runs"]
    yield (
        "The demo: validation loss; optimizer state; seconds per step, 2 CPU cores",
        "; ".join(
            f"{name} {run['validation_loss']:.2f}, {run['state_bytes'] / 2**20:.1f} MiB, "
            f"{run['seconds_per_step']:.2f} s"
            for name, run in runs.items()
        ),
        "make demo",
    )


def compilation() -> Iterator[tuple[str, str, str]]:
    """Yields the seconds of compiling GUM's update by the number of layers, for each layout."""
    result = _read(COMPILED)
    for layout in ("separate", "stacked"):
        cells = (
            f"{row['depth']} layers {row['trace_seconds'] + row['compile_seconds']:.0f} s"
            for row in result["growth"]
            if (row["contender"], row["layout"]) == ("gum", layout)
        )
        yield (
            f"Tracing and compiling GUM's update, widths of {result['config']['depth_preset']}, "
            f"layers {layout}",
            ", ".join(cells),
            "python -m experiments.benchmarks --studies compiled",
        )


def sweep() -> Iterator[tuple[str, str, str]]:
    """Yields the milliseconds of GUM's plain step by its settings."""
    result = _read("benchmarks/sweep.json")
    for name in ("gamma", "rank"):
        yield (
            f"Milliseconds of GUM's plain step on {result['config']['sweep_preset']}, by {name}",
            ", ".join(f"{row[name]}: {1000 * row['plain']['median']:.0f}" for row in result[name]),
            "python -m experiments.benchmarks --studies sweep",
        )


def training() -> Iterator[tuple[str, str, str]]:
    """Yields speed and memory of whole training steps, for each batch that was measured."""
    for result in whole_steps.stored(RESULTS / "benchmarks"):
        config = result["config"]
        # The command names the options in which batches differ.
        options = ("training_preset", "batch_size", "rounds", "training_steps")
        speeds = whole_steps.speeds(result)
        adamw = result["medians"]["adamw"]["amortized_tokens_per_second"]
        yield (
            f"Training {config['training_preset']} with {config['batch_size']} x "
            f"{config['seq_len']} tokens a step: tokens per second over AdamW's; bytes that the "
            "compiled step holds",
            "; ".join(
                f"{name} {speeds[name]:.2f}, {each['program_bytes'] / 2**20:.0f} MiB"
                for name, each in result["medians"].items()
            )
            + f" (AdamW: {adamw:.0f} tokens/s)",
            "python -m experiments.benchmarks --studies training "
            + " ".join(f"{flag(name)} {config[name]}" for name in options),
        )


def projector() -> Iterator[tuple[str, str, str]]:
    """Yields the energy that the default projector's bases capture, over the SVD's."""
    result = _read("benchmarks/projectors.json")
    rows, config = result["by_step"], result["config"]
    yield (
        f"Energy that GUM's bases catch over the SVD's, {rows[0]['matrices']} matrices at "
        f"{len(rows)} refreshes of a run of {config['projector_preset']}",
        f"worst {min(row['min'] for row in rows):.4f}, at the first refresh "
        f"{rows[0]['min']:.4f}; least median {min(row['median'] for row in rows):.4f}",
        "python -m experiments.benchmarks --studies projectors",
    )


def curves() -> Iterator[tuple[str, str, str]]:
    """Yields mean and deviation of validation losses with the default projector and with SVD."""
    entries = _read("projector_curves.json")
    # None is the default projector, power iteration.
    losses = {
        name: [e["validation_loss"] for e in entries if e["config"]["projector"] in projectors]
        for name, projectors in (
            ("default projector", (None, "subspace_iteration")),
            ("SVD", ("svd",)),
        )
    }
    steps, seeds = entries[0]["config"]["steps"], len(losses["SVD"])
    yield (
        f"Validation loss after {steps} steps of the demo's model, {seeds} seeds",
        "; ".join(
            f"{name} {statistics.mean(values):.3f} (standard deviation "
            f"{statistics.stdev(values):.3f})"
            for name, values in losses.items()
        ),
        # The table puts backticks around the whole.
        f"{_CURVES_COMMAND}`, and with `--base.optimizer.projector svd",
    )


# In the order of the rows of `table`.
FACTS: tuple[Callable[[], Iterator[tuple[str, str, str]]], ...] = (
    counterexample,
    memory,
    compilation,
    sweep,
    training,
    projector,
    curves,
    grid,
    demo,
)


# Page -> its tables, each of which is found by its head.
TABLES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (overview.table, headline),
    "docs/choosing.md": (overview.table,),
    "docs/little_memory.md": (tpu, chips),
    "docs/finetuning.md": (finetuning, plans),
    "docs/pods.md": (collectives, slices),
    "docs/quantized.md": (in_few_bits,),
    "docs/results.md": (
        table,
        performance,
        costs,
        pretraining,
        times,
        claims,
        contenders.table,
        contenders.deep_table,
        contenders.ranks_table,
        one_seed.table,
    ),
}


def renew(page: Path, tables: tuple[Callable[[], str], ...]) -> None:
    """Replaces the tables of a page by new ones.

    Args:
      page: the Markdown file.
      tables: functions that return tables. Each replaces the table with the same head.

    Raises:
      ValueError: the page has no table with such a head.
    """
    text = page.read_text()
    for each in tables:
        new = each()
        # From the line of the head to the last line that begins with a bar.
        head = re.escape(new.partition("\n")[0])
        text, found = re.subn(
            rf"^{head}\n(\|.*(\n|$))*", lambda _, new=new: f"{new}\n", text, flags=re.M
        )
        if not found:
            raise ValueError(f"{page}: no table with the head {new.partition(chr(10))[0]}")
    page.write_text(text)


def best_of_grid() -> dict[str, dict]:
    """Returns for each optimizer the configuration with the least validation loss on seed 0."""
    first = [e for e in _grid_entries() if e["config"]["seed"] == 0]
    # The dictionary keeps the last entry of each optimizer, its best.
    worst_first = sorted(first, key=lambda e: -e["validation_loss"])
    return {entry["config"]["optimizer"]: entry["config"] for entry in worst_first}


def _grid_entries() -> list[dict]:
    """Reads the runs of the grid, without those with another learning rate for the fallback."""
    return [e for e in _read("demo_grid.json") if not e["config"]["fallback_learning_rate"]]


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _mebibytes(sizes: dict[str, int]) -> str:
    return ", ".join(
        f"{_NAMES.get(name, name)} {size / 2**20:.0f} MiB" for name, size in sizes.items()
    )


def _power(value: float) -> str:
    """Formats a gap: two digits, or below a thousandth its power of ten."""
    return f"{value:.2g}" if value > 1e-3 or value == 0 else f"{value:.0e}"


if __name__ == "__main__":
    for name, tables in TABLES.items():
        renew(ROOT / name, tables)

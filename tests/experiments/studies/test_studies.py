"""The studies that compare training runs: their runs, and the results made from them."""

import contextlib
import dataclasses
import io
import json
import math
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

from experiments.reporting import STYLES, save
from experiments.studies import (
    ablations,
    finetuning,
    frontier,
    luck_of_draws,
    mechanism,
    pretraining,
    singular_values,
    spectra,
    time_to_loss,
    tuning,
)
from experiments.trainer import directions, optimizers, sweeps
from experiments.trainer.config import Config as Run
from experiments.trainer.config import change
from experiments.trainer.evaluation import wilson
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import architecture

SPECTRA = {
    f"layers/{i}/mlp/{kind}/kernel": singular_values.spectrum(np.eye(3))
    for i, kind in enumerate(spectra.KINDS)
}


def entry(config, loss=None):
    """What a run of `config` might leave: the nearer its rate is to 3e-3, the better."""
    if loss is None:
        loss = 4 + abs(np.log10(config.learning_rate / 3e-3)) + config.seed / 100
    return {
        "config": sweeps.identity(config),
        "validation_loss": loss,
        "curve": [[200, loss + 1], [400, loss]],
        "seconds_per_step": 0.5,
        "state_bytes": 2**20,
        "spectra": SPECTRA,
    }


def instead_of_training(monkeypatch):
    """Returns the list of the sets of configurations, which grows as they are asked for."""
    asked = []

    def complete(configs, out, **options):
        asked.append(list(configs))
        kept = json.loads(out.read_text()) if out.exists() else []
        known = [each["config"] for each in kept]
        kept += [entry(c) for c in dict.fromkeys(configs) if sweeps.identity(c) not in known]
        out.write_text(json.dumps(kept))
        return [entry(config) for config in configs]

    monkeypatch.setattr(sweeps, "complete", complete)
    return asked


@pytest.fixture
def trained(monkeypatch):
    """Instead of training: the sets of configurations that were asked for."""
    return instead_of_training(monkeypatch)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The pretraining study, which others begin with: its result file, and what it asked for."""
    path = tmp_path_factory.mktemp("pretraining") / "pretraining.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        asked = instead_of_training(patch)
        assert pretraining.main(["--out", str(path)]) == 0
    assert "stdlib: 400 steps, 3 seeds" in shown.getvalue()
    return path, asked


@pytest.fixture
def tuned(pretrained, trained):
    """The result file of the pretraining study, whose sets are the first of `trained`."""
    path, asked = pretrained
    trained.extend(asked)
    return path


def test_pretraining_tunes_each_on_one_grid_and_repeats_the_best(trained, tuned):
    grid, first, second = trained
    assert {(c.optimizer.name, c.learning_rate, c.seed, c.corpus) for c in grid} == {
        (o, rate, 0, ("stdlib",))
        for o in pretraining.OPTIMIZERS
        for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    }
    for corpus, configs in (("stdlib", first), ("runs/sotu", second)):
        assert {(c.optimizer.name, c.seed) for c in configs} == {
            (o, seed) for o in pretraining.OPTIMIZERS for seed in (0, 1, 2)
        }
        assert {(c.learning_rate, c.corpus) for c in configs} == {(3e-3, (corpus,))}
    everyone = [*grid, *first, *second]
    assert len({c.run_dir for c in everyone}) == len(set(everyone))
    assert tuned.with_suffix(".png").stat().st_size > 1000


def test_all_that_differs_between_optimizers_is_the_optimizer_and_its_rate(trained, tuned):
    options = [
        {k: v for k, v in sweeps.identity(c).items() if k != "learning_rate"} for c in trained[0]
    ]
    own = [
        {field.name for field in dataclasses.fields(c.optimizer)} | {"optimizer"}
        for c in trained[0]
    ]
    both = options[0].keys() - set.union(*own)
    assert all({k: each[k] for k in both} == {k: options[0][k] for k in both} for each in options)
    # What optimizers share has one value too: runs have the same rank and period.
    for name in ("rank", "period", "draw_seed", "full_rank_layers", "consistent_rms"):
        assert len({each[name] for each in options if name in each}) == 1, name


def test_a_run_that_diverged_is_never_the_best():
    run = Run()
    losses = {1e-3: 5.0, 3e-3: float("nan"), 1e-2: 4.0, 3e-2: float("inf")}
    entries = [entry(dataclasses.replace(run, learning_rate=r), v) for r, v in losses.items()]
    assert pretraining.best_rates(entries) == {"gum": 1e-2}


def test_an_optimizer_whose_runs_all_diverged_is_named(tmp_path):
    run, path = Run(), tmp_path / "pretraining.json"
    entries = [entry(run), entry(change(run, optimizer="adamw"), float("nan"))]
    path.write_text(json.dumps(entries))
    best, by_corpus = pretraining.stored(path, "pretraining")
    assert list(best) == ["gum"]
    assert [[e["config"]["optimizer"] for e in found] for found in by_corpus.values()] == [["gum"]]
    for study, more in ((pretraining, ("stdlib",)), (finetuning, ())):
        config: Any = study.Config(optimizers=("gum", "adamw"))
        with pytest.raises(ConfigError, match="`learning_rates`: no run of adamw ended"):
            study.finals(config, best, *more)


STEPS_TO = {7.5: 10, 7: 10, 6: 15, 5: 20, 4.9: None}  # before the first point nothing is known


@pytest.mark.parametrize(("loss", "step"), STEPS_TO.items())
def test_steps_to_a_loss(loss, step):
    assert pretraining.steps_to([[10, 7.0], [20, 5.0]], loss) == step


def test_rows_of_a_comparison():
    entries = [
        entry(dataclasses.replace(run, seed=seed), loss + seed)
        for seed in (0, 1)
        for run, loss in ((Run(), 3.0), (change(Run(), optimizer="adamw"), 4.0))
    ]
    gum, adamw = pretraining.compare(entries)
    assert (gum["loss"], gum["deviation"]) == (3.5, pytest.approx(0.5**0.5))
    # AdamW ends at 4.5; GUM's curves come down from 4 to 3 and from 5 to 4 between 200 and 400.
    assert gum["steps_to_adamw"] == pytest.approx((200 + 300) / 2)
    assert gum["seconds_to_adamw"] == pytest.approx(125)
    assert adamw["steps_to_adamw"] is None  # not by all of its seeds


@pytest.mark.slow
def test_ablations_change_one_thing_at_a_time(trained, tuned, tmp_path):
    out = tmp_path / "ablations.json"
    assert ablations.main(["--pretraining", str(tuned), "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 1000
    config = ablations.Config()
    default = dataclasses.replace(config.base, learning_rate=3e-3)
    settings = ablations.panels(config, {"gum": 3e-3, "galore_muon": 1e-2})
    for title, panel in settings.items():
        identities = [
            [sweeps.identity(c) for c in ablations.configurations(config, {"gum": 3e-3}, changes)]
            for changes in panel.values()
        ]
        assert sweeps.identity(default) in [first for first, _ in identities], title
        assert len({json.dumps(each) for each in identities}) == len(panel), title
    asked = trained[3]
    assert [c.seed for c in asked] == sorted(c.seed for c in asked)
    for run in asked:
        optimizers.build(run, architecture(run).layers)


def test_ablations_by_depth_hold_equal_bytes():
    """Ranks and draws differ between early and late layers, and nothing else does."""
    config = ablations.Config()
    params = {"layers": [{"q": jax.ShapeDtypeStruct((128, 256), "float32")}] * 8}

    def state_of(changes):
        [run, *_] = ablations.configurations(config, {"gum": 3e-3}, changes)
        state = jax.eval_shape(optimizers.build(run, 8).init, params)
        return optax.tree.get(state, "LowRankState")

    settings = ablations.panels(config, {"gum": 3e-3, "galore_muon": 1e-2})
    ranks = settings["rank, early : late layers"]
    draws = settings["chance of a draw, early : late layers"]
    states = [state_of(changes) for changes in (*ranks.values(), *draws.values())]
    bases = [sum(math.prod(b.shape) for b in state.basis.values()) for state in states]
    assert set(bases) == {8 * 128 * 32}
    assert {sum(s.shape[0] for s in state.slots.values()) for state in states} == {2}
    *_, steep = ranks
    assert steep == "40:24"
    assert [b.shape for b in state_of(ranks[steep]).basis.values()] == [(4, 128, 40), (4, 128, 24)]


def test_ablations_compare_seed_by_seed():
    runs_of = [entry(pretraining.SMALL, loss) for loss in (3.5, 4.25)]
    found = ablations.summary(runs_of, [3.0, 4.0])
    assert (found["differences"], found["difference"]) == ([0.5, 0.25], 0.375)
    assert found["loss"] == 3.875


def test_a_search_and_grids_of_one_file(trained, tmp_path, capsys):
    """The coarse grid is part of the fine one; a search finds the rate that the stub likes best."""
    out = tmp_path / "tuning.json"
    arguments = ["--out", str(out), "--optimizers", "gum", "--searches", "0", "1"]
    assert tuning.main(arguments) == 0
    coarse, fine, *steps = trained
    assert (len(coarse), len(fine), [len(step) for step in steps]) == (9, 49, [1] * 18)
    assert set(coarse) <= set(fine)
    rows = capsys.readouterr().out.splitlines()
    assert any(row.split()[:6] == ["gum", "grid,", "3", "x", "3", "9"] for row in rows)
    found = min(entry(run)["validation_loss"] for [run] in steps)
    assert found < min(entry(run)["validation_loss"] for run in coarse)


def test_a_run_that_diverged_is_not_the_best_of_a_search():
    entries = [entry(Run(), loss) for loss in (math.nan, 3.0, 2.0)]
    assert tuning.summary([entries, entries[:2]]) == (3, 2.5, 2.0, 3.0)


def test_draws_differ_in_nothing_else(trained, tuned, tmp_path, capsys):
    out = tmp_path / "draws.json"
    assert luck_of_draws.main(["--pretraining", str(tuned), "--out", str(out)]) == 0
    assert {(c.seed, c.optimizer.draw_seed, c.optimizer.full_rank_layers) for c in trained[-1]} == {
        (0, draw, gamma) for draw in range(4) for gamma in (0, 1, 2, 4)
    }
    assert "over 4 draws" in capsys.readouterr().out


def test_spectra_of_the_best_runs(trained, tuned, tmp_path):
    out = tmp_path / "spectra.json"
    assert spectra.main(["--pretraining", str(tuned), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["optimizers"]
    assert list(found) == list(spectra.Config.optimizers)
    assert found["gum"]["seeds"] == 3  # on the first corpus
    assert found["gum"]["stable_rank"]["q"] == {"mean": 3, "deviation": 0}
    assert found["gum"]["quantiles"] == pytest.approx([1] * 17)
    with pytest.raises(ConfigError, match="no run of golore"):
        spectra.main(["--optimizers", "golore", "--pretraining", str(tuned)])


@pytest.mark.parametrize("study", [ablations, luck_of_draws, spectra])
def test_studies_say_what_they_need(study, tmp_path):
    with pytest.raises(ConfigError, match=r"`pretraining`: there is no .* run `python -m"):
        study.main(["--pretraining", str(tmp_path / "none.json")])


def test_a_spectrum():
    found = singular_values.spectrum(np.diag([4.0, 2.0, 0.0]))
    assert found["stable_rank"] == pytest.approx(20 / 16) and found["norm"] == 4
    assert (found["quantiles"][0], found["quantiles"][8], found["quantiles"][-1]) == (0, 0.5, 1)


def test_hidden_matrices_are_measured():
    layers = {
        i: {"attn": {"q": {"kernel": np.eye(4)[:rank]}}, "norm": {"scale": np.ones(4)}}
        for i, rank in enumerate((4, 1))
    }
    params = {"embed": {"embedding": np.eye(4)}, "layers": layers}
    assert list(singular_values.spectra(params)) == ["0/attn/q/kernel", "1/attn/q/kernel"]
    assert singular_values.stable_ranks(params) == {"stable_rank": {"q": pytest.approx(2.5)}}


def answered(config):
    """What a run of fine-tuning might leave: its loss as above, and 150 right answers of 200."""
    before = {"right": 40, "of": 200, "share": 0.2} if config.baseline else None
    after = {"right": 150, "of": 200, "share": 0.75}
    kept = entry(config)
    mean = kept["validation_loss"]
    loss = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "windows": 9}
    return kept | {"before": before, "after": after, "loss": loss}


@pytest.mark.slow
def test_finetuning_tunes_each_on_one_grid_and_repeats_the_best(monkeypatch, tmp_path, capsys):
    asked = []

    def complete(configs, out, **options):
        asked.append(list(configs))
        assert options["trainer"] is finetuning.tune
        return [answered(config) for config in configs]

    monkeypatch.setattr(sweeps, "complete", complete)
    out = tmp_path / "finetuning.json"
    assert finetuning.main(["--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 1000
    *_, grid, finals = asked

    def points(configs):
        return {(c.optimizer.name, c.learning_rate, c.seed) for c in configs}

    # The two in the middle, up to the neighbour of the best, 3e-3, which is the grid's last.
    rates = [{r for _, r, _ in points(configs)} for configs in asked[:-1]]
    assert rates == [{1e-4, 3e-4}, {1e-4, 3e-4, 1e-3}, {1e-4, 3e-4, 1e-3, 3e-3}]
    assert points(grid) == {(o, r, 0) for o in finetuning.OPTIMIZERS for r in rates[-1]}
    assert points(finals) == {(o, 3e-3, seed) for o in finetuning.OPTIMIZERS for seed in (0, 1)}
    assert sum(c.baseline for c in grid) == 1
    options = {"optimizer", "learning_rate", "seed", "projector"}
    for each in map(sweeps.identity, grid + finals):
        shared = each.keys() & sweeps.identity(grid[0]).keys() - options
        assert {k: each[k] for k in shared} == {
            k: v for k, v in sweeps.identity(grid[0]).items() if k in shared
        }
    shown = capsys.readouterr().out
    assert "24 steps, 2 seeds, right before: 20.0%" in shown
    assert "4.0000 (75%)" in shown  # of the grid


def test_seeds_answer_the_same_items():
    entries = [
        answered(change(finetuning.BASE, optimizer=o, learning_rate=3e-3, seed=seed))
        for o in finetuning.OPTIMIZERS for seed in (0, 1)
    ]  # fmt: skip
    rows = finetuning.compare(entries)
    assert [row["optimizer"] for row in rows] == list(finetuning.OPTIMIZERS)
    assert rows[0]["shares"] == [0.75, 0.75]
    assert rows[0]["interval"] == wilson(150, 200)  # not of 400
    assert rows[0]["losses"] == [4.0, 4.01] and rows[0]["loss"] == pytest.approx(4.005)
    assert rows[0]["loss_interval"] == pytest.approx((3.91, 4.11))


def test_other_tasks_in_a_result_file_are_left_out():
    run = change(finetuning.BASE, optimizer="gum", learning_rate=1e-4)
    better = dataclasses.replace(run, learning_rate=3e-3)
    other = dataclasses.replace(better, task="gsm_symbolic")
    kept = finetuning.finals_of([answered(c) for c in (run, better, other)])
    assert [entry["config"] for entry in kept] == [sweeps.identity(better)]


def test_the_frontier_searches_until_both_neighbours_are_worse(trained, tmp_path, capsys):
    out = tmp_path / "frontier.json"
    options = ["--contenders", "columns", "scale", "--seeds", "0", "1", "--out", str(out)]
    assert frontier.main(options) == 0
    *rounds, first, second = trained
    # Low-rank Muon begins at the best rate, 3e-3; SCALE climbs from 1e-3 to 4e-3.
    tried = {
        name: [[c.learning_rate for c in asked if c.optimizer.name == name] for asked in rounds]
        for name in ("gum", "scale")
    }
    assert tried["gum"] == [[1.5e-3, 3e-3, 6e-3], [], []]
    assert tried["scale"] == [[5e-4, 1e-3, 2e-3], [4e-3], [8e-3]][: len(rounds)]
    assert {c.steps for asked in rounds for c in asked} == {frontier.TUNING_STEPS}
    for asked, corpus in ((first, "stdlib"), (second, "runs/sotu")):
        assert {(c.optimizer.name, c.seed) for c in asked} == {
            (name, seed) for name in ("gum", "scale") for seed in (0, 1)
        }
        assert {(c.corpus, c.steps) for c in asked} == {((corpus,), frontier.STEPS)}
        assert {c.learning_rate for c in asked if c.optimizer.name == "gum"} == {3e-3}
    assert out.with_suffix(".png").exists()
    assert "low-rank Muon + columns" in capsys.readouterr().out


def test_without_a_search_all_runs_have_the_rate_of_one_grid_point(trained, tmp_path):
    out = tmp_path / "frontier.json"
    options = ["--contenders", "muon_int6", "lean_muon6", "--corpora", "stdlib", "--out", str(out)]
    options += ["--tuning-runs", "none", "--seeds", "0", "1"]
    assert frontier.main([*options, "--first", "-1"]) == 0
    (asked,) = trained
    assert {(c.learning_rate, c.steps) for c in asked} == {(1.5e-3, 4000)}
    assert len(json.loads(out.read_text())) == 2 * 2  # contenders, seeds
    # The same study is found in its file, another one is not.
    config = frontier.Config(
        contenders=("lean_muon6",), tuning_runs="none", first=-1, seeds=(1,), corpora=("stdlib",),
        out=out,
    )  # fmt: skip
    rates, found = frontier.finished(config)
    assert rates == {"lean_muon6": 1.5e-3} and len(found["stdlib"]["lean_muon6"]) == 1
    with pytest.raises(ConfigError, match="no run of muon with seed 1, learning rate"):
        frontier.finished(dataclasses.replace(config, first=0))


def test_rates_are_judged_by_all_runs_and_compared_by_pairs(trained, tmp_path, capsys):
    """Where the search has whole runs, there is nothing left for the finals to train."""
    out = tmp_path / "frontier.json"
    options = ["--contenders", "muon", "columns", "--seeds", "0", "1", "--corpora", "stdlib"]
    options += ["--tuning-runs", "all", "--tuning-steps", "4000", "--out", str(out)]
    assert frontier.main(options) == 0
    assert {(c.seed, c.steps) for asked in trained for c in asked} == {(0, 4000), (1, 4000)}
    assert len(json.loads(out.read_text())) == 2 * 2 * 3  # contenders, seeds, rates
    config = frontier.Config(contenders=("muon", "columns"), seeds=(0, 1), corpora=("stdlib",))
    runs_of = frontier.finals(config, {"muon": 3e-3, "columns": 6e-3}, "stdlib")
    rows = frontier.compare(config, [entry(run) for run in runs_of])
    by_name = {row["contender"]: row for row in rows}
    # Seeds move both alike, so the difference has no spread; the losses have.
    assert by_name["columns"]["above_muon"] == pytest.approx(np.log10(2))
    assert by_name["columns"]["apart_muon"] == pytest.approx(0, abs=1e-9)
    assert by_name["columns"]["deviation"] == pytest.approx(0.01 / 2**0.5)
    assert by_name["muon"]["seconds_per_step"] == 0.5
    # Runs of one program have no seconds of their own.
    rows = frontier.compare(config, [entry(run) | {"together": 4} for run in runs_of])
    assert {row["seconds_per_step"] for row in rows} == {None}


def test_steps_become_time_and_every_seed_has_to_reach_the_goal():
    """By hand: curves of two seeds, and a step of Muon that takes twice AdamW's."""

    def run(curve):
        return {"curve": curve, "validation_loss": curve[-1][1]}

    of = {
        "adamw": [run([[1000, 5.0], [4000, 3.0]]), run([[1000, 5.0], [4000, 3.5]])],
        # Halfway from 2,000 to 4,000 in the first seed, a quarter of the way in the second.
        "muon": [run([[2000, 4.0], [4000, 2.0]]), run([[2000, 4.0], [4000, 2.0]])],
        "gum": [run([[2000, 4.0], [4000, 2.9]]), run([[2000, 4.0], [4000, 3.6]])],
    }
    rows = time_to_loss.compare(of, {"adamw": 1.0, "muon": 2.0, "gum": 1.0})
    assert rows["muon"]["steps_to_adamw"] == pytest.approx((3000 + 2500) / 2)
    assert rows["muon"]["time_to_adamw"] == pytest.approx(2 * 2750 / frontier.STEPS)
    assert rows["adamw"]["steps_to_adamw"] == 4000
    assert rows["gum"] == dict.fromkeys(
        ("steps_to_adamw", "time_to_adamw", "steps_to_muon", "time_to_muon")
    )


def test_refreshes_are_spread_over_the_period_of_the_study():
    """On a real model: the first step of each turn is a refresh, and the others are not."""
    base = change(frontier.BASE, preset="tiny", rank=4, period=50)
    runs = {"adamw": change(base, optimizer="adamw"), "gum": base}
    found = time_to_loss.timed(time_to_loss.Config(turns=2, steps=3), runs)
    assert found["adamw"]["over_adamw"] == {"of_medians": 1.0, "min": 1.0, "max": 1.0}
    assert "refresh" not in found["adamw"]
    gum = found["gum"]
    plain, refresh = gum["plain"]["median"], gum["refresh"]["median"]
    assert gum["amortized_seconds"] == pytest.approx(plain + (refresh - plain) / 50)
    assert gum["refresh"]["repeats"] == gum["plain"]["repeats"] == 2


def test_every_contender_can_run_and_has_a_name_of_its_own():
    for key in frontier.CONTENDERS:
        frontier.point(frontier.Config(), key, 1e-3, 0, "stdlib", 1000)
    names = [contender.name for contender in frontier.CONTENDERS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "key",
    ["muon", "muon_rows8", "muon_rows4", "adamw", "scale", "columns", "columns_16", "joint", "gum",
     "columns_slots_1", "additive", "adam_columns", "fira", "frugal", "apollo", "apollo_mini",
     "galore"],
)  # fmt: skip
def test_contenders_are_other_transformations_of_the_same_rest(key):
    """Bytes of the hidden matrices, by hand, in 8 blocks of nano."""
    config = frontier.point(frontier.Config(), key, 1e-3, 0, "stdlib", 1000)
    shapes = [(128, 128)] * 2 + [(64, 128)] * 2 + [(128, 352)] * 3
    rank, drawn = (getattr(config.optimizer, n, 0) for n in ("rank", "full_rank_layers"))
    numbers = {
        "muon": sum(m * n for m, n in shapes),
        "adamw": sum(2 * m * n for m, n in shapes),
        "scale": 0,
        "low rank": sum((m + n) * rank for m, n in shapes),
        "adam": sum((m + 2 * n) * rank for m, n in shapes),
        "mini": sum(m + 2 * n for m, n in shapes),
        # Some of the eight matrices of each role in full.
        "slots": sum((m + n) * rank + m * n * drawn / 8 for m, n in shapes),
        # A scale in float32 for each input: those of one matrix of seven are the hidden width.
        "muon_rows8": sum(m * n / 4 for m, n in shapes) + 6 * 128 + 352,
        "muon_rows4": sum(m * n / 8 for m, n in shapes) + 6 * 128 + 352,
    }
    kinds = {
        "adam": ("galore", "fira", "apollo", "frugal", "adam_columns"),
        "mini": ("apollo_mini",),
        "slots": ("gum", "additive", "columns_slots_1"),
        "low rank": ("columns", "columns_16", "joint"),
    }
    kind = next((kind for kind, keys in kinds.items() if key in keys), key)
    # Counters, keys, norms and the slots' numbers are a few bytes more.
    assert 0 <= frontier.hidden_bytes(config) - 8 * 4 * numbers[kind] < 500


def test_residuals_without_momentum_have_the_size_of_the_directions_left_out():
    rng = np.random.default_rng(0)
    residual, projected = rng.normal(size=(2, 6, 10)), rng.normal(size=(2, 2, 10))
    for name, make in directions.DIRECTIONS.items():
        direction: Any = make()
        state = direction.init(np.float32(residual))
        found, _ = jax.jit(direction.update)(
            np.float32(residual), state, projected=np.float32(projected)
        )
        np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), 2.0, rtol=1e-5)
        columns = np.linalg.norm(found, axis=1)
        equal = {
            "columns": columns,
            "energy": columns,  # at the first step, of which the average consists
            "rows": np.linalg.norm(found, axis=2),
            "sign": np.abs(found),
            "plain": np.asarray(found) / residual,
        }[name]
        for each in equal:
            np.testing.assert_allclose(each, each.ravel()[0], rtol=1e-4)


def test_energies_of_columns_are_averaged_over_steps():
    rng = np.random.default_rng(0)
    steps, projected = rng.normal(size=(5, 6, 10)), np.zeros((2, 10), np.float32)
    direction: Any = directions.DIRECTIONS["energy"]()
    state, average = direction.init(np.float32(steps[0])), 0.0
    for t, residual in enumerate(steps, 1):
        found, state = direction.update(np.float32(residual), state, projected=projected)
        average = 0.9 * average + 0.1 * np.sum(residual**2, axis=0)
        expected = (4 / 10) ** 0.5 * residual / np.sqrt(average / (1 - 0.9**t))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_mechanism_splits_momentum_at_the_bases():
    """By hand: a basis of two axes; momentum inside, across and outside of it."""
    tall, wide = "layers/0/mlp/down/kernel", "layers/0/attn/q/kernel"
    q, down = np.zeros((4, 6), np.float32), np.zeros((6, 4), np.float32)
    blocks = {"0": {"attn": {"q": {"kernel": q}}, "mlp": {"down": {"kernel": down}}}}
    params = {"layers": blocks}
    basis = np.eye(4)[:, :2]
    rng = np.random.default_rng(0)
    momentum = np.diag([3.0, 0.0, 4.0, 0.0]) @ np.eye(4, 6)
    found = {
        wide: mechanism.Matrix(momentum, momentum, basis),
        tall: mechanism.Matrix(rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), basis),
    }
    assert mechanism.share_outside(momentum, basis) == pytest.approx(16 / 25)
    assert mechanism.cosine({wide: found[wide]}) == pytest.approx(1)
    moved = mechanism.orthogonalized(params, found, 0.1, outside=True)
    down = np.asarray(moved["layers"]["0"]["mlp"]["down"]["kernel"]).T
    # Nothing inside of the basis, m - r = 2 orthonormal rows, Adam's size 0.2 sqrt(6), downhill.
    np.testing.assert_allclose(basis.T @ down, 0, atol=1e-6)
    size = 0.1 * 0.2 * 6**0.5
    np.testing.assert_allclose(np.linalg.svd(down)[1], [size, size, 0, 0], atol=1e-6)
    assert np.sum(down * found[tall].momentum) < 0
    whole = mechanism.orthogonalized(params, found, 0.1, outside=False)
    down = np.asarray(whole["layers"]["0"]["mlp"]["down"]["kernel"])
    np.testing.assert_allclose(np.linalg.svd(down)[1], [size] * 4, rtol=1e-5)


def test_every_optimizer_has_a_style_of_its_own(tmp_path):
    assert STYLES.keys() == optimizers.OPTIMIZERS.keys()
    everyone = frontier.Config(contenders=("muon", "columns", "columns_rotate", "gum", "joint"))
    styles = [*STYLES.values(), *(frontier._style(everyone, k) for k in ("columns", "joint"))]
    assert len({(style.colour, style.marker) for style in styles}) == len(styles)
    assert frontier._style(everyone, "muon") == STYLES["muon"]


def test_a_figure_is_the_same_file_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        figure, axes = plt.subplots()
        axes.plot([1, 2], [3, 4])
        assert save(figure, tmp_path / name / "x.json") == tmp_path / name / "x.png"
    first, second = ((tmp_path / name / "x.svg").read_bytes() for name in ("a", "b"))
    assert first == second and first.startswith(b"<?xml")

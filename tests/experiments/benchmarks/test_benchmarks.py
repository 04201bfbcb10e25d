"""The benchmarks write their files; counts and formulas equal those computed by hand."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import reporting
from experiments.benchmarks import (
    __main__,
    bases,
    compiled,
    contenders,
    figure,
    floors,
    moments,
    orthogonality,
    parameters,
    step,
    sweep,
    timing,
    training,
    variants,
)
from experiments.benchmarks.settings import Config
from experiments.models import llama
from experiments.reliability import kills
from experiments.trainer.options import ConfigError
from gum_optax import projectors as library

TINY = Config(
    rank=8, full_rank_layers=1, repeats=1, rounds=1, layouts=("separate",), contenders=("adamw",),
    svd=False, presets=("tiny",), state=("tiny",), compiled=(), compiled_gum=("tiny",),
    depths=(2,), depth_preset="tiny", sweep_preset="tiny", ranks=(8,), gammas=(1,), periods=(10,),
    training_preset="tiny", training_steps=5, batch_size=1, seq_len=8,
    projector_preset="tiny", projector_rank=8, projector_steps=2, projector_period=2,
)  # fmt: skip


def small(config, **changes):
    return dataclasses.replace(config, **changes)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(floors, "matmul_rate", lambda: 1e9)
    return small(TINY, out=tmp_path / "benchmarks")


@pytest.fixture
def few_matrices(monkeypatch):
    """Two matrices in place of a preset: compiling GUM for all roles of one takes seconds."""
    shape = jax.ShapeDtypeStruct((16, 24), np.float32)

    def tree(name):
        return {"layers": {0: {"w": shape}, 1: {"w": shape}}}

    monkeypatch.setattr(parameters, "separate", tree)
    monkeypatch.setitem(parameters.LAYOUTS, "separate", tree)


def read(config, name):
    result = json.loads((config.out / f"{name}.json").read_text())
    assert {"config", "versions", "device", "commit"} <= set(result)
    assert result["config"]["seed"] == config.seed and "out" not in result["config"]
    return result


@pytest.mark.usefixtures("few_matrices")
def test_step(config, capsys):
    step.run(config)
    result = read(config, "step/tiny-separate")
    (pair,) = result["pairs"]
    assert (pair["preset"], pair["layout"], pair["other"]) == ("tiny", "separate", "adamw")
    assert set(pair["plain_ratio"]) == {"of_medians", "min", "max"}
    assert {"refresh", "refresh_over_plain", "refresh_share"} <= set(pair["gum_costs"])
    assert set(pair["other_costs"]) == {"plain", "amortized_seconds"}
    assert [each["contender"] for each in result["costs"]] == ["gum", "adamw"]
    assert all(each["measured_over_floor"] > 0 for each in result["costs"])
    assert "adamw" in capsys.readouterr().out


def test_even_steps_of_period_two_are_refreshes(monkeypatch):
    seen = {"gum": [], "adamw": []}
    monkeypatch.setattr(step, "stepper", lambda tx, shared: lambda: seen[tx].append(len(seen[tx])))
    optimizers = {name: name for name in seen}  # the stepper above needs no more of them
    plain, refresh = step.alternating(optimizers, {}, small(TINY, repeats=2))  # pyright: ignore
    assert {name: len(calls) for name, calls in seen.items()} == {"gum": 6, "adamw": 3}
    assert set(plain) == {"gum", "adamw"} and set(refresh) == {"gum"}


def test_optax_galore_does_not_take_stacked_layers():
    assert contenders.optax_galore(8, 1, 2, "stacked") is None
    config = small(TINY, contenders=("optax galore",))
    (pair,) = step._pairs(config, "tiny", "stacked")
    assert pair == {"other": "optax galore", "note": "projects 2-D leaves only"}


@pytest.mark.usefixtures("few_matrices")
def test_compiled(config, monkeypatch):
    monkeypatch.setattr(compiled, "_GROWING", ("adamw",))
    compiled.run(config)
    result = read(config, "compiled")
    sizes = result["state_bytes"]["tiny"]["separate"]
    assert set(sizes) == {"parameters", *contenders.TABLE}
    assert result["temporary_bytes"]["tiny"]["separate"]["gum"] > 0
    (grown,) = result["growth"]
    assert (grown["contender"], grown["depth"]) == ("adamw", 2)
    assert grown["hlo_bytes"] > 0 and grown["trace_seconds"] > 0 and grown["compile_seconds"] > 0


@pytest.mark.parametrize("layout", parameters.LAYOUTS)
@pytest.mark.parametrize("name", contenders.TABLE)
def test_state_bytes_are_those_that_init_allocates(name, layout):
    optimizer = contenders.TABLE[name](8, 1, 2, layout)
    if optimizer is None:
        return
    tree = parameters.LAYOUTS[layout]("tiny")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
    planned = compiled.state_bytes(tree, {name: optimizer})
    assert planned[name] == sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer.init(params)))
    assert planned["parameters"] == 4 * llama.parameter_count(tree)


@pytest.mark.usefixtures("few_matrices")
def test_sweep(config):
    sweep.run(config)
    result = read(config, "sweep")
    assert result["rank"][0]["rank"] == 8 and result["gamma"][0]["gamma"] == 1
    assert {"plain", "refresh", "amortized_seconds"} <= set(result["rank"][0])
    (period,) = result["period"]
    plain, refresh = (result["rank"][0][kind]["median"] for kind in ("plain", "refresh"))
    assert period["amortized_seconds"] == pytest.approx(0.9 * plain + 0.1 * refresh)


def test_training(config):
    def work(worker):
        seconds = {"gum": 2.0, "adamw": 1.0, "muon": 3.0}[worker.optimizer]
        return {
            "plain_seconds": seconds,
            "refresh_seconds": 4.0 if worker.optimizer == "gum" else None,
            "tokens_per_second": 8 / seconds,
            "peak_bytes": 100 * int(seconds == 1.0) + 1000,
            "program_bytes": 50 * int(seconds == 1.0) + 1000,
            "state_bytes": 50 * int(seconds == 1.0) + 10,
        }

    training.run(small(config, period=2), work)
    result = training.stored(config.out)[0]
    assert result["gum_over_adamw"]["of_medians"] == 0.5
    assert result["gum_over_adamw_amortized"]["of_medians"] == pytest.approx(1 / 3)
    assert result["saved_peak_over_saved_state"] == 2
    assert result["saved_program_over_saved_state"] == 1
    assert set(result["runs"]) == set(training.CONTENDERS)


@pytest.mark.slow
def test_a_training_worker():
    worker = training.Worker(optimizer="adamw", preset="tiny", batch_size=1, seq_len=8, steps=4)
    measured = training.measure(worker)
    assert measured.pop("refresh_seconds") is None
    assert all(value > 0 for value in measured.values())
    assert measured["tokens_per_second"] == pytest.approx(8 / measured["plain_seconds"])
    assert measured["state_bytes"] < measured["peak_bytes"] < measured["process_peak_bytes"]
    assert measured["state_bytes"] < measured["program_bytes"]


def test_the_first_steps_of_a_worker_do_not_count():
    seconds = [90.0, 80.0, 1.0, 7.0, 2.0]
    assert training._by_kind(training.Worker(every=3), seconds) == ([1.0, 2.0], [7.0])
    adamw = training.Worker(optimizer="adamw", every=3)
    assert training._by_kind(adamw, seconds) == ([1.0, 7.0, 2.0], [])


@pytest.mark.slow
def test_projectors(config, tmp_path):
    text = kills.write_corpus(tmp_path / "corpus")
    bases.run(small(config, corpus=(str(text),), cache_dir=str(tmp_path / "cache")))
    result = read(config, "projectors")
    assert [row["step"] for row in result["by_step"]] == [0, 2]
    kinds = {row["matrix"] for row in result["by_matrix"]}
    assert kinds == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(0 < row["min"] <= row["median"] < 1.001 for row in result["by_matrix"])
    assert all(row["matrices"] == 14 for row in result["by_step"])


@pytest.mark.slow
def test_orthogonality(config, tmp_path):
    text = kills.write_corpus(tmp_path / "corpus")
    orthogonality.run(small(config, corpus=(str(text),), cache_dir=str(tmp_path / "cache")))
    result = read(config, "orthogonality")
    assert result["matrices"] == 7  # one slot of each kind, at the one refresh
    assert len(result["rows"]) == 2 * 3 * 2
    assert all(0 < row["median"] <= row["max"] < 1.5 for row in result["rows"])


def test_errors_of_newton_schulz_are_those_of_its_singular_values():
    a, b, c = 3.4445, -4.7750, 2.0315
    rng = np.random.default_rng(0)
    values = np.array([[1.0, 0.5, 0.1], [1.0, 1.0, 1.0]])
    U = np.linalg.qr(rng.standard_normal((2, 3, 3)))[0]
    V = np.linalg.qr(rng.standard_normal((2, 5, 3)))[0]
    x = values / np.linalg.norm(values, axis=1, keepdims=True)
    for _ in range(2):
        x = a * x + b * x**3 + c * x**5
    expected = np.sqrt(np.mean((x - 1) ** 2, axis=1))
    group = 7 * (U * values[:, None]) @ V.mT
    found = orthogonality.errors([group], ns_steps=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_polar_express_ends_nearer_to_orthogonal_than_muon():
    group = np.random.default_rng(0).standard_normal((4, 24, 40))
    muon, express = (
        orthogonality.errors([group], **options(5)).max()
        for options in orthogonality.COEFFICIENTS.values()
    )
    assert express < 0.1 < muon


def test_the_best_subspace_catches_all_that_can_be_caught():
    gradient = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    best = library.svd(jax.random.key(0), gradient.T, 2, np.zeros((5, 2)))  # pyright: ignore
    assert bases.share(gradient, best) == pytest.approx(1, abs=1e-6)
    assert bases.share(gradient, np.eye(5)[:, :2]) < 0.99


def test_the_figure_shows_what_there_is(config):
    picture = config.out.with_suffix(".png")
    assert figure.draw(config.out, picture) is None
    costs = {"plain": {"median": 1.0}, "refresh": {"median": 2.0}, "amortized_seconds": 1.1}
    rows = [{"rank": rank} | costs for rank in (4, 8)]
    reporting.write(config.out / "sweep.json", config, rank=rows)
    pair = {"preset": "tiny", "layout": "separate", "other": "adamw", "amortized_ratio": 2.0}
    reporting.write(config.out / "step" / "tiny-separate.json", config, pairs=[pair], costs=[])
    medians = {
        name: {"program_bytes": 1, "amortized_tokens_per_second": 2.0}
        for name in training.CONTENDERS
    }
    reporting.write(config.out / "training" / "tiny-1x8.json", config, medians=medians)
    assert figure.draw(config.out, picture) == picture
    assert picture.stat().st_size > 1000


def test_count_of_two_matrices():
    shape = jax.ShapeDtypeStruct((4, 6), np.float32)
    tree = {"layers": [{"w": shape}, {"w": shape}]}
    matrix, fixed = 4 * 6 * 4, 4 * 1 + 8  # bytes; a count, and the key of the draws
    ns = 5 * (4 * 16 * 6 + 2 * 64)  # 5 direct steps of 4 x 6
    low = 4 * 4 * 6 + 34 * 8  # of 2 x 6, in the Gram form
    # One drawn, one low-rank: momentum of both in r x n, one slot, two bases 4 x 2, one index.
    momentum, bases = (2 * 2 * 6 + 4 * 6) * 4, 2 * 4 * 2 * 4
    optimizer = contenders.gum(2, 1, 1, "separate")
    rest = parameters.size(jax.eval_shape(optimizer.init, tree)) - momentum - bases - 4 - fixed
    assert 0 <= rest <= 8  # the fallback's count and the learning rate's
    moved = 3 * 2 * matrix + 2 * (momentum + 4 + fixed + rest) + bases
    assert floors.count("gum", tree, 2, 1) == (moved, 2 * 4 * 4 * 6 * 2 + low + ns)
    assert floors.count("galore", tree, 2, 1)[1] == 2 * 4 * 4 * 6 * 2
    assert floors.count("optax muon", tree, 2, 1)[1] == 2 * ns
    assert floors.count("adamw", tree, 2, 1) == (3 * 2 * matrix + 2 * (4 * matrix + 4), 0)


def test_newton_schulz_takes_the_cheaper_form():
    assert floors.newton_schulz(6, 4) == floors.newton_schulz(4, 6) == 5 * (4 * 96 + 128)
    assert floors.newton_schulz(4, 100) == 4 * 16 * 100 + 34 * 64


def test_floor_seconds_are_those_of_the_slower():
    assert floors.seconds(10, 30, 10.0, 10.0) == 3
    assert floors.seconds(40, 30, 10.0, 10.0) == 4


def test_rates_of_the_device():
    assert floors.copy_bandwidth(1000) > 0
    assert floors.matmul_rate(16) > 0


def test_formulas():
    costs = timing.costs([1.0, 2.0, 3.0], [12.0, 10.0, 14.0], 10)
    assert costs["plain"] == {"median": 2, "min": 1, "max": 3, "repeats": 3}
    assert costs["amortized_seconds"] == 2 + (12 - 2) / 10
    assert costs["refresh_over_plain"] == 6
    assert costs["refresh_share"] == (12 - 2) / 10 / 2
    assert timing.costs([1.0, 2.0, 3.0], None, 10)["amortized_seconds"] == 2
    assert timing.ratio([2, 3, 8], [1, 2, 2]) == {"of_medians": 1.5, "min": 1.5, "max": 4}


def test_svd_is_compared_by_what_refreshes_add():
    plain = {"gum": [1.0, 1.0], "gum, svd": [1.0, 1.0]}
    refresh = {"gum": [2.0, 2.0], "gum, svd": [11.0, 13.0]}
    pair = step.compare(plain, refresh, "gum, svd", 10)
    assert pair["svd_refresh_ratio"] == {"of_medians": 11, "min": 10, "max": 12}
    assert pair["amortized_ratio"] == pytest.approx(1.1 / 2.1)


def test_steps_take_turns():
    order = []
    seconds = timing.by_turns({name: lambda n=name: order.append(n) for name in "ab"}, 2)
    assert order == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("preset", ["tiny", "60m"])
def test_stacked_trees_have_the_same_parameters(preset):
    separate, stacked = parameters.separate(preset), parameters.stacked(preset)
    assert llama.parameter_count(stacked) == llama.parameter_count(separate)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(separate))
    assert llama.parameter_count(parameters.depth(parameters.SHAPES[preset].layers, preset)) == (
        llama.parameter_count(separate)
    )


def test_large_models_have_the_parameters_of_their_names():
    def matrices(shape):
        kv = shape.width * shape.kv_heads // shape.heads
        layer = 2 * shape.width * (shape.width + kv) + 3 * shape.width * shape.hidden
        return shape.layers * layer + 2 * shape.vocab_size * shape.width

    assert matrices(parameters.SHAPES["7b"]) == pytest.approx(6.7e9, rel=0.01)
    assert matrices(parameters.SHAPES["70b"]) == pytest.approx(69e9, rel=0.01)


def test_numbers_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="`repeats` is 0; it must be at least 1"):
        small(TINY, repeats=0)
    with pytest.raises(ConfigError, match="`ranks` is 0; it must be at least 1"):
        small(TINY, ranks=(32, 0))


def test_random_trees_are_functions_of_the_seed():
    tree = parameters.separate("tiny")
    first, again, other = (jax.tree.leaves(parameters.random(tree, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert math.isclose(float(np.std(first[0])), 1, abs_tol=0.1)


BAD = {
    "study": (["--studies", "stepp"], "`studies`: there is no 'stepp'; did you mean 'step'?"),
    "preset": (["--presets", "60"], "`presets`: there is no '60'; did you mean '60m'?"),
    "large": (["--training-preset", "7b"], "`training_preset`: there is no '7b'"),
    "contender": (["--contenders", "sgd"], "`contenders`: there is no 'sgd'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_one_line(arguments, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        __main__.main([*arguments, "--out", str(tmp_path)])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_main_runs_the_studies_that_are_named(tmp_path, monkeypatch, capsys):
    ran = []
    studies = {name: lambda config, n=name: ran.append(n) for name in __main__.STUDIES}
    monkeypatch.setattr(__main__, "STUDIES", studies)
    assert __main__.main(["--studies", "sweep", "step", "--out", str(tmp_path / "out")]) == 0
    assert ran == ["step", "sweep"]
    assert "figure: None" in capsys.readouterr().out


def test_a_record_says_what_it_rests_on(tmp_path):
    written = reporting.write(tmp_path / "new" / "x.json", TINY, answer=[1, 2])
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == json.loads(json.dumps(written))
    assert {"python", "jax", "jaxlib", "optax", "gum_optax"} <= set(written["versions"])
    assert {"platform", "device_kind", "devices", "cpus", "cpu_model"} <= set(written["device"])
    assert written["answer"] == [1, 2]


def test_a_commit_is_none_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "__file__", str(tmp_path / "record.py"))
    assert reporting.commit() is None


def test_variants_have_the_state_that_they_are_compared_for():
    tree = parameters.depth(4, "nano")
    bytes_of = {
        name: parameters.size(jax.eval_shape(make(32, 2).init, tree))
        for name, make in contenders.VARIANTS.items()
    }
    # A residual without momentum has no state; slots, precision and full rank have.
    assert bytes_of["columns of the residual"] == bytes_of["GaLore-Muon"] < bytes_of["GUM"]
    by_precision = [bytes_of[f"Muon{bits}"] for bits in (", 4 bits", ", 8 bits", "")]
    assert bytes_of["SCALE"] < by_precision[0] < by_precision[1] < by_precision[2]
    assert by_precision[2] < bytes_of["AdamW"]


@pytest.mark.usefixtures("few_matrices")
def test_variants_are_timed_by_turns_beside_galore_muon(config, monkeypatch, capsys):
    some = {name: contenders.VARIANTS[name] for name in ("GaLore-Muon", "SCALE")}
    monkeypatch.setattr(contenders, "VARIANTS", some)
    variants.run(config)
    found = json.loads((config.out / "variants" / "tiny.json").read_text())["ratios"]
    assert found["GaLore-Muon"] == {"of_medians": 1, "min": 1, "max": 1}
    assert found["SCALE"]["of_medians"] > 0
    assert "seconds of an update over GaLore-Muon's" in capsys.readouterr().out


def test_8_bit_adamw_is_timed_beside_adamw(tmp_path, capsys):
    out = tmp_path / "moments.json"
    options = ["--rows", "64", "--columns", "128", "--parts", "4", "--repeats", "2"]
    assert moments.main([*options, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    in_8_bits = ["8-bit AdamW", "linear 8-bit AdamW", "8-bit AdamW, rounded at random"]
    assert list(rows) == ["SGD", "AdamW", *in_8_bits, "8-bit AdamW, in parts"]
    assert rows["AdamW"]["over_adamw"] == {"of_medians": 1.0, "min": 1.0, "max": 1.0}
    medians = [row["seconds"]["median"] for row in rows.values()]
    ratios = [row["over_adamw"]["of_medians"] for row in rows.values()]
    assert ratios == pytest.approx([median / medians[1] for median in medians])
    assert "A step of a table of 64 x 128, in place" in capsys.readouterr().out

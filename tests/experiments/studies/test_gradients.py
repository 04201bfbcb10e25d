"""The studies of gradients along a run: formulas against enumeration, and their files."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import tokens as data
from experiments.models import llama
from experiments.reliability import kills
from experiments.studies import counterexample, few_bits, gradients, residual, variance
from experiments.studies.gradients import KINDS, Moment
from experiments.studies.variance import LEAST, MOST, Norms
from experiments.trainer import losses
from experiments.trainer.config import Config as Run
from experiments.trainer.methods import Gum
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import architecture
from gum_optax import LowRank, low_rank, residuals, samplers

LAYERS, OFFSETS = 4, (0, 1, 2, 3)
RUN = Run(preset="tiny", steps=8, optimizer=Gum(period=4, rank=3))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def orthonormal(seed, count, m, rank):
    return np.linalg.qr(random(seed, count, m, rank))[0]


def square(matrix):
    return sum(float(x) ** 2 for x in np.ravel(matrix))


def moment(step, others=0):
    """What a run might have at a step: gradients with a mean that stays, and with noise."""
    kinds = range(len(KINDS))
    mean = {kind: random(i, LAYERS, 6, 9) for i, kind in zip(kinds, KINDS, strict=True)}
    found = [
        {kind: G + random((step, batch, i), *G.shape) for i, (kind, G) in enumerate(mean.items())}
        for batch in range(1 + others)
    ]
    bases = {kind: orthonormal(0, LAYERS, 6, 3) for kind in KINDS}
    return Moment(step, found[0], bases, slots={}, others=found[1:])


@pytest.fixture
def recorded(monkeypatch):
    """Instead of training."""
    monkeypatch.setattr(
        gradients, "along", lambda run, steps, others=0: (moment(step, others) for step in steps)
    )
    monkeypatch.setattr(variance, "architecture", lambda run: type("A", (), {"layers": LAYERS}))


ARGUMENTS = [
    *("--base.steps", "8", "--base.optimizer.period", "4"), "--offsets", *map(str, OFFSETS),
]  # fmt: skip


# The run


def test_steps_since_refresh():
    assert gradients.since_refresh(RUN, OFFSETS) == list(range(8))


BAD_OFFSETS = {
    "late": (RUN, (0, 4)), "first": (RUN, (1, 2)), "order": (RUN, (0, 2, 1)),
    "end": (dataclasses.replace(RUN, steps=6), OFFSETS),
}  # fmt: skip


@pytest.mark.parametrize(("run", "offsets"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_that_no_period_has(run, offsets):
    with pytest.raises(ConfigError, match="`offsets`"):
        gradients.since_refresh(run, offsets)


def test_matrices_by_kind_are_wide():
    def layer(i):
        wide, tall = random(i, 2, 5), random(i, 5, 2)
        return {"attn": {"q": {"kernel": wide}}, "mlp": {"down": {"kernel": tall}, "norm": wide[0]}}

    tree = {"embed": {"embedding": random(0, 7, 2)}, "layers": {i: layer(i) for i in range(12)}}
    found = gradients.by_kind(tree | {"lm_head": {"kernel": random(0, 2, 7)}})
    assert {kind: G.shape for kind, G in found.items()} == {"q": (12, 2, 5), "down": (12, 2, 5)}
    np.testing.assert_array_equal(found["q"][10], random(10, 2, 5))
    np.testing.assert_array_equal(found["down"][10], random(10, 5, 2).T)


def test_parts_of_gradients():
    G, P = random(0, 2, 3, 4, 6), orthonormal(1, 3, 4, 2)
    found = gradients.residual(G, P)
    for batch, layer in itertools.product(range(2), range(3)):
        expected = G[batch, layer] - P[layer] @ P[layer].T @ G[batch, layer]
        np.testing.assert_allclose(found[batch, layer], expected, atol=1e-14)
        np.testing.assert_allclose(gradients.squares(G)[batch, layer], square(G[batch, layer]))


def test_the_best_bases_leave_the_last_singular_values():
    G = random(0, 3, 4, 6)
    left = gradients.squares(gradients.residual(G, gradients.best_bases(G, 2)))
    eigenvalues = np.linalg.eigvalsh(G @ G.mT)
    np.testing.assert_allclose(left, eigenvalues[:, :2].sum(-1), rtol=1e-12)


@pytest.mark.slow
def test_a_run(tmp_path):
    corpus = str(kills.write_corpus(tmp_path / "corpus"))
    run = Run(
        preset="tiny", steps=8, optimizer=Gum(period=2, rank=8, full_rank_layers=1),
        corpus=(corpus,), batch_size=2, cache_dir=str(tmp_path / "cache"), clip_norm=1e6,
    )  # fmt: skip
    zero, one, two = gradients.along(run, [0, 1, 2], others=2)
    assert [zero.step, one.step, two.step] == [0, 1, 2]

    # The first step's gradient, for the weights and the batch that training starts with.
    tokens = data.prepare(run, 320)
    vocabulary = tokens.tokenizer.get_vocab_size()
    arch = dataclasses.replace(architecture(run), vocab_size=vocabulary)
    static, params = llama.create(arch, seed=run.seed)
    batch = next(data.training_batches(tokens, arch.seq_len, run.batch_size, run.seed))
    grads = jax.grad(losses.mean(partial(losses.of_windows, static)))(params, batch)
    down = np.asarray(grads["layers"][1]["mlp"]["down"]["kernel"])
    # Compiled as a whole or not, float32 rounds otherwise: 1e-9 was measured, of 1e-3.
    np.testing.assert_allclose(zero.gradients["down"][1], down.T, atol=1e-7)

    for kind in KINDS:
        # Bases come from the gradients beside them, matrix for matrix, and stay for a period.
        own = residual.own_bases(zero)[kind], residual.own_bases(two)[kind]
        for each, best in zip((zero, two), own, strict=True):
            caught = residual.relative(each.gradients[kind], each.bases[kind])
            assert (caught**2 < residual.relative(each.gradients[kind], best) ** 2 + 0.05).all()
        np.testing.assert_array_equal(zero.bases[kind], one.bases[kind])
        # Momentum restarts with what the basis misses of one layer's gradient, over q = 1 / 2.
        (slot,) = zero.slots[kind]
        missed = 2 * gradients.residual(zero.gradients[kind], zero.bases[kind])
        off = [np.abs(slot - layer).max() for layer in missed]
        assert min(off) < 1e-6 * np.abs(zero.gradients[kind]).max()
        assert not np.allclose(one.bases[kind], two.bases[kind])
        batches = [G[kind] for each in (zero, one) for G in (each.gradients, *each.others)]
        assert all(not np.allclose(a, b) for a, b in itertools.combinations(batches, 2))


# The residual


def test_relative_residual():
    G, P = random(0, 3, 4, 6), orthonormal(1, 3, 4, 2)
    expected = [
        (square(g - p @ p.T @ g) / square(g)) ** 0.5 for g, p in zip(G, P, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(residual.relative(G, P), expected)
    np.testing.assert_allclose(residual.relative(P @ P.mT @ G, P), 0, atol=1e-7)


def test_the_noise_of_batches_is_told_from_their_mean():
    """The mean over all ways to draw three batches of four is exact, however noisy they are."""
    possible = random(0, 4, 2, 3, 5)
    each = [residual.without_noise(np.stack(b)) for b in itertools.product(possible, repeat=3)]
    expected = [square(layer) for layer in possible.mean(0)]
    np.testing.assert_allclose(np.mean(each, axis=0), expected)


def test_without_noise_full_gradient_and_batch_are_one():
    G, P = random(0, 3, 4, 6), orthonormal(1, 3, 4, 2)
    samples = np.stack([G, G, G])
    np.testing.assert_allclose(residual.noise(samples), 0, atol=1e-12)
    together = np.mean(residual.relative(G, P) ** 2) ** 0.5
    np.testing.assert_allclose(residual.full_gradient(samples, P), together)


def test_the_full_gradient_is_found_in_noise():
    G, P = random(0, 3, 4, 6), orthonormal(1, 3, 4, 2)
    expected = residual.full_gradient(np.stack([G, G]), P)
    samples = G + 3 * random(1, 4000, *G.shape)
    # Nine tenths are noise, and half of that is in the residual; a deviation of 0.01 is expected.
    assert (residual.noise(samples) > 0.85).all()
    assert residual.full_gradient(samples, P) == pytest.approx(expected, abs=0.05)


@pytest.mark.usefixtures("recorded")
def test_residual_study(tmp_path, capsys):
    out = tmp_path / "residual.json"
    assert residual.main([*ARGUMENTS, "--others", "3", "--out", str(out)]) == 0
    assert "steps after the refresh at 4" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000
    written = json.loads(out.read_text())
    assert written["refreshes"] == [0, 4]
    curves = written["curves"]
    assert set(curves) == {
        "svd", "default", "other batches", "full gradient", "fresh", "random", "noise"
    }  # fmt: skip

    G, R = moment(4).gradients["q"], moment(5).gradients["q"]
    left = [np.linalg.svd(g)[0][:, :3] for g in G]
    stale = [(1 - square(p.T @ g) / square(g)) ** 0.5 for p, g in zip(left, R, strict=True)]
    assert curves["svd"]["q"]["mean"][1][1] == pytest.approx(np.mean(stale), abs=1e-4)
    assert curves["svd"]["q"]["deviation"][1][1] == pytest.approx(np.std(stale), abs=1e-4)
    assert curves["random"]["up"]["mean"] == [[0.7071] * 4] * 2
    for kind in KINDS:
        svd, fresh = (np.array(curves[curve][kind]["mean"]) for curve in ("svd", "fresh"))
        np.testing.assert_array_equal(svd[:, 0], fresh[:, 0])
        assert (svd[:, 1:] > fresh[:, 1:]).all()


@pytest.mark.usefixtures("recorded")
def test_noise_needs_two_batches(tmp_path):
    with pytest.raises(ConfigError, match="`others` is 1"):
        residual.main(["--others", "1", "--out", str(tmp_path / "x.json")])


# The variance


def first_coordinates(key, gradient, rank, previous_basis):
    return jnp.eye(gradient.shape[0], rank)


@pytest.mark.parametrize("gamma", [1, 2])
def test_variance_of_the_library_over_all_draws(gamma):
    """Of every draw that `fixed_size` can make, as `low_rank` expands it."""
    count = 4
    G = random(0, count, 3, 5).astype(np.float32)
    q = samplers.fixed_size(gamma)(count).probability
    draws = np.array(list(itertools.combinations(range(count), gamma)), np.int32)

    def estimate(drawn):
        rule = residuals.sampled(lambda _: samplers.Sampling(gamma, q, lambda key: drawn))
        compression = LowRank(rank=2, period=10, residual=rule, projector=first_coordinates)
        tx = low_rank(optax.identity(), compression)
        return tx.update(jnp.asarray(G), tx.init(G))[0]

    estimates = np.asarray(jax.jit(partial(jax.lax.map, estimate))(draws))
    errors = [square(each - G) for each in estimates]
    parts = Norms(*(np.array([square(g) for g in part]) for part in (G[:, :2], G[:, 2:])))
    expected = variance.variance(*parts, variance.equal(*parts, gamma)).sum()
    np.testing.assert_allclose(np.mean(errors), expected, rtol=1e-5)


def test_variance_with_probabilities_of_their_own():
    """Over all subsets, drawn matrix by matrix."""
    G, P, q = random(0, 3, 4, 6), orthonormal(1, 3, 4, 2), np.array([0.2, 0.5, 0.7])
    expected = np.zeros(3)
    for drawn in itertools.product([False, True], repeat=3):
        odds = np.prod(np.where(drawn, q, 1 - q))
        for i, full in enumerate(drawn):
            low = P[i] @ P[i].T @ G[i]
            estimate = (G[i] - low) / q[i] if full else low / (1 - q[i])
            expected[i] += odds * square(estimate - G[i])
    R = gradients.residual(G, P)
    found = variance.variance(gradients.squares(G - R), gradients.squares(R), q)
    np.testing.assert_allclose(found, expected)


def norms(seed):
    """Of matrices whose sizes differ by orders of magnitude."""
    sizes = np.exp(2 * random(seed, 2, 4, len(KINDS), LAYERS))
    share = np.random.default_rng(seed).uniform(0.05, 0.95, sizes.shape)
    return Norms(sizes * (1 - share), sizes * share)


@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.parametrize("rule", variance.RULES)
def test_probabilities_add_up(rule, total):
    q = variance.RULES[rule](*norms(0), total)
    np.testing.assert_allclose(q.sum(-1), total)
    assert (q >= LEAST).all() and (q <= MOST).all()


@pytest.mark.parametrize("total", [1, 2])
def test_nothing_beats_the_optimal_probabilities(total):
    parts = norms(1)
    least = variance.variance(*parts, variance.optimal(*parts, total)).sum(-1)
    random = np.random.default_rng(2)
    tried = [random.dirichlet(np.ones(LAYERS)) * total for _ in range(2000)]
    # Near the optimum too, where random ones are rare.
    best = variance.optimal(*parts, total)
    steps = random.normal(0, 0.02, (500, *best.shape))
    tried += list(best + steps - steps.mean(-1, keepdims=True))
    tried += [variance.equal(*parts, total), variance.proportional(*parts, total)]
    for q in tried:
        feasible = ((q >= LEAST) & (q <= MOST)).all(-1)
        q = np.clip(q, LEAST, MOST)
        worse = variance.variance(*parts, q).sum(-1) >= least * (1 - 1e-12)
        assert (worse | ~feasible).all()
    assert (least < 0.9 * variance.variance(*parts, variance.equal(*parts, total)).sum(-1)).any()


def test_the_optimal_probabilities_of_two_matrices():
    """Against every q on a grid."""
    low, residual = np.array([1.0, 3.0]), np.array([4.0, 0.5])
    grid = np.linspace(LEAST, MOST, 9601)
    both = np.stack([grid, 1 - grid], -1)
    best = both[variance.variance(low, residual, both).sum(-1).argmin()]
    np.testing.assert_allclose(variance.optimal(low, residual, 1), best, atol=1e-4)


def test_proportional_within_bounds():
    residual = np.array([1.0, 4.0, 9.0, 1e6]) ** 2 / 1e4
    q = variance.proportional(residual, residual, 2)
    assert q[3] == pytest.approx(MOST)
    np.testing.assert_allclose(q[:3] / np.sqrt(residual[:3]), (2 - MOST) / 0.14)


def test_half_the_layers_give_the_gradient_norm_whatever_the_residual():
    parts = norms(3)
    np.testing.assert_allclose(variance.relative(parts, np.full(parts.low.shape, 0.5)), 1)


@pytest.fixture(scope="module")
def compared():
    """Of the matrices of `norms(4)`, and of the same ones at a step that stands still."""
    still = Norms(*(np.repeat(part[:, :1], 4, axis=1) for part in norms(4)))
    return variance.comparison(norms(4), 1), variance.comparison(still, 1)


@pytest.mark.parametrize("weighing", ["as it is", "by own norm"])
def test_rules_that_know_the_step_are_no_worse(weighing, compared):
    found, still = (each[weighing] for each in compared)
    for kind in KINDS:
        best = found["optimal, step"][kind]
        assert all(best <= values[kind] for values in found.values())
        assert best < min(found["optimal, refresh"][kind], found["optimal, next"][kind])
    assert still["optimal, step"] == still["optimal, refresh"] == still["optimal, next"]


def test_by_its_own_norm_a_matrix_counts_as_any_other(compared):
    parts = norms(4)
    found = compared[0]["by own norm"]["equal"]["q"]
    each = variance.variance(*parts, 1 / LAYERS) / parts.gradient
    assert found == pytest.approx(each[:, 2:, 0].mean())


@pytest.mark.usefixtures("recorded")
def test_variance_study(tmp_path, capsys):
    out = tmp_path / "variance.json"
    assert variance.main([*ARGUMENTS, "--gammas", "1", "2", "--out", str(out)]) == 0
    assert "gamma 2, by own norm" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000
    written = json.loads(out.read_text())
    assert written["equal"]["2"]["mean"] == pytest.approx(1)
    assert written["equal"]["1"]["probability"] == 0.25

    step = moment(7)
    G, P = step.gradients["v"], step.bases["v"]
    left = sum(square(g - p @ p.T @ g) for g, p in zip(G, P, strict=True)) / square(G)
    assert written["residual"]["v"][1][3] == pytest.approx(left**0.5, abs=1e-4)
    # A group's variance is a function of its residual alone: the mean over compared steps.
    shares = np.array(written["residual"]["v"])[:, 2:] ** 2
    expected = np.mean((1 - shares) / 3 + 3 * shares)
    assert written["rules"]["1"]["as it is"]["equal"]["v"] == pytest.approx(expected, abs=1e-3)


BAD_VARIANCE = {
    "gamma": (["--gammas", "2", "4"], "`gammas`: 4 is not between 1 and 3"),
    "shown": (["--gammas", "1", "--shown", "2"], "`shown` is 2"),
    "offsets": (["--gammas", "2", "--offsets", "0", "1"], "`offsets` has 2 values;"),
}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("arguments", "message"), BAD_VARIANCE.values(), ids=BAD_VARIANCE)
def test_bad_options(arguments, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        variance.main([*arguments, "--out", str(tmp_path / "x.json")])
    assert str(caught.value).startswith(message)


# The counterexample


def test_counterexample_study(tmp_path, monkeypatch, capsys):
    ran = []

    def relative_gaps(direction, config):
        ran.append((config.probability, config.period, config.projector_rank))
        return np.array([[1.0, 0.5], [1.0, 0.0], [1.0, 0.25]])

    monkeypatch.setattr(counterexample, "relative_gaps", relative_gaps)
    out = tmp_path / "studies" / "counterexample.json"
    arguments = [
        "--parts",
        "sweep",
        "--probabilities",
        "0.1",
        "0.9",
        "--periods",
        "5",
        "20",
        "--ranks",
        "4",
        "16",
    ]
    assert counterexample.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "GaLore-Muon" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert ran == [
        (0.1, 5, 12), (0.1, 20, 12), (0.9, 5, 12), (0.9, 20, 12),
        (0.5, 20, 4), (0.5, 20, 16), (0.5, 20, 4), (0.5, 20, 16),
    ]  # fmt: skip
    written = json.loads(out.read_text())
    first, last = written["draws"][0], written["ranks"][-1]
    assert (first["median"], first["least"], first["largest"]) == (0.25, 0, 0.5)
    assert first["gaps"] == [0.5, 0, 0.25]
    assert (first["method"], last["method"], last["rank"]) == ("GUM", "GaLore-Muon", 16)
    # The rule of the learning rate is kept: a fifth of the steps, five times the rate.
    assert first["learning_rate"] == pytest.approx(5 * last["learning_rate"])


def test_protected_directions_are_kept_in_8_bits_and_the_rest_in_4():
    # Two matrices [16, 64] with two directions that are a hundred times as large as the others.
    rng = np.random.default_rng(0)
    leading = rng.normal(size=(2, 16, 2)) @ rng.normal(size=(2, 2, 64))
    exact = (100 * leading + rng.normal(size=(2, 16, 64))).astype(np.float32)
    kept = {
        name: np.asarray(jax.jit(few_bits.ROUNDINGS[name])(exact))
        for name in ("float32", "int8", "int4", "int4, protected")
    }
    error = {name: np.linalg.norm(found - exact) for name, found in kept.items()}
    assert error["float32"] == 0
    # What is left for 4 bits is a hundredth: 8 bits are what decides.
    assert error["int4, protected"] < 1.5 * error["int8"] < 0.2 * error["int4"]

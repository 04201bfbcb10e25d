"""Several runs in one program: each has the same numbers as alone."""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gum_optax
from experiments.data import tokens
from experiments.models import presets
from experiments.reliability import kills
from experiments.studies import singular_values
from experiments.trainer import low_bits, sweeps, together
from experiments.trainer.config import Config, change
from experiments.trainer.methods import Gum
from experiments.trainer.options import ConfigError
from experiments.trainer.pretraining import train
from tests.helpers import MOSTLY_UNCOMPRESSED
from tests.watched_pretrain import SMALL

pytestmark = MOSTLY_UNCOMPRESSED


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", SMALL)  # it compiles sooner
        yield settings(tmp_path_factory)


def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp("together")
    corpora = [str(kills.write_corpus(home / name)) for name in ("one", "two")]
    # The second corpus is the first one, with its documents in another order.
    for file in sorted((home / "two").iterdir())[:1]:
        file.rename(file.with_name("zzz" + file.name))
    config = Config(
        preset="tiny", steps=8, batch_size=2, corpus=(corpora[0],),
        optimizer=Gum(
            rank=16, period=2, full_rank_layers=1, residual="additive",
            projector="random_orthonormal",
        ),
        cache_dir=str(home / "cache"), validate_every=4, validation_batches=2,
    )  # fmt: skip
    return config, corpora, home


@pytest.mark.slow
def test_runs_of_one_program_have_the_numbers_that_they_have_alone(base, capsys):
    """Of draws and refreshes; at other rates, seeds and on other text."""
    config, corpora, home = base
    configs = [
        dataclasses.replace(config, learning_rate=rate, seed=seed, corpus=(corpus,))
        for rate, (seed, corpus) in itertools.product(
            (3e-3, 1e-2), ((0, corpora[0]), (1, corpora[1]))
        )
    ]
    out = home / "together.json"
    entries = together.complete(configs, out, measure=singular_values.stable_ranks)
    assert [entry["config"] for entry in entries] == [sweeps.identity(c) for c in configs]
    assert {entry["together"] for entry in entries} == {4}
    assert len({entry["validation_loss"] for entry in entries}) == 4
    # The last differs from the first in all of them.
    alone = train(dataclasses.replace(configs[-1], run_dir=str(home / "alone")), show=False)
    curve = [[m["step"], m["validation_loss"]] for m in alone.metrics if "validation_loss" in m]
    np.testing.assert_allclose(entries[-1]["curve"], curve, rtol=1e-5)
    assert entries[-1]["state_bytes"] == alone.state_bytes
    assert entries[-1]["parameters"] == alone.parameters
    # What is measured is of the run's own last weights.
    ranks = singular_values.stable_ranks(alone.params)["stable_rank"]
    assert entries[-1]["stable_rank"] == pytest.approx(ranks, rel=1e-4)
    assert entries[0]["stable_rank"] != pytest.approx(ranks, rel=1e-4)

    # What the file holds is not trained again, whatever the order in which it is asked for.
    capsys.readouterr()
    assert together.complete(configs[::-1], out) == entries[::-1]
    assert capsys.readouterr().out == ""
    assert len(json.loads(out.read_text())) == 4


def test_the_last_windows_are_those_of_the_steps_that_are_left(base):
    config = dataclasses.replace(base[0], steps=7)
    arch, texts = together._read([config])
    chunks = list(together._chunks([config], arch, texts))
    assert [done for done, _, _ in chunks] == [4, 7]
    windows = np.concatenate([windows for _, (windows, _), _ in chunks])
    stream = tokens.training_batches(texts[config.corpus], arch.seq_len, 2, config.seed)
    np.testing.assert_array_equal(windows[:, 0], [next(stream) for _ in range(7)])


@pytest.mark.slow
def test_a_program_that_was_stopped_goes_on_from_its_checkpoint(base, tmp_path):
    """Between its two validations; its curves are those of one that was left alone."""
    config = change(base[0], optimizer="adamw")  # it compiles soonest
    configs = [
        dataclasses.replace(config, seed=seed, run_dir=str(tmp_path / str(seed))) for seed in (0, 1)
    ]
    out = tmp_path / "stopped.json"
    with pytest.raises(sweeps.OutOfTime, match="step 4 is saved"):
        together.complete(configs, out, deadline=time.time())
    assert not out.exists() and list(tmp_path.glob("0-together-*/checkpoints/4"))
    steps = []
    chunks = together._chunks

    def watched(*parts):
        for chunk in chunks(*parts):
            steps.append(chunk[0])
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "_chunks", watched)
        resumed = together.complete(configs, out)
    assert steps == [8]
    whole = together.train(configs)
    assert [e["curve"] for e in resumed] == [e["curve"] for e in whole]
    assert not list(tmp_path.glob("*-together-*"))


def test_runs_that_differ_in_more_are_programs_of_their_own(base):
    config = base[0]
    other = change(config, rank=8)
    faster = dataclasses.replace(config, learning_rate=1.0)
    assert together.programs([config, other, faster]) == [[config, faster], [other]]
    numbers = "learning_rate, fallback_learning_rate, residual_scale"
    with pytest.raises(ConfigError, match=f"may differ in {numbers}"):
        together.train([config, other])
    with pytest.raises(ConfigError, match="`weights`"):
        together.train([dataclasses.replace(config, weights="bfloat16")])


@pytest.mark.parametrize("name, limit", [("rows8", 127), ("rows4", 7)])
def test_momentum_in_few_bits_is_near_and_small(name, limit):
    """To half a code of each row's largest entry, for rows of odd length and zeros, too."""
    storage = low_bits.STORAGES[name]
    pack, unpack = jax.jit(storage.pack), jax.jit(storage.unpack)
    array = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    array[1] = 0
    packed = pack(array)
    back = np.asarray(unpack(packed, array))
    half = np.abs(array).max(axis=-1, keepdims=True) / limit / 2
    assert np.all(np.abs(back - array) <= half * (1 + 1e-5))
    assert np.all(back[1] == 0)
    assert packed.codes.nbytes == 3 * 5 * (7 if limit == 127 else 4)
    # A second way through the storage changes nothing: the state of a matrix at rest stays.
    np.testing.assert_allclose(unpack(pack(back), array), back, rtol=1e-6)


def test_low_bits_are_what_the_state_holds_between_steps():
    tree = {"layers": [{"w": np.ones((8, 32), np.float32)} for _ in range(4)]}
    compression = gum_optax.LowRank(rank=4, storage=low_bits.STORAGES["rows4"])
    state = jax.eval_shape(gum_optax.gum(1e-2, compression).init, tree)
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    assert sorted(leaf.shape for leaf in codes) == [(2, 8, 16), (4, 4, 16)]

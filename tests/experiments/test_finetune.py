"""Fine-tuning from the command line, on a tiny random model and a file of sums."""

import dataclasses
import json
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import PreTrainedTokenizerFast

from experiments import finetune
from experiments.data import answers, tokens
from experiments.models import llama, presets
from experiments.models.weights import load as pretrained
from experiments.reliability import kills
from experiments.trainer import checkpoints, cli, evaluation, finetuning, loop, losses
from experiments.trainer import mesh as meshes
from experiments.trainer.evaluation import Accuracy, Answer
from experiments.trainer.finetuning import Config
from experiments.trainer.methods import Gum
from experiments.trainer.options import ConfigError
from tests.helpers import MOSTLY_UNCOMPRESSED

pytestmark = MOSTLY_UNCOMPRESSED

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 8


def write_model(directory, vocab_size=300, context=128):
    """A random LLaMA as transformers saves one, with a chat template.

    At rank 16 the attention's q and o are compressed; all other matrices, 16 wide, are not, which
    halves the time to compile a step.
    """
    words = ["What is one plus two? Three. What is 4 + 5? 9 user assistant"] * 20
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens.train_tokenizer(iter(words), vocab_size - 2), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocab_size, "max_position_embeddings": context,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_theta": 10000.0,
    }  # fmt: skip
    arch = presets.Architecture(32, 16, 2, 4, 2, vocab_size, 128, tied=True, norm_eps=1e-5)
    pretrained.save(directory, llama.create(arch)[1], config, tokenizer)
    return directory


def write_sums(file, count=200):
    """Sums of two digits and their answers, some of them longer than others."""
    rows = [(a, b) for a in range(10, 90, 3) for b in range(10) if (a + b) % 3][:count]
    lines = [
        json.dumps({"prompt": f"{a} + {b}?", "answer": str(a + b) * (1 + b % 2)}) for a, b in rows
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finetune")
    write_model(directory / "model")
    write_sums(directory / "sums.jsonl")
    return directory


def options(home, run_dir, **more):
    settings = Config(
        run_dir=str(run_dir), model=str(home / "model"), task=str(home / "sums.jsonl"),
        steps=STEPS, batch_size=4, seq_len=64, train_examples=100, eval_examples=6,
        eval_batch_size=4, learning_rate=3e-3, validate_every=4,
        validation_batches=2, checkpoint_every=100, log_every=2,
        # One call of LAPACK compiles sooner than a power iteration.
        optimizer=Gum(rank=16, period=4, projector="svd"),
    )  # fmt: skip
    return dataclasses.replace(settings, **more)


def arguments(config):
    """A command line that differs from the defaults where `config` does."""
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default and field.name != "optimizer"
    }
    changed |= {f"optimizer.{k}": v for k, v in dataclasses.asdict(config.optimizer).items()}
    flags = ((f"--{k.replace('_', '-')}", v) for k, v in changed.items())
    return [text for flag, v in flags for text in ((flag,) if v is True else (flag, str(v)))]


def run_main(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments(config)])
    return cli.run(finetune.main, finetune.PROGRAM)


@pytest.fixture(scope="module")
def unbroken(home):
    """A whole run in this process, and its outcome."""
    config = options(home, home / "unbroken", export=str(home / "exported"))
    return config, finetuning.finetune(config, show=False)


def test_a_run_learns_and_counts_answers(unbroken, home):
    config, outcome = unbroken
    trained = [r["loss"] for r in outcome.result.metrics if "loss" in r]
    assert len(trained) == STEPS and trained[-1] < trained[0] - 0.3
    stored = json.loads((home / "unbroken" / "accuracy.json").read_text())
    assert stored["loss"] == outcome.loss._asdict()
    assert outcome.loss.mean == pytest.approx(outcome.result.validation_loss, rel=1e-6)
    assert outcome.loss.low < outcome.loss.mean < outcome.loss.high
    assert stored["before"]["of"] == stored["after"]["of"] == config.eval_examples
    assert stored["before"] == json.loads(json.dumps(outcome.before))
    assert stored["after"]["right"] == outcome.after.right
    assert len(outcome.after.answers) == config.eval_examples
    assert (home / "unbroken" / "checkpoints" / str(STEPS)).is_dir()


def test_the_exported_model_is_the_trained_one(unbroken, home):
    opened = pretrained.load(str(home / "exported"))
    jax.tree.map(np.testing.assert_array_equal, opened.params, unbroken[1].result.params)
    assert opened.tokenizer.chat_template == CHATML
    generation = json.loads((home / "exported" / "generation_config.json").read_text())
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["eos_token_id"] == [end]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(unbroken, home, monkeypatch, capsys):
    """SIGTERM after step 5, within a period and between two checkpoints."""
    config = options(home, home / "broken")
    step = finetuning.loop.Report.step

    def stop_after_five(self, number, metrics):
        step(self, number, metrics)
        if number == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(finetuning.loop.Report, "step", stop_after_five)
    assert run_main(config, monkeypatch) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "stopped by SIGTERM after step 5" in out and "--resume" in out
    monkeypatch.undo()

    asked = []
    answer = evaluation.measure
    monkeypatch.setattr(
        evaluation, "measure", lambda *a, **k: asked.append(k["title"]) or answer(*a, **k)
    )
    assert run_main(dataclasses.replace(config, resume=True), monkeypatch) == 0
    assert asked == ["answers after training"]  # those before it were kept
    out = capsys.readouterr().out
    assert "right before:" in out and "right after:" in out
    assert out.count("    expected ") == config.shown
    assert kills.differences(home / "unbroken", home / "broken", STEPS) == []
    first, again = ((home / d / "accuracy.json").read_text() for d in ("unbroken", "broken"))
    assert first == again


def test_what_is_resumed_takes_the_place_of_what_it_began_with(unbroken, home, monkeypatch):
    """A second copy of weights and state for the rest of the run would be a second model."""
    config, _ = unbroken
    held = []
    begin = finetuning.start
    monkeypatch.setattr(finetuning, "start", lambda *a: held.append(begin(*a)) or held[0])
    finetuning.finetune(dataclasses.replace(config, resume=True, export=None), show=False)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held[0][1]))


MISTAKES = {
    "model": ({"model": "nowhere"}, "`model`: nowhere is no directory"),
    "task": ({"task": "chain_som"}, "`task`: there is no 'chain_som'; did you mean 'chain_sum'?"),
    "window": ({"seq_len": 4096}, "`seq_len` is 4096; "),
    "items": ({"eval_examples": 10_000}, "`eval_examples` is 10000; "),
    "no file": ({"export": __file__}, "`export`: cannot make "),
    "context": ({"seq_len": 128, "model": "context"}, "`task`: a prompt of "),
    "columns": ({"task": "chain_sum", "prompt_field": "q"}, "`prompt_field` has no effect on"),
    "field": ({"answer_field": "reply"}, "has no column 'reply'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(mistake, home, tmp_path, monkeypatch, capfd):
    change, message = MISTAKES[mistake]
    if change.get("model") == "context":
        change = change | {"model": str(write_model(tmp_path / "short", context=40)), "seq_len": 40}
    assert run_main(options(home, tmp_path / "run", **change), monkeypatch) == 2
    out, error = capfd.readouterr()
    assert error.startswith("experiments.finetune: error: ")
    assert message in error and error.count("\n") == 1 and out == ""
    assert not (tmp_path / "run").exists()


NEVER = {
    "parts": ({"accumulate": 3}, "`accumulate` is 3; it must be a divisor of `batch_size`, 4"),
    "negative": ({"shown": -1}, "`shown` is -1; it must be zero or more"),
}


@pytest.mark.parametrize(("changes", "message"), NEVER.values(), ids=NEVER)
def test_options_that_can_never_work_are_not_made(changes, message, home):
    with pytest.raises(ConfigError, match=message):
        options(home, "run", **changes)


def test_every_optimizer_has_the_ranks_and_periods_of_fine_tuning():
    galore: Any = cli.parse(Config, "test", ["optimizer:galore"]).optimizer
    assert (galore.name, galore.rank, galore.period) == ("galore", 128, 200)
    assert cli.parse(Config, "test", ["--optimizer.rank", "8"]).optimizer == Gum(rank=8, period=200)


def test_other_data_are_not_resumed(unbroken, home, tmp_path):
    config, _ = unbroken
    lines = (home / "sums.jsonl").read_text().splitlines()
    other = tmp_path / "sums.jsonl"
    other.write_text("\n".join(reversed(lines)).replace("5", "7") + "\n")
    with pytest.raises(ConfigError, match=r"`task` is .*, but this run began with"):
        finetuning.finetune(dataclasses.replace(config, resume=True, task=str(other)))
    kept = (home / "sums.jsonl").read_text()
    (home / "sums.jsonl").write_text(other.read_text())
    try:
        with pytest.raises(ConfigError, match=r"`resume`: the data of .* has changed"):
            finetuning.finetune(dataclasses.replace(config, resume=True))
    finally:
        (home / "sums.jsonl").write_text(kept)


def batch_and_model(home, **more):
    """Two packed windows of uneven answers, of a model with weights of either type."""
    config = options(home, home / "none", **more)
    base = pretrained.load(config.model, dtype=config.weights)
    material = finetuning._data(config, None, base).material
    # Its first block is enough.
    static = jax.eval_shape(lambda: llama.create(dataclasses.replace(base.arch, layers=1)))[0]
    params = base.params | {"layers": {0: base.params["layers"][0]}}
    return config, static, params, next(material.batches)


def test_the_loss_is_of_answers_alone(home):
    """Against a loop over tokens, each window's examples by themselves, in float64."""
    _, static, params, batch = batch_and_model(home)
    total, count = jax.jit(losses.of_answers, static_argnums=0)(static, params, batch)
    apply = jax.jit(llama.apply, static_argnums=0)
    expected, number = 0.0, 0
    for window, segments, answer in zip(
        batch["tokens"], batch["segments"], batch["answer"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = window[segments == segment]
            # Zeros follow it, which none of its tokens sees, so that one program serves all.
            alone = np.zeros((1, len(window)), np.int32)
            alone[0, : len(here)] = here
            logits = np.asarray(apply(static, params, alone), np.float64)[0]
            for t in range(1, len(here)):
                if answer[segments == segment][t]:
                    row = logits[t - 1]
                    expected += np.log(np.exp(row - row.max()).sum()) + row.max() - row[here[t]]
                    number += 1
    assert number == count > 20
    # Sums of float32 in other orders; 2e-7 was measured.
    np.testing.assert_allclose(total, expected, rtol=2e-6)


@pytest.mark.parametrize("weights", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_accumulated_gradients_are_those_of_the_whole_batch(home, weights):
    """Parts have unequal numbers of answer tokens: a mean of means would be wrong."""
    config, static, params, batch = batch_and_model(home, weights=weights)
    loss = jax.tree_util.Partial(losses.of_answers, static)
    count = jax.jit(lambda part: loss(params, part)[1])
    counted = [count(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(4)]
    assert len(set(map(float, counted))) > 1
    unused: Any = optax.identity()
    once, grads, _ = jax.jit(loop._full(loss, config, unused))(params, (), batch)
    parts = dataclasses.replace(config, accumulate=4)
    summed, accumulated, _ = jax.jit(loop._full(loss, parts, unused))(params, (), batch)
    # Sums in another order: 1e-6 of the largest entry was measured; bfloat16 keeps 8 digits.
    exact = {"float32": 1e-5, "bfloat16": 2e-2}[weights]
    np.testing.assert_allclose(summed, once, rtol=exact)
    for a, b in zip(jax.tree.leaves(accumulated), jax.tree.leaves(grads), strict=True):
        assert a.dtype == jnp.float32
        part, whole = np.asarray(a), np.asarray(b, np.float32)
        assert np.abs(part - whole).max() <= exact * np.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options_of_run",
    [{"weights": "bfloat16"}, {"remat": True}],
    ids=str,
)
def test_other_ways_to_compute_learn_alike(unbroken, home, tmp_path, options_of_run):
    config = options(home, tmp_path / "run", eval_examples=2, **options_of_run)
    outcome = finetuning.finetune(config, show=False)
    mine, plain = (
        [r["loss"] for r in o.result.metrics if "loss" in r] for o in (outcome, unbroken[1])
    )
    # The same batches. Computed again, activations differ by rounding alone (1e-6 was measured);
    # weights in bfloat16 are off by up to 1/256 (0.02).
    tolerance = 0.1 if options_of_run.get("weights") else 1e-4
    np.testing.assert_allclose(mine, plain, atol=tolerance)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(outcome.result.params)}
    assert kinds == {jnp.dtype(config.weights)}


@pytest.mark.slow  # test_mesh.py pretrains on one, in the same loop
def test_a_mesh_changes_no_loss(unbroken, home, tmp_path, monkeypatch):
    # Each layout of an array compiles programs of its own to be saved; test_multi_process.py does.
    monkeypatch.setattr(checkpoints.Checkpoints, "save", lambda *_: None)
    config = options(home, tmp_path / "run", mesh="data=2,fsdp=2,tensor=2", eval_examples=2)
    outcome = finetuning.finetune(config, show=False)
    mine, plain = (
        [r["loss"] for r in o.result.metrics if "loss" in r] for o in (outcome, unbroken[1])
    )
    # Sums in another order, amplified by Newton-Schulz.
    np.testing.assert_allclose(mine, plain, rtol=1e-3)


def test_biases_lie_as_outputs_do():
    mesh = meshes.build("data=2,fsdp=2,tensor=2")
    assert mesh is not None
    arch = presets.Architecture(32, 48, 1, 4, 2, 64, 32, qkv_bias=True)
    _, shapes = jax.eval_shape(lambda: llama.create(arch))
    attention = meshes.param_shardings(mesh, shapes)["layers"][0]["attn"]
    assert attention["q"]["bias"].spec == jax.sharding.PartitionSpec(("tensor",))


def test_the_limits_of_a_loss_cover_it():
    """Of many samples of windows, 95 % have limits around the mean of all windows."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 4000).astype(float)
    totals = counts * rng.gamma(2.0, 1.0, 4000)
    true = totals.sum() / counts.sum()

    def by_window(_, sums):  # one function, compiled once for all samples
        return sums

    def sample() -> evaluation.Loss:
        chosen = rng.choice(4000, 60, replace=False)
        return evaluation.loss(by_window, {}, [(totals[chosen], counts[chosen])])

    covered = sum(found.low <= true <= found.high for found in (sample() for _ in range(400)))
    # 95 % of 400 is 380, with a standard deviation of 4.4; 60 skewed windows cover a little less.
    assert 360 <= covered <= 393


# Limits by another way: the roots of (p - share)^2 = z^2 p (1 - p) / of.
@pytest.mark.parametrize(("right", "of"), [(0, 10), (5, 10), (52, 200), (200, 200)])
def test_intervals_are_wilsons(right, of):
    z2, share = 1.959963985**2 / of, right / of
    roots = np.sort(np.roots([1 + z2, -(2 * share + z2), share**2]).real)
    np.testing.assert_allclose(evaluation.wilson(right, of), roots, atol=1e-6)


def test_answers_are_shown_on_one_line_each():
    long = "word " * 100
    answers = [Answer("a\nb", "1", "1", True), Answer(long, "2", "", False)]
    assert str(Accuracy(answers)).startswith("50.0% (1 of 2; 95 % interval 9.5% to 90.5%)")
    shown = evaluation.examples(answers).splitlines()
    assert shown[0] == "  right: a b"
    assert all(len(line) < 200 for line in shown)
    assert shown[-1] == "    answered (nothing)"


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.run(finetune.main, finetune.PROGRAM)
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        name = field.name if field.name != "optimizer" else "optimizer.rank"
        assert "--" + name.replace("_", "-") in text
    words = " ".join(text.replace("│", "").split())
    assert "Held-out items to answer before and after training" in words
    assert "Share of the steps over which the learning rate rises" in words
    assert "Optimizer steps in the whole run" in words


def test_prompts_end_where_answers_begin(home):
    """What is generated from is what the loss of the first answer token is conditioned on."""
    base = pretrained.load(str(home / "model"))
    task = finetuning._task(options(home, home / "none"))
    (encoded,) = answers.encode(task.held_out[:1], base.tokenizer, 64)
    (prompt,) = answers.prompt_ids(task.held_out[:1], base.tokenizer)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert int(np.argmax(encoded.answer)) == len(prompt)

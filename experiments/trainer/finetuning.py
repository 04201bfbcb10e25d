"""Fine-tuning: `finetune(config)` loads a model and a task, answers, trains, and answers again.

A *held-out item* is a question that no run trains on. The model answers all of them by greedy
generation before and after training; validation in between measures the loss of the tokens of their
answers.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments import tasks
from experiments.data import answers as sft
from experiments.models import llama
from experiments.models.weights import load as pretrained
from experiments.models.weights.load import Pretrained
from experiments.tasks.base import Task
from experiments.trainer import checkpoints, evaluation, locks, loop, losses, processes
from experiments.trainer import mesh as meshes
from experiments.trainer.evaluation import Accuracy, Loss
from experiments.trainer.files import parse_json, read_text, write_whole
from experiments.trainer.finetuning_options import Config as Config
from experiments.trainer.loop import Result, State
from experiments.trainer.options import ConfigError, make_directory, reason

_SENTENCE = 24  # tokens that an untrained model may write around its answer


class Outcome(NamedTuple):
    """A run, its answers before and after training, and the loss of held-out answers at the end.

    A field is None if it was not asked for, or if the run was stopped before.

    Attributes:
      result: the training run.
      before: summary of the answers before training, see `Accuracy.summary`.
      after: the answers after training.
      loss: mean loss of held-out answers in nats per token, with confidence limits.
    """

    result: Result
    before: dict[str, Any] | None
    after: Accuracy | None
    loss: Loss | None


def finetune(config: Config, *, show: bool = True) -> Outcome:
    """Answers the held-out items, trains, and answers them again.

    Args:
      config: all options of the run; with `config.resume` it continues from its last checkpoint.
      show: whether to print progress bars and messages.

    Raises:
      ConfigError: an option cannot work; the message is one line.
    """
    mesh = meshes.build(config.mesh)
    with meshes.use(mesh), locks.of_run(config):
        return _finetune(config, mesh, show)


class _Data(NamedTuple):
    """The data of a run: its task, batches, most tokens of an answer, and mean sizes in words."""

    task: Task
    material: loop.Material
    longest: int
    sizes: str


def _finetune(config: Config, mesh: Mesh | None, show: bool) -> Outcome:
    # 1. Refuse a directory that cannot be used before the model is loaded, which takes long.
    checkpoints.check_run_directory(config)
    if config.export:
        make_directory("export", Path(config.export))
    # 2. Model and data. The first process downloads; the others find the files on disk.
    base = processes.in_turn(lambda: pretrained.load(config.model, dtype=config.stored))
    data = _data(config, mesh, base)
    loop.begin(config, data.material.digest, f"the data of {config.task}")
    # 3. Copy the weights to the devices, and free those in host memory.
    static, state, step_fn = start(config, base, mesh)
    base = base._replace(params={})
    # 4. Answer, train, and answer again. A run that was stopped answers when it is resumed.
    answer = partial(
        evaluation.measure, static, tokenizer=base.tokenizer, task=data.task, longest=data.longest,
        batch_size=config.eval_batch_size, show=show,
    )  # fmt: skip
    before = _before(config, answer, state)
    result = loop.run(
        config,
        data.material,
        partial(losses.of_answers, static),
        state,
        step_fn,
        mesh=mesh,
        introduction=_introduction(config, base, data, before, state, mesh),
        show=show,
    )
    if result.stopped_by:
        return Outcome(result, before, None, None)
    # 5. The loss of held-out answers with confidence limits, over windows.
    put = partial(meshes.put, mesh, config.batch_size)
    by_window = partial(losses.of_answers_by_window, static)
    loss = evaluation.loss(by_window, result.params, map(put, data.material.held_out))
    after = answer(params=result.params, title="answers after training")
    if processes.is_first():
        kept = {"before": before, "after": after.summary(), "loss": loss._asdict()}
        _write(config, kept)
    if config.export:
        _export(config, result.params, base)
    return Outcome(result, before, after, loss)


def start(config: Config, base: Pretrained, mesh: Mesh | None) -> tuple[Any, State, Any]:
    """Returns the static model, the first state (weights are copied) and the compiled step."""
    create = partial(llama.create, base.arch, dtype=config.dtype, remat=config.remat)
    static, _ = jax.eval_shape(create)
    shapes = jax.eval_shape(lambda: base.params)

    def place(shardings: Any) -> llama.Params:
        if shardings is None:
            # Copied: steps donate their buffers, and on CPUs JAX may share those of NumPy arrays.
            return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), base.params)
        # Each device takes its shard, so that none needs memory for the whole.
        return jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__),
            base.params,
            shardings,
        )

    loss = partial(losses.of_answers, static)
    return static, *loop.start(config, loss, shapes, place, mesh, base.arch.layers)


def _export(config: Config, params: llama.Params, base: Pretrained) -> None:
    """Saves the weights in the format of `transformers`."""
    assert config.export
    # All processes gather, as that is a collective; the first one writes.
    whole, stop = processes.gather(params), sft.stop_tokens(base.tokenizer)
    if not processes.is_first():
        return
    try:
        pretrained.save(Path(config.export), whole, base.config, base.tokenizer, stop)
    except Exception as error:  # of the file system, or safetensors' own
        raise ConfigError(f"`export`: cannot write {config.export}: {reason(error)}") from error


def _data(config: Config, mesh: Mesh | None, base: Pretrained) -> _Data:
    """Loads the items of the task, encodes them, and packs them into batches.

    Raises:
      ConfigError: the items cannot be read, or are longer than a window or the model's context.
    """
    # 1. Sizes that cannot work, before anything is read.
    if config.seq_len > base.arch.seq_len:
        raise ConfigError(
            f"`seq_len` is {config.seq_len}; {config.model} was made for {base.arch.seq_len} tokens"
        )
    rows = meshes.rows(mesh, config.batch_size, config.accumulate)
    # 2. Items to tokens, with the mask of their answers.
    task = processes.in_turn(lambda: _task(config))
    train, held_out = (
        sft.encode(items, base.tokenizer, config.seq_len) for items in (task.train, task.held_out)
    )
    both = [*train, *held_out]
    # 3. Room for generation: a prompt and the longest answer must fit the model's context. A model
    #    that is not trained yet puts a sentence around its answer.
    longest = sft.longest_answer(both) + _SENTENCE
    prompt = max(len(e.tokens) - int(e.answer.sum()) for e in held_out)
    if prompt + longest > base.arch.seq_len:
        raise ConfigError(
            f"`task`: a prompt of {config.task} has {prompt} tokens and an answer up to {longest}; "
            f"{config.model} was made for {base.arch.seq_len}"
        )
    shape = config.seq_len, config.batch_size
    # 4. Packed batches, and the mean sizes of an example for the introduction.
    material = loop.Material(
        batches=sft.batches(train, *shape, config.seed, rows),
        held_out=sft.held_out_batches(held_out, *shape, rows)[: config.validation_batches],
        tokens=config.batch_size * config.seq_len,
        digest=_digest(both),
    )
    tokens, answers = (sum(map(len, parts)) for parts in zip(*_parts(train), strict=True))
    sizes = f"{tokens / len(train):.0f} tokens each, {answers / len(train):.0f} of answers"
    return _Data(task, material, longest, sizes)


def _task(config: Config) -> Task:
    return tasks.load(
        config.task,
        train_examples=config.train_examples,
        eval_examples=config.eval_examples,
        seed=config.seed,
        prompt_field=config.prompt_field,
        answer_field=config.answer_field,
    )


def _parts(encoded: Sequence[sft.Encoded]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns the tokens of each example, and the tokens of its answer."""
    return ((e.tokens, e.tokens[e.answer]) for e in encoded)


def _digest(encoded: Sequence[sft.Encoded]) -> str:
    """Returns a hash of the tokens of all examples.

    The length goes in before the tokens, so that the hash depends on where examples are divided.
    """
    digest = hashlib.blake2b(digest_size=8)
    for example in encoded:
        digest.update(len(example.tokens).to_bytes(4, "big") + example.tokens.tobytes())
    return digest.hexdigest()


def _before(config: Config, answer: Any, state: State) -> dict[str, Any] | None:
    """Returns the summary of the answers before training; a resumed run reads it from its file."""
    path = accuracy_path(config)
    if config.resume and path.exists():
        return _answers_before(path)
    if not config.baseline:
        return None
    # All processes answer, as weights may be divided among them; the first one writes.
    before = answer(params=state.params, title="answers before training").summary()
    if processes.is_first():
        _write(config, {"before": before})
    return before


def _answers_before(path: Path) -> dict[str, Any] | None:
    """Reads the answers before training from the file of the run that is resumed."""
    try:
        before = parse_json(read_text(path))["before"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"`resume`: {path} is damaged: {reason(error)}; remove it") from error
    return before


def _introduction(
    config: Config,
    base: Pretrained,
    data: _Data,
    before: dict[str, Any] | None,
    state: State,
    mesh: Mesh | None,
) -> str:
    return (
        f"{config.model}: {llama.parameter_count(state.params):,} parameters, "
        f"{base.arch.layers} blocks of width {base.arch.width}, "
        f"vocabulary {base.arch.vocab_size:,}\n"
        f"{data.task.name}: {len(data.task.train):,} examples to train on, {data.sizes}, "
        f"{len(data.task.held_out):,} held out\n"
        f"right before training: {share(before)}\n"
        f"{loop.introduction(config, state, mesh, base.arch.layers)}"
    )


def share(before: dict[str, Any] | None) -> str:
    """Formats the share of right answers before training."""
    if before is None:
        return "not asked"
    return "{share:.1%} ({right} of {of})".format(**before)


def _write(config: Config, content: dict[str, Any]) -> None:
    """Writes the file of answers completely or not at all: a resumed run reads it."""
    write_whole(accuracy_path(config), json.dumps(content, indent=1) + "\n")


def accuracy_path(config: Config) -> Path:
    """Returns the path of the file with a run's answers."""
    return Path(config.run_dir) / "accuracy.json"

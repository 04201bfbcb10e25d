"""Fine-tuning: `finetune(config)` prepares task and model, answers, trains, and answers again."""

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

_SENTENCE = 24  # tokens


class Outcome(NamedTuple):
    """A run, the answers before and after it, and the loss of held-out ones at the end.

    None stands for what was not asked for, or not reached by a run that was stopped.
    """

    result: Result
    before: dict[str, Any] | None
    after: Accuracy | None
    loss: Loss | None


def finetune(config: Config, *, show: bool = True) -> Outcome:
    """Answers the held-out items, trains, and answers them again.

    Args:
      config: everything about the run; with `config.resume` it goes on after its last checkpoint.
      show: whether to print progress bars and what happens.

    Raises:
      ConfigError: an option cannot work; the message is one line.
    """
    mesh = meshes.build(config.mesh)
    with meshes.use(mesh), locks.of_run(config):
        return _finetune(config, mesh, show)


class _Data(NamedTuple):
    """What a run trains on and answers, and the most tokens of an answer."""

    task: Task
    material: loop.Material
    longest: int
    sizes: str


def _finetune(config: Config, mesh: Mesh | None, show: bool) -> Outcome:
    checkpoints.check_run_directory(config)
    if config.export:
        make_directory("export", Path(config.export))
    base = processes.in_turn(lambda: pretrained.load(config.model, dtype=config.weights))
    data = _data(config, mesh, base)
    loop.begin(config, data.material.digest, f"the data of {config.task}")
    static, state, step_fn = start(config, base, mesh)
    base = base._replace(params={})  # they are on the devices now
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
    """The static model, the first state, with copies of the weights, and the compiled step."""
    create = partial(llama.create, base.arch, dtype=config.dtype, remat=config.remat)
    static, _ = jax.eval_shape(create)
    shapes = jax.eval_shape(lambda: base.params)

    def place(shardings: Any) -> llama.Params:
        if shardings is None:
            return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), base.params)
        # Each device takes its part: none need hold the whole.
        return jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__),
            base.params,
            shardings,
        )

    loss = partial(losses.of_answers, static)
    return static, *loop.start(config, loss, shapes, place, mesh, base.arch.layers)


def _export(config: Config, params: llama.Params, base: Pretrained) -> None:
    """Saves the weights as transformers opens them."""
    assert config.export
    whole, stop = processes.gather(params), sft.stop_tokens(base.tokenizer)
    if not processes.is_first():
        return
    try:
        pretrained.save(Path(config.export), whole, base.config, base.tokenizer, stop)
    except Exception as error:  # of the file system, or safetensors' own
        raise ConfigError(f"`export`: cannot write {config.export}: {reason(error)}") from error


def _data(config: Config, mesh: Mesh | None, base: Pretrained) -> _Data:
    """Items and batches of them.

    Raises:
      ConfigError: they are not to be had, or are longer than a window or the model's context.
    """
    if config.seq_len > base.arch.seq_len:
        raise ConfigError(
            f"`seq_len` is {config.seq_len}; {config.model} was made for {base.arch.seq_len} tokens"
        )
    rows = meshes.rows(mesh, config.batch_size, config.accumulate)
    task = processes.in_turn(lambda: _task(config))
    train, held_out = (
        sft.encode(items, base.tokenizer, config.seq_len) for items in (task.train, task.held_out)
    )
    both = [*train, *held_out]
    # Untrained, a model puts a sentence around its answer.
    longest = sft.longest_answer(both) + _SENTENCE
    prompt = max(len(e.tokens) - int(e.answer.sum()) for e in held_out)
    if prompt + longest > base.arch.seq_len:
        raise ConfigError(
            f"`task`: a prompt of {config.task} has {prompt} tokens and an answer up to {longest}; "
            f"{config.model} was made for {base.arch.seq_len}"
        )
    shape = config.seq_len, config.batch_size
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
    """The tokens of each example, and those of its answer."""
    return ((e.tokens, e.tokens[e.answer]) for e in encoded)


def _digest(encoded: Sequence[sft.Encoded]) -> str:
    """Tells these tokens from others."""
    digest = hashlib.blake2b(digest_size=8)
    for example in encoded:
        digest.update(len(example.tokens).to_bytes(4, "big") + example.tokens.tobytes())
    return digest.hexdigest()


def _before(config: Config, answer: Any, state: State) -> dict[str, Any] | None:
    """The answers before training; a resumed run finds them where it left them."""
    path = accuracy_path(config)
    if config.resume and path.exists():
        return _answers_before(path)
    if not config.baseline:
        return None
    before = answer(params=state.params, title="answers before training").summary()
    if processes.is_first():
        _write(config, {"before": before})
    return before


def _answers_before(path: Path) -> dict[str, Any] | None:
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
    """The share of right answers before training, in words."""
    if before is None:
        return "not asked"
    return "{share:.1%} ({right} of {of})".format(**before)


def _write(config: Config, content: dict[str, Any]) -> None:
    """Writes all or nothing: a resumed run reads it."""
    write_whole(accuracy_path(config), json.dumps(content, indent=1) + "\n")


def accuracy_path(config: Config) -> Path:
    """The file of a run that keeps its answers."""
    return Path(config.run_dir) / "accuracy.json"

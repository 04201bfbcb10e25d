"""Tasks: items and their sources, disjoint training and held-out items, scores, clear errors."""

import json
import lzma
from collections import Counter
from decimal import Decimal

import pytest

from experiments import tasks
from experiments.data import text
from experiments.tasks import base
from experiments.tasks.base import Example
from experiments.trainer.options import ConfigError

GENERATED = ["chain_sum", "gsm_symbolic"]
SOLUTION = "Half is 48/2 = <<48/2=24>>24.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"


def rows(count, first=0, prompt="prompt", answer="answer"):
    return [{prompt: f"What is {i} + 1?", answer: str(i + 1)} for i in range(first, first + count)]


def write(path, items):
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return str(path)


def load(name, train=40, held_out=10, seed=0, **fields):
    return tasks.load(str(name), train_examples=train, eval_examples=held_out, seed=seed, **fields)


def prompts(examples):
    return {example.prompt for example in examples}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_items_are_repeatable_and_the_seed_changes_those_to_train_on(name):
    first, again, other = load(name), load(name), load(name, seed=1)
    assert (len(first.train), len(first.held_out)) == (40, 10)
    assert first == again
    # Neighbouring seeds of reasoning-gym share all items but one; sums repeat by chance as well.
    assert sum(a == b for a, b in zip(first.train, other.train, strict=True)) < 3
    assert sum(a == b for a, b in zip(first.train[1:], other.train, strict=False)) < 3
    assert first.held_out == other.held_out


@pytest.mark.parametrize("name", GENERATED)
def test_no_generated_prompt_is_both_trained_on_and_held_out(name):
    task = load(name, train=3000, held_out=300)
    assert not prompts(task.train) & prompts(task.held_out)
    assert len(prompts(task.held_out)) > 100


def test_sums_have_two_terms_of_one_or_two_digits_each_as_often_on_both_sides():
    task = load("chain_sum", train=2000, held_out=1000)
    for examples in (task.train, task.held_out):
        terms = [example.prompt.split(":")[1].split() for example in examples]
        assert {len(words) for words in terms} == {4}  # two terms, an operation, "="
        digits = Counter(len(words[0]) for words in terms)
        assert set(digits) == {1, 2}
        # A draw of a fair coin; 5 standard deviations for the 1,000 are 0.08.
        assert digits[1] / len(terms) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("name", GENERATED)
def test_the_reference_is_right_and_another_items_is_wrong(name):
    task = load(name, held_out=50)
    assert all(task.correct(item.answer, item) for item in task.held_out)
    assert all(task.correct(f" {item.answer}\n", item) for item in task.held_out)
    first, other = task.held_out[0], next(
        item for item in task.held_out
        if base.stated_number(item.answer) != base.stated_number(task.held_out[0].answer)
    )  # fmt: skip
    assert not task.correct(other.answer, first)
    assert not task.correct("", first)


def test_symbolic_answers_are_a_chain_of_thought():
    task = load("gsm_symbolic", held_out=50)
    for item in (*task.train, *task.held_out):
        assert item.answer.count("####") == 1
        assert len(item.answer.split("####")[0]) > 10


@pytest.mark.parametrize("text", ["46", " 46\n", "046", "46.0", "The sum is 46.", "12 + 34 = 46"])
def test_a_sum_is_right_when_it_is_stated_last(text):
    assert base.same_number(text, Example("12 + 34 =", "46"))


@pytest.mark.parametrize("text", ["", "  ", "45", "-46", "46 - 12 = 34", "4\n6", "?", "forty-six"])
def test_a_sum_is_wrong_with_another_number_last(text):
    assert not base.same_number(text, Example("12 + 34 =", "46"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 - 3 = 2\n#### 72", "72"),
        ("#### 1\nno:\n#### $1,072.50.", "1072.5"),
        ("#### -7 degrees, not 8", "-7"),
        ("there are 3 of 24, so 72.", "72"),
        ("it is 10-5", "5"),
        ("between $-3 and .5", "0.5"),
        ("1,000,000", "1000000"),
        ("#### ", None),
        ("72 ####", None),
        ("no idea", None),
        ("", None),
        ("- $ , . ####,,,", None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert base.stated_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("24+48\n#### 72", ["#### 72", "72", "x\n#### 72.0", "#### $72."], ["#### 27", "#### x"]),
        ("#### 1,000", ["#### 1000", "it is 1,000."], ["#### 1", "1.000", "#### "]),
        ("It lies there.\n#### Paris", ["#### Paris", "Paris", "So\n####  Paris "], ["#### paris"]),
        ("Paris", ["Paris", "\nParis "], ["It is Paris", "#### Paris", "Paris."]),
        ("7", ["7"], ["7.0", "it is 7", ""]),
    ],
)
def test_a_result_is_compared_as_a_number_or_else_exactly(reference, right, wrong):
    example = Example("?", reference)
    assert [base.same_result(text, example) for text in right] == [True] * len(right)
    assert [base.same_result(text, example) for text in wrong] == [False] * len(wrong)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_a_file_is_divided_by_a_hash_of_the_prompt(tmp_path, suffix):
    items = rows(100) + rows(30)  # some prompts twice
    file = write(tmp_path / f"items{suffix}", items)
    every = [Example(item["prompt"], item["answer"]) for item in items]
    held_out = [e for e in every if text.held_out(e.prompt, base.HELD_OUT_SHARE)]
    assert 10 < len(held_out) < 50
    task = load(file, train=len(every) - len(held_out), held_out=len(held_out))
    assert Counter([*task.train, *task.held_out]) == Counter(every)
    assert Counter(task.held_out) == Counter(held_out)
    assert not prompts(task.train) & prompts(task.held_out)


def test_fewer_items_of_a_file_are_drawn_by_the_seed(tmp_path):
    file = write(tmp_path / "items.jsonl", rows(200))
    first, again, other = load(file), load(file), load(file, seed=1)
    assert first == again
    assert prompts(first.train) != prompts(other.train)
    assert first.held_out == other.held_out
    assert len(prompts(first.train)) == 40


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_directory_has_a_file_for_each_split_and_held_out_prompts_leave_train(
    tmp_path, suffix, split
):
    columns = "question", "solution"
    write(tmp_path / f"train{suffix}", rows(45, 0, *columns))
    write(tmp_path / f"{split}{suffix}", rows(10, 40, *columns))
    task = load(tmp_path, prompt_field="question", answer_field="solution")
    assert prompts(task.train) == {f"What is {i} + 1?" for i in range(40)}
    assert prompts(task.held_out) == {f"What is {i} + 1?" for i in range(40, 50)}


def gsm8k(monkeypatch, splits):
    calls = []

    def load_dataset(*names):
        calls.append(names)
        return splits

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_gsm8k_comes_from_the_hub_without_annotations(monkeypatch):
    train = [{"question": f"{i}?", "answer": SOLUTION} for i in range(50)]
    test = [{"question": f"held out {i}?", "answer": SOLUTION} for i in range(10)]
    calls = gsm8k(monkeypatch, {"train": train, "test": test})
    task = load("gsm8k")
    assert calls == [("openai/gsm8k", "main")]
    assert {e.answer for e in (*task.train, *task.held_out)} == {
        "Half is 48/2 = 24.\nTogether 48+24 = 72.\n#### 72"
    }
    assert all(prompt.startswith("held out") for prompt in prompts(task.held_out))
    assert task.correct("It is 72.", task.held_out[0])


def test_a_hub_name_may_have_a_subset_and_no_held_out_split(monkeypatch):
    calls = gsm8k(monkeypatch, {"train": rows(200)})
    task = load("someone/sums:small")
    assert calls == [("someone/sums", "small")]
    assert not prompts(task.train) & prompts(task.held_out)
    load("someone/sums")
    assert calls[1] == ("someone/sums", None)


def test_angle_brackets_stay_in_answers_that_are_not_gsm8ks(tmp_path):
    items = [{"prompt": f"{i}?", "answer": "x <<y= 1>> 2"} for i in range(100)]
    task = load(write(tmp_path / "items.jsonl", items))
    assert {e.answer for e in (*task.train, *task.held_out)} == {"x <<y= 1>> 2"}


def test_numbers_are_answers_too_and_white_space_around_answers_is_not(tmp_path):
    items = [{"prompt": f"{i}?", "answer": i if i % 2 else f"\n {i} "} for i in range(100)]
    task = load(write(tmp_path / "items.jsonl", items))
    assert all(e.answer == e.prompt.rstrip("?") for e in (*task.train, *task.held_out))


ERRORS = {
    "columns of a generated task": (
        lambda path: load("chain_sum", prompt_field="question"),
        "`prompt_field` has no effect on chain_sum",
    ),
    "misspelled": (
        lambda path: load("chain_summ"), r"`task`: there is no 'chain_summ'.*'chain_sum'"
    ),
    "unknown": (lambda path: load("x"), "`task`: .*choose from chain_sum, gsm_symbolic, gsm8k"),
    "no file": (lambda path: load(path / "a.jsonl"), "`task`: there is no file or directory .*a.j"),
    "no directory": (lambda path: load(path / "a"), "`task`: there is no file or directory"),
    "no train file": (lambda path: load(path), "`task`: .* has no train.jsonl"),
    "empty": (lambda path: load(write(path / "a.jsonl", [])), "`task`: .*a.jsonl holds no train"),
    "no prompt column": (
        lambda path: load(write(path / "a.jsonl", rows(60, prompt="question"))),
        "`prompt_field`: .*a.jsonl has no column 'prompt'; its columns are question, answer",
    ),
    "no answer column": (
        lambda path: load(write(path / "a.jsonl", rows(60)), answer_field="reply"),
        "`answer_field`: .*a.jsonl has no column 'reply'; its columns are prompt, answer",
    ),
    "no text": (
        lambda path: load(write(path / "a.jsonl", [{"prompt": "a", "answer": ["b"]}])),
        r"`answer_field`: column 'answer' of .*a.jsonl has \['b'\] where text should be",
    ),
    "an empty answer": (
        lambda path: load(write(path / "a.jsonl", [{"prompt": "a", "answer": " "}])),
        "`answer_field`: column 'answer' of .* where text should be",
    ),
    "too few to train on": (
        lambda path: load(write(path / "a.jsonl", rows(60)), train=100),
        r"`train_examples` is 100; .*a.jsonl has \d+ items to train on and \d+ held out",
    ),
    "too few held out": (
        lambda path: load(write(path / "a.jsonl", rows(60)), train=9, held_out=50),
        r"`eval_examples` is 50; .*a.jsonl has \d+ items to train on and \d+ held out",
    ),
    "no object": (
        lambda path: load(write(path / "a.jsonl", [*rows(2), [1]])),
        "`task`: cannot read .*a.jsonl: line 3 is no JSON object",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_option_and_what_is_wrong(tmp_path, case):
    act, message = ERRORS[case]
    with pytest.raises(ConfigError, match=message):
        act(tmp_path)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'{"prompt": ', "a.jsonl", "`task`: cannot read .*a.jsonl: line 1 is no JSON"),
        (b"\xff\xfe", "a.jsonl", "`task`: cannot read .*a.jsonl"),
        (b"no xz", "a.jsonl.xz", "`task`: cannot read .*a.jsonl.xz"),
        (lzma.compress(b"{}" * 99)[:-9], "a.jsonl.xz", "`task`: cannot read .*a.jsonl.xz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / name)


def test_what_the_hub_says_is_one_line_of_error(monkeypatch):
    def load_dataset(*names):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConfigError, match="`task`: cannot read openai/gsm8k:main: no network"):
        load("gsm8k")
    monkeypatch.setattr("datasets.load_dataset", lambda *names: {"other": []})
    with pytest.raises(ConfigError, match="a/b has no train split; its splits are other"):
        load("a/b")

"""What the documents say runs, and agrees with the result files."""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import demo
from experiments.benchmarks import communication
from experiments.results import readme
from experiments.trainer import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"]


@pytest.mark.parametrize("source", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_code_runs(source):
    exec(compile(source, "README.md", "exec"), {})


def test_readme_has_code():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("table", readme.TABLES, ids=lambda table: table.__name__)
def test_readme_tables_are_those_of_the_result_files(table):
    assert table() in README, "paste the output of `python -m experiments.results.readme`"


def test_readme_collectives_are_those_of_the_result_file():
    rows = json.loads((ROOT / "experiments/results/sharding.json").read_text())["rows"]
    assert communication.table([row for row in rows if row["mesh"] != "data=8"]) in README
    assert not any(row["collectives"] for row in rows if row["mesh"] == "data=8")


def test_the_demo_uses_the_best_learning_rates_of_the_grid():
    for optimizer, rate in demo.LEARNING_RATES.items():
        assert readme.best_of_grid()[optimizer]["learning_rate"] == rate


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


# Commands in the text stand between backquotes, others on lines of their own.
COMMAND = re.compile(
    r"`python -m (experiments[^`]*)`|^    python -m (experiments.*)$", re.MULTILINE
)
COMMANDS = sorted(
    {
        " ".join((quoted or alone).split("#")[0].split())
        for page in PAGES
        for quoted, alone in COMMAND.findall(re.sub(r"\\\n\s*", "", page.read_text()))
    }
)


class Understood(Exception):
    """A command line was read without an error."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_are_understood(command, monkeypatch):
    name, *arguments = shlex.split(command)
    found = importlib.util.find_spec(f"{name}.__main__" if name.endswith("benchmarks") else name)
    assert found, name
    main = getattr(importlib.import_module(found.name), "main", None)
    if main is None or "--help" in arguments or name.endswith(("readme", "flax_nnx", "flax_linen")):
        return
    parse = cli.parse

    def stop(*parts):
        parse(*parts)
        raise Understood

    monkeypatch.setattr(cli, "parse", stop)
    with pytest.raises(Understood):
        main(arguments)


def test_documents_have_commands():
    assert len(COMMANDS) > 40

"""Notebooks run in a new kernel, and are stored with the outputs of a whole run."""

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import DIRECTORY, METADATA, execute

ROOT = Path(__file__).parents[2]
REPOSITORY = "gum-optax/gum_optax"
TINY = {
    "PRESET": "tiny",
    "STEPS": 4,
    "RANK": 16,  # keys and values, 16 wide, are not compressed: a step compiles sooner
    "PERIOD": 2,
    "MAX_TOKENS": 20_000,
    "TOKENIZER_CHARS": 100_000,
}
BUDGETS = {
    "01_quickstart.ipynb": TINY | {"BATCH": 2},
    "02_why_unbiased.ipynb": TINY | {"COUNTEREXAMPLE_STEPS": 100},
    "03_finetuning.ipynb": {
        # The same architecture with random weights: loading the real ones takes half a minute.
        "MODEL": str(ROOT / "tests/data/parity/smollm2"),
        "STEPS": 2,
        "BATCH": 1,
        "SEQ_LEN": 128,
        "RANK": 4,
        "HELD_OUT": 2,
    },
}
NOTEBOOKS = {p.name: nbformat.read(p, as_version=4) for p in sorted(DIRECTORY.glob("*.ipynb"))}
LIMIT = 1_000_000  # bytes of one notebook

# A notebook shows what the library does: it builds no transformation and factors no matrix.
ALGORITHMS = {
    "GradientTransformation", "GradientTransformationExtraArgs",
    "svd", "qr", "eigh", "cholesky", "einsum",
}  # fmt: skip

each = pytest.mark.parametrize("name", NOTEBOOKS)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def images(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def written(notebook):
    """What is printed and said, without the pictures."""
    found = [output.get("text", "") for output in outputs(notebook)]
    for output in outputs(notebook):
        found += [str(data) for kind, data in output.get("data", {}).items() if "text" in kind]
    return "\n".join(found)


def parsed(cell):
    """The syntax tree of a cell without its magics and shell commands."""
    return ast.parse(re.sub(r"^( *)[!%].*", r"\1pass", cell.source, flags=re.MULTILINE))


def parameters(notebook):
    """The names that the cell tagged so assigns."""
    [cell] = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", ())]
    return {node.id for node in ast.walk(parsed(cell)) if isinstance(node, ast.Name)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home for all that kernels write; the second finds the first one's caches."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def isolated(home, monkeypatch):
    for variable in list(os.environ):
        if variable.startswith(("XDG_", "JUPYTER_", "IPYTHON", "MPL")):
            monkeypatch.delenv(variable)
    for variable in ("HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_every_notebook_has_a_budget():
    assert set(BUDGETS) == set(NOTEBOOKS)


@pytest.mark.slow
@each
def test_runs_from_a_clean_kernel(name, home, isolated):
    kept = NOTEBOOKS[name]
    found = execute(DIRECTORY / name, BUDGETS[name], cwd=str(home))
    assert not [output for output in outputs(found) if output.output_type == "error"]
    assert len(images(found)) == len(images(kept))
    assert [cell.id for cell in code(found) if cell.outputs] == [
        cell.id for cell in code(kept) if cell.outputs
    ]


@each
def test_keeps_the_outputs_of_one_run_from_top_to_bottom(name):
    cells = code(NOTEBOOKS[name])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs(NOTEBOOKS[name])} <= {"stream", "display_data"}
    assert not [o for o in outputs(NOTEBOOKS[name]) if o.get("name") == "stderr"]
    assert images(NOTEBOOKS[name])
    assert (DIRECTORY / name).stat().st_size < LIMIT


@each
def test_outputs_and_metadata_tell_nothing_of_the_machine(name):
    notebook = NOTEBOOKS[name]
    assert notebook.metadata == METADATA
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}
    assert not re.findall(r"(?:/home|/Users|/root|/work|/tmp|C:\\)\S*", written(notebook))


@each
def test_budgets_replace_every_parameter(name):
    assert set(BUDGETS[name]) == parameters(NOTEBOOKS[name])


@each
def test_opens_in_colab(name):
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}"
    assert "[![Open in Colab](" in NOTEBOOKS[name].cells[0].source
    assert f"]({link})" in NOTEBOOKS[name].cells[0].source


@each
def test_installs_on_colab_alone(name):
    install = code(NOTEBOOKS[name])[0]
    *imports, condition = parsed(install).body
    assert all(isinstance(node, ast.Import) for node in imports)
    assert isinstance(condition, ast.If)
    assert ast.unparse(condition.test) == "'google.colab' in sys.modules"
    assert f"https://github.com/{REPOSITORY}" in install.source


@each
def test_calls_the_library_and_defines_no_algorithm(name):
    nodes = [node for cell in code(NOTEBOOKS[name]) for node in ast.walk(parsed(cell))]
    called = {getattr(n.func, "attr", "") for n in nodes if isinstance(n, ast.Call)}
    assert not called & ALGORITHMS
    modules = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {"gum_optax"} <= set(modules)
    assert not [module for module in modules if "._" in module]


@each
def test_links_lead_to_files(name):
    prose = "\n".join(c.source for c in NOTEBOOKS[name].cells if c.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    targets += [str(ROOT / path) for path in re.findall(r"`(experiments/[\w./]+)`", prose)]
    assert not [target for target in targets if not (DIRECTORY / target).exists()]

"""Files from strangers: a sample of the trial, the trial's own eyes, and what no program calls."""

import ast
import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from experiments.reliability import strangers
from experiments.reliability.forgeries import FORGERIES
from experiments.reliability.material import KINDS, Kind
from experiments.trainer.options import ConfigError

ROOT = Path(__file__).parents[3]
# Rendering a template starts a process with limits, which takes longer than all other kinds.
IN_THIS_PROCESS = sorted(set(KINDS) - {"chat template"})
CASES = 10


@pytest.mark.parametrize("kind", IN_THIS_PROCESS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, tmp_path, monkeypatch):
    """The first cases of the whole trial, whose report is experiments/results/strangers.json."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    good = tmp_path / "good"
    good.mkdir()
    KINDS[kind].make(good)
    assert strangers.outcome(kind, good) == ("read", "")
    found = Counter()
    for case in range(CASES):
        directory = tmp_path / str(case)
        strangers.build(kind, case, good, directory, seed=0)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            how, message = strangers.outcome(kind, directory)
        found[how] += 1
        assert how in ("read", "refused"), (case, message)
        shutil.rmtree(directory)
    # Damaged tokens are made again from their corpus; of all others some are refused.
    assert found["refused"] or kind == "token cache"


@pytest.mark.parametrize("name", FORGERIES["checkpoint"])
def test_a_forged_checkpoint_is_refused(name, tmp_path):
    """Among them one of pipes, which Orbax would read forever."""
    good, forged = tmp_path / "good", tmp_path / "forged"
    good.mkdir()
    KINDS["checkpoint"].make(good)
    strangers.build("checkpoint", name, good, forged, seed=0)
    how, message = strangers.outcome("checkpoint", forged)
    assert how == "refused" and "the last good checkpoint is step 1" in message


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (ConfigError("`model`: no such file"), "refused"),
        (ConfigError("no option is named"), "fault"),
        (ConfigError("`model`: a terminal\x1b[2J"), "fault"),
        (ConfigError("`model`: two\nlines"), "fault"),
        (KeyError("width"), "fault"),
        (MemoryError(), "memory"),
        (RecursionError(), "fault"),
    ],
)
def test_the_trial_tells_a_clear_line_from_a_fault(error, how, tmp_path, monkeypatch):
    def read(directory):
        raise error

    monkeypatch.setitem(KINDS, "planted", Kind(lambda _: None, "*", read))
    assert strangers.outcome("planted", tmp_path)[0] == how


@pytest.mark.slow
def test_the_trial_sees_what_reading_has_no_business_with(tmp_path):
    """In a process of its own, since an audit hook stays for good."""
    program = f"""
import pickle, subprocess, sys
from pathlib import Path
from experiments.reliability.strangers import Watch
inside = Path({str(tmp_path / "inside")!r})
inside.mkdir()
watch = Watch(inside)
watch.on = True
(inside / "allowed").write_text("x")
(inside.parent / "outside").write_text("x")
subprocess.run([sys.executable, "-c", "pass"])
pickle.loads(pickle.dumps(Path("x")))
watch.on = False
print("\\n".join(watch.seen))
"""
    seen = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    kinds = Counter(line.split(" ")[0] for line in seen)
    assert kinds["writes"] == 1 and f"writes {tmp_path / 'outside'}" in seen
    assert kinds["subprocess.Popen"] and kinds["pickle.find_class"]


@pytest.mark.slow
def test_a_short_trial_from_the_command_line(tmp_path):
    """All forgeries of all kinds, with one random case of each; a second call has nothing to do."""
    out = tmp_path / "report.json"
    for _ in range(2):
        assert strangers.main(["--cases", "1", "--out", str(out)]) == 0
    kinds = json.loads(out.read_text())["kinds"]
    assert {name: entry["done"] for name, entry in kinds.items()} == {
        name: len(FORGERIES.get(name, {})) + 1 for name in KINDS
    }
    assert not [bad for entry in kinds.values() for bad in entry["bad"]]


# Of modules: these run what they read. Of functions and arguments, likewise.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "torch.load"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}


def offences(source: str) -> list[str]:
    """What a module imports, calls or passes that could run the content of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=function, keywords=keywords):
                name = ast.unparse(function)
                found += [name] if name in FORBIDDEN_CALLS else []
                found += [f"{name}({k.arg}=)" for k in keywords if k.arg in FORBIDDEN_ARGUMENTS]
    return found


def test_no_program_can_run_the_content_of_a_file():
    files = [f for part in ("gum_optax", "experiments") for f in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    assert {str(f): found for f in files if (found := offences(f.read_text()))} == {}


def test_offences_are_seen():
    source = "import pickle.x\nfrom dill import loads\neval('1')\nload(x, allow_pickle=True)"
    assert offences(source) == ["pickle.x", "dill", "eval", "load(allow_pickle=)"]

"""Mutants of the library: single-line bugs, each of which some test must notice.

    make mutants                       all of them, two at a time
    make mutants ARGS='-k projector'   those whose name, file or test contains the word

A *mutant* is an entry of a TOML file beside this one, under its name, which tells the bug:

- ``file``: a module of ``gum_optax``;
- ``old``, ``new``: a piece of one of its lines, which occurs once in the file, and its replacement;
- ``tests``: the tests that must notice it, such as ``test_codes.py::test_blocks``, in
  ``tests/library``. For a test with many cases it names the few that are needed, by name or by
  pytest's ``-k``: ``test_codes.py::test_blocks[5-1-5-1]``, ``test_codes.py::test_bytes -k linear``;
- ``equivalent``: instead of tests, the reason why no test can distinguish it from the library.

A mutant is *killed* if one of its tests fails, and *survives* if all of them pass. The tests are
run in a copy of the package and the tests in a temporary folder; they are run without any bug
first, since a test that fails anyway kills nothing.

Tests: tests/library/test_mutants.py.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent
# What is copied: tests import the experiments too, of which nothing is changed.
PARTS = ("gum_optax", "tests", "experiments", "pyproject.toml")
PATIENCE = 600  # seconds; a mutant that loops is killed by its time


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug, and the tests that must notice it; see the module for the attributes."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def path(self) -> Path:
        """The file, from the root."""
        return Path("gum_optax", self.file)

    def mutated(self, source: str) -> str:
        """The source with the bug in it.

        Raises:
          ValueError: if the old text is not there just once, within a line.
        """
        if "\n" in self.old + self.new:
            raise ValueError("`old` and `new` must be of one line")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"`old` occurs {count} times in {self.path}: {self.old}")
        return source.replace(self.old, self.new)


def mutants(folder: Path = LISTS) -> list[Mutant]:
    """All mutants of the lists in a folder."""
    found: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text()).items():
            if name in found:
                raise ValueError(f"There are two mutants `{name}`.")
            entry["tests"] = tuple(entry.get("tests", ()))
            found[name] = Mutant(name, **entry)
    return list(found.values())


def problems(mutant: Mutant, root: Path = ROOT) -> Iterator[str]:
    """Why a mutant does not fit the sources and tests any more; nothing is run."""
    try:
        ast.parse(mutant.mutated((root / mutant.path).read_text()))
    except (ValueError, SyntaxError) as error:
        yield f"`{mutant.name}`: {error}"
    if mutant.old == mutant.new:
        yield f"`{mutant.name}` changes nothing."
    if bool(mutant.tests) == bool(mutant.equivalent):
        yield f"`{mutant.name}` needs `tests`, or the reason why it is `equivalent`."
    for test in mutant.tests:
        name, _ = _name_and_word(test)
        file, _, function = name.partition("[")[0].partition("::")
        if function not in _functions(root / "tests" / "library" / file):
            yield f"`{mutant.name}` names the test {test}, which does not exist."


@functools.cache
def _functions(path: Path) -> frozenset[str]:
    """The names of the functions of a file; of one that does not exist, none."""
    return frozenset(re.findall(r"^def (\w+)", path.read_text(), re.M) if path.exists() else [])


def _name_and_word(test: str) -> tuple[str, str]:
    """The test, and the expression of its ``-k``, if it has one."""
    name, _, word = test.partition(" -k ")
    return name, word


# Running -----------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """A copy of the package and its tests, in a folder that is empty."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
    return folder


def together(tests: Sequence[str]) -> list[tuple[list[str], str]]:
    """The names of tests that one pytest can run, each with its ``-k``.

    One for all tests of a file that have none: starting takes longer than most tests.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for test in dict.fromkeys(tests):
        name, word = _name_and_word(test)
        file = name.partition("::")[0]
        found.setdefault((name if word else file, word), []).append(name)
    return [(names, word) for (_, word), names in found.items()]


def outcome(copy: Path, names: Sequence[str], word: str) -> str:
    """Runs tests in a copy until one fails: ``"passed"``, ``"failed"`` or what went wrong."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
        *("--no-header", "--tb=short", *(f"tests/library/{name}" for name in names)),
        *(["-k", word] if word else []),
    ]
    # Programs that no mutant has touched are compiled once for all.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(copy),
    }
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "failed"
    # 0: all passed, 1: one failed; anything else: pytest could not run them.
    ready = {0: "passed", 1: "failed"}
    return ready.get(done.returncode, f"no verdict\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def outcome_of(copy: Path, tests: Sequence[str]) -> str:
    """Likewise, of tests that need several runs."""
    for names, word in together(tests):
        if (found := outcome(copy, names, word)) != "passed":
            return found
    return "passed"


def verdict_of(mutant: Mutant) -> tuple[str, float]:
    """The outcome of a mutant's tests in a copy of its own, and the seconds that they took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = copied(Path(folder))
        path = copy / mutant.path
        path.write_text(mutant.mutated(path.read_text()))
        return outcome_of(copy, mutant.tests), time.perf_counter() - began


def run(chosen: Sequence[Mutant], jobs: int) -> list[str]:
    """Runs mutants, prints a line for each, and returns what is wrong: survivors and failures."""
    wrong: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # 1. Without any bug every test passes.
        runs = together([test for mutant in chosen for test in mutant.tests])
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            copy = copied(Path(folder))
            found = list(pool.map(lambda run: outcome(copy, *run), runs))
        for (names, word), verdict in zip(runs, found, strict=True):
            if verdict != "passed":
                wrong.append(f"without any bug: {verdict}: {', '.join(names)} {word}")
        print(f"{len(runs)} runs of tests without any bug, of which {len(wrong)} fail", flush=True)
        # 2. With each bug one of its tests fails.
        running = [mutant for mutant in chosen if mutant.tests]
        for mutant, (verdict, seconds) in zip(running, pool.map(verdict_of, running), strict=True):
            word = {"failed": "killed", "passed": "SURVIVES"}.get(verdict, verdict)
            print(f"{word:8}  {seconds:4.0f} s  {mutant.path}: {mutant.name}", flush=True)
            if word != "killed":
                wrong.append(f"{mutant.path}: {mutant.name}: {word}")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """Runs the chosen mutants; exit code 1 if one survives, or if a test fails without a bug."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "make mutants", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("-k", default="", help="a word of the names, files or tests to choose")
    options = parser.parse_args(arguments)
    chosen = [m for m in mutants() if options.k in " ".join([m.name, m.file, *m.tests])]
    flawed = [problem for mutant in chosen for problem in problems(mutant)]
    if not chosen or flawed:
        print("\n".join(flawed) or f"No mutant contains {options.k!r}.")
        return 2
    began = time.perf_counter()
    wrong = run(chosen, options.jobs)
    equivalent = sum(bool(mutant.equivalent) for mutant in chosen)
    seconds = time.perf_counter() - began
    print(
        f"{len(chosen)} mutants in {seconds:.0f} s: {equivalent} equivalent, {len(wrong)} problems"
    )
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The list of mutants fits the library and its tests, and its runner reports survivors.

`make mutants` checks that all of them are killed; it takes as long as many of these tests.
"""

import dataclasses

import pytest

from tests.mutants import run

MUTANTS = run.mutants()


def test_every_mutant_fits_the_sources_and_its_tests_exist():
    assert [problem for mutant in MUTANTS for problem in run.problems(mutant)] == []
    assert len(MUTANTS) >= 80
    assert sum(bool(mutant.equivalent) for mutant in MUTANTS) < len(MUTANTS) / 20


ONE = next(m for m in MUTANTS if m.file == "_numerics.py")
FLAWS = {
    "an old text that is not there": ({"old": "no such text"}, "occurs 0 times"),
    "an old text that is there twice": ({"old": "jnp."}, "times in"),
    "several lines": ({"new": "pass\npass"}, "one line"),
    "no change": ({"new": ONE.old}, "changes nothing"),
    "no Python": ({"new": "precision=)"}, "`products at"),
    "a test that does not exist": ({"tests": ("test_numerics.py::test_x",)}, "does not exist"),
    "a file of tests that does not exist": ({"tests": ("test_x.py::test_x",)}, "does not exist"),
    "no tests": ({"tests": ()}, "needs `tests`"),
    "tests, and a reason to have none": ({"equivalent": "it is"}, "needs `tests`"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_what_does_not_fit_is_told(name):
    changes, message = FLAWS[name]
    [problem, *_] = run.problems(dataclasses.replace(ONE, **changes))
    assert message in problem


def test_tests_of_a_file_run_together_but_for_those_with_a_word():
    tests = ["a.py::one", "b.py::one", "a.py::two[x y]", "a.py::one -k x", "a.py::one"]
    assert run.together(tests) == [
        (["a.py::one", "a.py::two[x y]"], ""),
        (["b.py::one"], ""),
        (["a.py::one"], "x"),
    ]


@pytest.mark.slow
def test_who_is_killed_and_who_survives(capsys):
    assert run.run([ONE], jobs=1) == []
    assert "killed" in capsys.readouterr().out
    # The same bug, under tests that do not look at it.
    blind = dataclasses.replace(
        ONE, tests=("test_numerics.py::test_the_safe_scale_is_the_largest_entry",)
    )
    [problem] = run.run([blind], jobs=1)
    assert problem.endswith("SURVIVES")
    # A test that cannot be run kills nothing.
    absent = dataclasses.replace(ONE, tests=("test_numerics.py::test_that_is_not_there",))
    assert all("no verdict" in problem for problem in run.run([absent], jobs=1))
    assert run.main(["-k", "no mutant has this word"]) == 2

"""Experiments with gum_optax: commands to run with `python -m`, and packages for their parts."""

import os
import sys

_TUNABLE = "GLIBC_TUNABLES"


def _with_huge_pages() -> None:
    """Restarts a command with large arrays in huge pages, on systems that have them.

    A training step on CPUs allocates and frees hundreds of megabytes. In ordinary pages that takes
    45,000 page faults a step of the nano model; huge pages need a twentieth of them. No number
    changes. glibc reads the setting only when a process starts, so it cannot be set later. The
    process keeps its id, signals and files.

    Only commands started as `python -m experiments.x` restart, not programs that import this
    package: while `-m` looks for its module, `sys.argv[0]` is "-m".
    """
    # A user's own setting of the variable also prevents a second restart.
    if sys.platform == "linux" and sys.argv[:1] == ["-m"] and _TUNABLE not in os.environ:
        environment = os.environ | {_TUNABLE: "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


_with_huge_pages()

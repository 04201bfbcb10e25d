"""Experiments with gum_optax: the commands a person types, and a room for each kind of work."""

import os
import sys

_TUNABLE = "GLIBC_TUNABLES"


def _with_huge_pages() -> None:
    """Starts a command again with large arrays in huge pages, where the system has them.

    A training step on CPUs makes and frees hundreds of megabytes. Page by page, that is 45,000 page
    faults a step of the nano model, and with huge pages a twentieth of them; no number changes.
    glibc reads the setting only when a process starts, so it cannot be set later. The process keeps
    its id, and its signals and files are the same.

    Only a command started as `python -m experiments.x` is, not what imports this package: while
    `-m` looks for its module, that is all that stands in `sys.argv[0]`.
    """
    if sys.platform == "linux" and sys.argv[:1] == ["-m"] and _TUNABLE not in os.environ:
        environment = os.environ | {_TUNABLE: "glibc.malloc.hugetlb=1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


_with_huge_pages()

"""Clients: training programs of other projects, with optimizers of this library.

Each program has its own environment, with the versions in the text file of its name, since it needs
many packages that this project does not:

    python3 -m venv /tmp/clients
    /tmp/clients/bin/pip install -r experiments/clients/tunix.txt
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.tunix
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.keras

The same works for `easydel` (Python 3.11 or newer) and `levanter` (Python 3.12), which requires an
older optax than this library; install this one last:

    /tmp/clients/bin/pip install --no-deps optax==0.2.8

`experiments.clients.maxtext` describes its own installation, and `experiments.clients.checkpoints`
runs in this project's environment.

The programs run on CPUs, each in one or a few minutes, and print a line for each check. The first
check that fails ends a program. EasyDeL needs PyTorch only to be imported: a build for CPUs
suffices, in place of the one that PyPI has for Linux.
"""

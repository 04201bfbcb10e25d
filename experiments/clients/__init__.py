"""Clients: training programs of other projects, with optimizers of this library.

These programs have environments of their own, of the versions in the file beside them, since they
need much that this project does not:

    python3 -m venv /tmp/clients
    /tmp/clients/bin/pip install -r experiments/clients/tunix.txt
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.tunix
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.keras

The same with `easydel` (Python 3.11 or newer), and with `levanter` (3.12), which wants an older
optax than this library; install that last:

    /tmp/clients/bin/pip install --no-deps optax==0.2.8

`experiments.clients.maxtext` says what it wants, `experiments.clients.checkpoints` runs in this
project's environment.

They run on CPUs, each in a minute or a few, check what they claim, and print a line for each check.
"""

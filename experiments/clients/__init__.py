"""Clients: training programs of other projects, with optimizers of this library.

These programs have environments of their own, of the versions in the file beside them, since they
need much that this project does not:

    python3 -m venv /tmp/clients
    /tmp/clients/bin/pip install -r experiments/clients/tunix.txt
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.tunix
    PYTHONPATH=. /tmp/clients/bin/python -m experiments.clients.keras

`experiments.clients.maxtext` says what it wants. EasyDeL 0.3.0 imports PyTorch, and levanter's
dependencies did not resolve; of both, tests know the trees alone.

They run on CPUs, each in a minute or a few, check what they claim, and print a line for each check.
"""

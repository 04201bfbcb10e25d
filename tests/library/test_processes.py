"""Two real processes update a sharded model like one process, and draw the same layers.

Whole training runs in several processes are in test_multi_process.py.
"""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import one_of_several

ROOT = Path(__file__).parents[2]
PROCESSES, DEVICES = 2, 2


@pytest.mark.slow
def test_two_processes_update_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", "tests.one_of_several", address, str(PROCESSES)]
    jobs = [
        subprocess.Popen(
            [*arguments, str(i), str(DEVICES), str(tmp_path / f"{i}.npz")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    # While they start and compile, the same in this process, on one device.
    expected = one_of_several.named(*one_of_several.run())
    outputs = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * PROCESSES, outputs
    seen = dict.fromkeys(expected, 0)
    for i in range(PROCESSES):
        for key, part in np.load(tmp_path / f"{i}.npz").items():
            name, _, starts = key.rpartition(" ")
            whole = np.asarray(expected[name])
            corner = [int(start) for start in starts.split("x") if start]
            where = tuple(slice(s, s + n) for s, n in zip(corner, part.shape, strict=True))
            assert part.dtype == whole.dtype
            if np.issubdtype(part.dtype, np.floating):
                np.testing.assert_allclose(part, whole[where], rtol=1e-5, atol=1e-6, err_msg=key)
            else:
                # Codes may differ by one, where a number is half way between two levels.
                bound = 1 if part.dtype.itemsize == 1 else 0
                assert np.abs(part.astype(int) - whole[where].astype(int)).max() <= bound, key
            seen[name] += part.size
    # Every number is held: once where it is sharded, by each process where it is replicated.
    for name, whole in expected.items():
        assert seen[name] in (whole.size, PROCESSES * whole.size), name
    assert seen["['updates']['embed']"] == expected["['updates']['embed']"].size

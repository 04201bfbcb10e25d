"""Settings shared by all tests."""

import gc
import importlib.metadata
import os
import pathlib

# Compiling is most of the work of these tests, so XLA is told to do less of it. This is done before
# JAX is imported, and in the environment, so that the processes that tests start are told the same.
# 1. One module for each program: cut into pieces for several threads, it takes a fifth more time of
#    processors that have other tests to run.
os.environ.setdefault("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# 2. No fusion emitters, without which code generation takes less than half of the time. Versions
#    that do not know the flag would stop at it.
if importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10.")):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# 3. Hardly any optimizations: shapes here are tiny, and code need not be fast.
os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# 4. One thread for NumPy's and JAX's LAPACK: OpenBLAS's others wait busily for their turn where the
#    processors are taken, and a decomposition of a small matrix then takes a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# 5. More threads than collectives can take. Each of the 8 devices below begins the independent
#    collectives of a program in an order of its own. Where XLA's pool has only as many threads as a
#    small machine has processors, all of them wait in different collectives for a device that has
#    none left, until XLA aborts (jaxlib 0.12, three axes, two processors).
os.environ.setdefault("NPROC", "64")
# 6. No tracebacks in compiled programs, which take a twentieth of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Workers, and the processes that tests start, share compiled programs through a cache on disk; a
# second run finds most of them there. What compiles faster than 0.2 s is not worth a file.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax

# Importing and collecting make hardly any garbage, but many objects, among which the collector
# would look for it. `pytest_collection_finish` turns it on again.
gc.disable()

# Derandomized: a run is a function of the code alone, so a failure can be repeated as it is.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# Enough for a mesh of three axes; what runs on one device uses the first of them.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_finish():
    """Modules and tests live to the end, so garbage is not looked for among them again and again.

    Tracing makes many small objects; with them all, collecting takes a twentieth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()

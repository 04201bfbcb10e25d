"""Settings shared by all tests."""

import importlib.metadata
import os
import pathlib

# Code generation takes less than half of the time without XLA's fusion emitters. Before JAX is
# imported, and in the environment, so that the processes that tests start have it too. Versions
# that do not know the flag would stop at it.
if importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10.")):
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"]
    ).strip()

import hypothesis
import jax

# Nearly all of the time of these tests is compilation. Workers, and the processes that tests start,
# share compiled programs through a cache on disk; a second run finds most of them there.
_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "jax"
for _name, _value in {
    "jax_compilation_cache_dir": str(_CACHE),
    # Programs that compile faster than this are not worth a file.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}.items():
    # In the environment for processes that tests start, and in the configuration for this one.
    os.environ.setdefault(_name.upper(), str(_value))
    jax.config.update(_name, _value)

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

# Shapes here are tiny, so compiling is nearly all of the time; this halves it.
jax.config.update("jax_disable_most_optimizations", True)

"""Settings shared by all tests."""

import hypothesis
import jax

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

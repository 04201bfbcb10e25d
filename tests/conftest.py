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

# Shapes here are tiny, so compiling is nearly all of the time; this halves it.
jax.config.update("jax_disable_most_optimizations", True)

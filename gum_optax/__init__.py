"""GUM and other low-rank optimizers for optax: compress, update, expand."""

from gum_optax import dimension_numbers as dimension_numbers
from gum_optax import projectors as projectors
from gum_optax import restarts as restarts
from gum_optax import samplers as samplers
from gum_optax._adam import galore as galore
from gum_optax._adam import golore as golore
from gum_optax._adam import unbiased_adamw as unbiased_adamw
from gum_optax._codec import Compressed as Compressed
from gum_optax._gum import gum as gum
from gum_optax._gum import scale_by_gum as scale_by_gum
from gum_optax._low_rank import low_rank as low_rank
from gum_optax._plan import MemoryPlan as MemoryPlan
from gum_optax._plan import memory_plan as memory_plan
from gum_optax._polar import newton_schulz as newton_schulz
from gum_optax._polar import scale_by_polar as scale_by_polar
from gum_optax._sharding import state_shardings as state_shardings
from gum_optax._stacks import by_role as by_role
from gum_optax._stacks import by_shape as by_shape
from gum_optax._state import STATE_LAYOUT as STATE_LAYOUT
from gum_optax._state import LowRankState as LowRankState

__version__ = "0.1.0"

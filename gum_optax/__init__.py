"""Memory-efficient training for optax: an optimizer times a compression."""

from gum_optax import backward as backward
from gum_optax import carries as carries
from gum_optax import dimension_numbers as dimension_numbers
from gum_optax import displacements as displacements
from gum_optax import estimators as estimators
from gum_optax import fallbacks as fallbacks
from gum_optax import projectors as projectors
from gum_optax import residuals as residuals
from gum_optax import samplers as samplers
from gum_optax import storages as storages
from gum_optax._codec import Compressed as Compressed
from gum_optax._codec import Frame as Frame
from gum_optax._columns import normalize_columns as normalize_columns
from gum_optax._gains import scale_by_gain as scale_by_gain
from gum_optax._groups import Group as Group
from gum_optax._groups import by_role as by_role
from gum_optax._groups import by_shape as by_shape
from gum_optax._ledger import PlanRow as PlanRow
from gum_optax._low_rank import STATE_VERSION as STATE_VERSION
from gum_optax._low_rank import LowRank as LowRank
from gum_optax._low_rank import LowRankState as LowRankState
from gum_optax._low_rank import low_rank as low_rank
from gum_optax._matrices import for_matrices as for_matrices
from gum_optax._memory import MemoryPlan as MemoryPlan
from gum_optax._memory import memory_plan as memory_plan
from gum_optax._orthogonal import newton_schulz as newton_schulz
from gum_optax._orthogonal import scale_by_polar as scale_by_polar
from gum_optax._papers import apollo as apollo
from gum_optax._papers import apollo_mini as apollo_mini
from gum_optax._papers import fira as fira
from gum_optax._papers import frugal as frugal
from gum_optax._papers import galore as galore
from gum_optax._papers import golore as golore
from gum_optax._quantized import quantized as quantized
from gum_optax._recipes import adamw as adamw
from gum_optax._recipes import gum as gum
from gum_optax._recipes import muon as muon
from gum_optax._recipes import scale_by_gum as scale_by_gum
from gum_optax._rounding import RoundingState as RoundingState
from gum_optax._rounding import stochastic_rounding as stochastic_rounding
from gum_optax._sharding import state_shardings as state_shardings
from gum_optax.displacements import displaced as displaced
from gum_optax.fallbacks import Fallback as Fallback

__version__ = "0.1.0"

"""The memory plan: what every leaf costs in optimizer state, from shapes alone."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gum_optax import dimension_numbers as dims
from gum_optax import samplers
from gum_optax._adam import galore
from gum_optax._gum import gum
from gum_optax._layouts import Layout, find_layouts
from gum_optax._matrices import describe_matrices, tree_of_numbers
from gum_optax._stacks import Stack, by_role, leaves_with_names, path_name
from gum_optax._typing import PyTree

_TERMINAL = 80


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One line of a `MemoryPlan`.

    Attributes:
      name: the stack's name, or for fallback leaves their role.
      mode: ``sampled``, ``dense``, ``fallback``, or ``shared`` (counters and keys).
      count: number of matrices, or of fallback leaves.
      shape: a matrix's shape as stored, or a fallback leaf's.
      rank: r, or None where nothing is projected.
      slots: number of dense slots, or None where nothing is sampled.
      bytes: optimizer state, in bytes.
    """

    name: str
    mode: str
    count: int
    shape: tuple[int, ...]
    rank: int | None
    slots: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Optimizer-state bytes of `gum` per stack, beside other optimizers. ``str()`` gives a table.

    Attributes:
      rows: one `PlanRow` per stack, fallback role and shared part.
      parameter_bytes: bytes of the parameters.
      adamw_bytes: state of ``optax.adamw``.
      muon_bytes: state of ``optax.contrib.muon`` on the same matrices.
      galore_bytes: state of `galore` (Adam) at the same rank.
    """

    rows: tuple[PlanRow, ...]
    parameter_bytes: int
    adamw_bytes: int
    muon_bytes: int
    galore_bytes: int

    @property
    def total_bytes(self) -> int:
        """The state that `gum` allocates, in bytes."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("stack", "mode", "count", "shape", "rank", "slots", "state")
        table = [header, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        widths[0] = min(widths[0], _TERMINAL - sum(widths[1:]) - 2 * len(widths[1:]))
        table = [(_end_of(name, widths[0]), *cells) for name, *cells in table]
        left = (0, 1)
        lines = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        totals = [
            f"{name} {_human(size)}"
            for name, size in (
                ("GUM", self.total_bytes),
                ("AdamW", self.adamw_bytes),
                ("Muon", self.muon_bytes),
                ("GaLore", self.galore_bytes),
            )
        ]
        return "\n".join(
            [
                *lines,
                f"state: {'  '.join(totals)}",
                f"(parameters {_human(self.parameter_bytes)}; GaLore with Adam at the same rank)",
            ]
        )


def memory_plan(
    params: PyTree,
    *,
    rank: int = 128,
    full_rank_layers: int = 2,
    learning_rate: Any = 1e-3,
    **settings: Any,
) -> MemoryPlan:
    """Plans the optimizer state of `gum` from shapes alone; nothing is allocated.

    Args:
      params: real arrays, ``jax.ShapeDtypeStruct``s, or a Flax NNX model (also from
        ``nnx.eval_shape``), of which the ``nnx.Param``s count.
      rank: as for `gum`.
      full_rank_layers: as for `gum`.
      learning_rate: as for `gum`; a schedule keeps a counter, a number does not.
      **settings: any other argument of `gum`.

    Returns:
      A `MemoryPlan` whose ``total_bytes`` equals, to the byte, what ``gum`` with the same settings
      allocates for ``params``.

    Raises:
      TypeError, ValueError: as `gum` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gum_optax
      >>> kernel = jax.ShapeDtypeStruct((1024, 2816), jnp.float32)
      >>> plan = gum_optax.memory_plan([{"kernel": kernel} for _ in range(16)], rank=128)
      >>> print(plan)
      stack           mode     count      shape  rank  slots     state
      ----------------------------------------------------------------
      */kernel        sampled     16  1024x2816   128      2  52.0 MiB
      counters, keys  shared       -          -     -      -      16 B
      state: GUM 52.0 MiB  AdamW 352.0 MiB  Muon 176.0 MiB  GaLore 52.0 MiB
      (parameters 176.0 MiB; GaLore with Adam at the same rank)
    """
    params = _pure(params)
    with warnings.catch_warnings():
        # The plan itself shows what goes to the fallback.
        warnings.simplefilter("ignore", UserWarning)
        tx = gum(learning_rate, rank=rank, full_rank_layers=full_rank_layers, **settings)
        state = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(params)
    numbers: Any = dims.resolve(params, settings.get("weight_dimension_numbers"))
    sampler = settings.get("sampler") or samplers.fixed_size(full_rank_layers)
    matrices = describe_matrices(params, tree_of_numbers(params, numbers))
    layouts, dense = find_layouts(matrices, rank, sampler, settings.get("stack_by", by_role))
    others = {k: v for k, v in settings.items() if k in ("fallback", "momentum_dtype")}
    return MemoryPlan(
        rows=tuple(_rows(params, numbers, layouts, dense, state)),
        parameter_bytes=_bytes(leaves),
        adamw_bytes=_state_bytes(optax.adamw(learning_rate), leaves),
        muon_bytes=_state_bytes(
            optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=numbers), leaves
        ),
        galore_bytes=_state_bytes(
            galore(learning_rate, rank, weight_dimension_numbers=numbers, **others), leaves
        ),
    )


def _rows(
    params: PyTree,
    numbers: list[dims.MuonDimensionNumbers | None],
    layouts: list[Layout],
    dense: list[Stack],
    state: PyTree,
) -> Iterator[PlanRow]:
    named = leaves_with_names(params)
    fallback: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (path, leaf), number in zip(named, numbers, strict=True):
        if number is None:
            fallback.setdefault((by_role(path, leaf), leaf.shape), []).append(path)
    sizes = _bytes_by_owner(
        state,
        {stack.name for stack in [*(layout.stack for layout in layouts), *dense]},
        {path for paths in fallback.values() for path in paths},
    )
    for stack, rank, sampling in layouts:
        yield PlanRow(
            name=stack.name,
            mode="sampled",
            count=stack.count,
            shape=stack.shape[-2:],
            rank=rank,
            slots=sampling.slots,
            bytes=sizes.pop(("stack", stack.name), 0),
        )
    for stack in dense:
        size = sizes.pop(("stack", stack.name), 0)
        yield PlanRow(stack.name, "dense", stack.count, stack.shape[-2:], None, None, size)
    for (role, shape), paths in fallback.items():
        size = sum(sizes.pop(("leaf", path), 0) for path in paths)
        yield PlanRow(role, "fallback", len(paths), shape, None, None, size)
    yield PlanRow("counters, keys", "shared", 0, (), None, None, sum(sizes.values()))


def _bytes_by_owner(
    state: PyTree, stacks: set[str], fallback_paths: set[str]
) -> dict[tuple[str, str], int]:
    """Attributes every array of a state to a stack, a fallback leaf, or nobody."""
    sizes: dict[tuple[str, str], int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = [getattr(entry, "key", None) for entry in path]
        stack = next((key for key in keys if key in stacks), None)
        if stack is not None and "matrix" in keys:
            owner = ("stack", stack)
        else:
            owner = ("leaf", _longest_suffix(path_name(path), fallback_paths))
        sizes[owner] = sizes.get(owner, 0) + _bytes([leaf])
    return sizes


def _longest_suffix(path: str, candidates: set[str]) -> str:
    parts = path.split("/")
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in candidates), "")


def _pure(params: PyTree) -> PyTree:
    """The ``nnx.Param``s of an NNX model; anything else is a tree of arrays already."""
    nnx = sys.modules.get("flax.nnx")  # A model can only come from a Flax that is loaded.
    if nnx is not None and isinstance(params, nnx.Module):
        return nnx.state(params, nnx.Param)
    return params


def _state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    return _bytes(jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _bytes(leaves: Iterable[Any]) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _cells(row: PlanRow) -> tuple[str, ...]:
    def optional(value: int | None) -> str:
        return "-" if value is None else str(value)

    shape = "x".join(map(str, row.shape)) or "-"
    count = str(row.count) if row.count else "-"
    return (
        row.name,
        row.mode,
        count,
        shape,
        optional(row.rank),
        optional(row.slots),
        _human(row.bytes),
    )


def _end_of(name: str, width: int) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _human(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

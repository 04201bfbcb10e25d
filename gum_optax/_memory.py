"""`memory_plan`: the optimizer state of every group of a model in bytes, from shapes alone.

Tests: tests/library/test_memory.py.
"""

import dataclasses
import sys
import textwrap
import warnings
from collections.abc import Sequence

import jax
import optax

from gum_optax import _ledger
from gum_optax._ledger import PlanRow
from gum_optax._paths import PyTree

_TERMINAL = 80  # columns
_HEADER = ("group", "count", "shape", "rank", "slots", "state", "/ AdamW")
# One AdamW for all plans, so that JAX can reuse its traces.
_ADAMW = optax.adamw(1.0)
# The order of sections in a table.
_TREATMENTS = ("sampled", "low rank", "uncompressed", "fallback", "shared")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of optimizer state, group by group. ``str()`` gives a table of 80 columns.

    Attributes:
      rows: one `PlanRow` for each group, for each role of fallback leaves, and for shared state.
      parameter_bytes: bytes of the parameters.
      adamw_bytes: bytes of the state of ``optax.adamw`` for the same parameters.
      notes: the warnings of ``init``, such as matrices that are not found, with remedies.
    """

    rows: tuple[PlanRow, ...]
    parameter_bytes: int
    adamw_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of the state that the transformation allocates."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        cells = [_cells(row) for row in self.rows]
        # 1. A column of numbers is as wide as its longest; the name gets the columns left over.
        widths = [max(map(len, column)) for column in zip(_HEADER, *cells, strict=True)]
        widths[0] = min(widths[0] + 2, _TERMINAL - sum(widths[1:]) - 2 * len(widths[1:]))
        names = _shortened([row[0] for row in cells], widths[0] - 2)
        header = _line(_HEADER, widths)
        lines, section = [header, "-" * len(header)], ""
        for row, name, (_, *numbers) in zip(self.rows, names, cells, strict=True):
            # 2. One heading for each treatment and reason, with its rows below.
            heading = f"{row.treatment}: {row.why}" if row.why else row.treatment
            if heading != section:
                section = heading
                lines.append(heading)
            lines.append(_line((f"  {name}", *numbers), widths))
        # 3. Totals, and the warnings.
        share = _percent(self.total_bytes, self.adamw_bytes)
        lines.append(
            f"state {_human(self.total_bytes)}, {share} of AdamW's {_human(self.adamw_bytes)} "
            f"(parameters {_human(self.parameter_bytes)})"
        )
        for note in self.notes:
            lines += ["", *textwrap.wrap(note, _TERMINAL, break_long_words=False)]
        return "\n".join(lines)


def memory_plan(tx: optax.GradientTransformation, params: PyTree) -> MemoryPlan:
    """Plans the optimizer state of a transformation from shapes alone; nothing is allocated.

    ``tx.init`` is traced on shapes, and every `low_rank` and `for_matrices` in it reports its
    groups, their treatment and the reason. So a plan exists for any composition: in chains, under
    masks, with quantized or user-defined inner transformations.

    Args:
      tx: any ``optax.GradientTransformation``.
      params: arrays, ``jax.ShapeDtypeStruct`` in their place, or a Flax NNX model (also from
        ``nnx.eval_shape``), all of whose ``nnx.Param`` count.

    Returns:
      A `MemoryPlan` whose ``total_bytes`` equals the bytes of ``tx.init(params)`` exactly.

    Raises:
      TypeError, ValueError: as ``tx.init`` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import gum_optax
      >>> kernel = jax.ShapeDtypeStruct((1024, 2816), jnp.float32)
      >>> tx = gum_optax.gum(0.02, gum_optax.LowRank(rank=128))
      >>> print(gum_optax.memory_plan(tx, [{"kernel": kernel} for _ in range(16)]))
      group                    count      shape  rank  slots     state  / AdamW
      -------------------------------------------------------------------------
      sampled
        *.kernel                  16  1024x2816   128      2  52.0 MiB     15 %
      shared
        counters and wrappers      -          -     -      -      20 B        -
      state 52.0 MiB, 15 % of AdamW's 352.0 MiB (parameters 176.0 MiB)
    """
    params = _pure(params)
    # 1. Trace `init`, which writes rows and warns. Through a new function: JAX would reuse a trace
    #    of `tx.init` itself, and then no rows would be written.
    with warnings.catch_warnings(record=True) as told, _ledger.opened() as rows:
        warnings.simplefilter("always", UserWarning)
        total = _ledger.bytes_of(jax.eval_shape(lambda params: tx.init(params), params))
    adamw = _ledger.bytes_of(jax.eval_shape(_ADAMW.init, params))
    # 2. Bytes in no row are shared: step counts, keys, and the state of wrappers.
    shared = total - sum(row.bytes for row in rows)
    claimed = sum(row.adamw_bytes for row in rows)
    rows.append(
        PlanRow("counters and wrappers", "shared", "", 0, (), None, None, shared, adamw - claimed)
    )
    rows.sort(key=lambda row: (_TREATMENTS.index(row.treatment), row.why))
    notes = [str(w.message) for w in told if issubclass(w.category, UserWarning)]
    return MemoryPlan(tuple(rows), _ledger.bytes_of(params), adamw, tuple(dict.fromkeys(notes)))


def _pure(params: PyTree) -> PyTree:
    """Returns every ``nnx.Param`` of an NNX model; other trees are returned unchanged."""
    nnx = sys.modules.get("flax.nnx")  # A model can only come from a Flax that is loaded.
    if nnx is not None and isinstance(params, nnx.Module):
        return nnx.state(params, nnx.Param)
    return params


def _cells(row: PlanRow) -> tuple[str, ...]:
    """Returns a row as text, one cell for each column of `_HEADER`."""

    def optional(value: int | None) -> str:
        return "-" if value is None else str(value)

    return (
        row.name,
        str(row.count) if row.count else "-",
        "x".join(map(str, row.shape)) or "-",
        optional(row.rank),
        optional(row.slots),
        _human(row.bytes),
        _percent(row.bytes, row.adamw_bytes) if row.count else "-",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Joins cells into a line: names are aligned to the left, numbers to the right."""
    name, *numbers = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    numbers = [cell.strip().rjust(len(cell)) for cell in numbers]
    return "  ".join([name, *numbers]).rstrip()


def _shortened(names: Sequence[str], width: int) -> list[str]:
    """Cuts names in the middle to a width, and numbers those that have become equal."""

    def cut(name: str, width: int) -> str:
        if len(name) <= width:
            return name
        # Twice as much of the end as of the start: the end names the weight.
        start = (width - 3) // 3
        return name[:start] + "..." + name[len(name) - (width - 3 - start) :]

    short = [cut(name, width) for name in names]
    for name in list(short):
        twins = [i for i, other in enumerate(short) if other == name]
        if len(twins) > 1:
            for number, twin in enumerate(twins, start=1):
                short[twin] = cut(names[twin], width - len(f" #{number}")) + f" #{number}"
    return short


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _human(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

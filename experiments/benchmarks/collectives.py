"""Counts the bytes that a compiled program sends between devices, from the text of its HLO.

An HLO module is a list of computations, each a list of instructions, one a line. Loops, branches
and calls name the computations that they run, so counting is a walk from the entry computation.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element, by HLO's names of dtypes.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
# An array's shape, as in `f32[8,128]`.
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
# `%name = RESULT KIND(...)`. An asynchronous collective is a pair of -start and -done: count one.
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
# A loop whose number of trips XLA has written into its backend configuration.
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+).*\"known_trip_count\":\{\"n\":\"(\d+)\"\}")
_CONDITIONAL = re.compile(r" conditional\(%?([\w.-]+).*branch_computations=\{(.*?)\}")
# The condition `counter < end` of a loop.
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      kind: its name in HLO, such as "all-gather".
      shapes: of its results on one device; XLA combines several arrays into one operation.
      bytes: of all its results, on one device.
      times: how often it runs in a step.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int


def collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a step, from the text of its compiled program.

    A loop's body counts as often as it runs. Of a conditional one branch counts: the branch taken
    where the program says so by a constant, else the one that sends most. Counts under such a
    conditional are an upper bound.

    Raises:
      ValueError: a loop that sends data has a length that cannot be read.
    """
    computations, entry = _computations(hlo)
    return list(_follow(computations, entry, 1))


def total_bytes(found: list[Collective]) -> int:
    """Returns the bytes of all results in a step, on one device."""
    return sum(each.bytes * each.times for each in found)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Splits a module: the lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        # A computation begins with an unindented line that ends in a brace.
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.split()
            name = words[words[0] == "ENTRY"].lstrip("%")
            entry = name if words[0] == "ENTRY" else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry


def _follow(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    """Yields the collectives of a computation that runs `times` times, and of those it calls."""
    for line in computations[name]:
        if match := _COLLECTIVE.search(line):
            yield _collective(match[2], match[1], times)
        elif match := _LOOP.search(line):
            yield from _follow(computations, match[1], times * int(match[2]))
        elif " while(" in line:
            # A loop without written trips: look for them in its condition. If the body has no
            # collective, their number does not matter.
            body = re.search(r"body=%?([\w.-]+)", line)
            sent = list(_follow(computations, body[1], times)) if body else []
            trips = _trips(computations, line)
            if sent and trips is None:
                raise ValueError(f"a loop of unknown length sends data: {line.strip()[:200]}")
            yield from (each._replace(times=each.times * (trips or 0)) for each in sent)
        elif match := _CONDITIONAL.search(line):
            # The branch's index is a constant if the step's number is (`communication.at_step`).
            branches = [branch.strip().lstrip("%") for branch in match[2].split(",")]
            taken = _constant(computations[name], match[1])
            branches = branches if taken is None else [branches[taken]]
            sent = [list(_follow(computations, branch, times)) for branch in branches]
            yield from max(sent, key=total_bytes)
        elif match := _CALL.search(line):
            yield from _follow(computations, match[1], times)


def _trips(computations: dict[str, list[str]], line: str) -> int | None:
    """Reads the trips of a JAX loop, which counts up from zero, from the end in its condition.

    Needed where XLA does not write the trips down, as the TPU's compiler does not. None if the
    condition has another form.
    """
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    ends = [match[1] for each in lines if (match := _BELOW.search(each))]
    return _constant(lines, ends[0]) if len(ends) == 1 else None


def _constant(computation: list[str], name: str) -> int | None:
    """Returns the value of an integer constant of a computation; None if `name` is none."""
    # Loops of JAX count in int32, loops that the TPU's compiler makes of gathered products in
    # uint32.
    definition = re.compile(rf"%?{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)")
    values = [int(match[1]) for line in computation if (match := definition.search(line))]
    return values[0] if values else None


def _collective(kind: str, result: str, times: int) -> Collective:
    """Reads dtypes and shapes from the text of a result, an array or a tuple of arrays."""
    found = _SHAPE.findall(result)
    shapes = tuple(tuple(int(size) for size in sizes.split(",") if size) for _, sizes in found)
    item_bytes = [_BYTES[dtype] for dtype, _ in found]
    size = sum(b * math.prod(shape) for b, shape in zip(item_bytes, shapes, strict=True))
    return Collective(kind, shapes, size, times)

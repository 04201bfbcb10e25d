"""Counts what a compiled program sends between devices, from the text of its HLO."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+).*\"known_trip_count\":\{\"n\":\"(\d+)\"\}")
_CONDITIONAL = re.compile(r" conditional\(%?([\w.-]+).*branch_computations=\{(.*?)\}")
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")


class Collective(NamedTuple):
    """A collective operation that runs `times` times in a step.

    `shapes` are those of its result on one device; XLA combines several arrays into one operation.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a step. Loop bodies count by their trips, of a conditional one branch.

    It is the branch that is taken if XLA knows, else the one that sends the most. A loop that sends
    data and whose length XLA does not know is an error.
    """
    computations, entry = _computations(hlo)
    return list(_follow(computations, entry, 1))


def total_bytes(found: list[Collective]) -> int:
    """Bytes of all results, on one device."""
    return sum(each.bytes * each.times for each in found)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            words = line.split()
            name = words[words[0] == "ENTRY"].lstrip("%")
            entry = name if words[0] == "ENTRY" else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry


def _follow(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations[name]:
        if match := _COLLECTIVE.search(line):
            yield _collective(match[2], match[1], times)
        elif match := _LOOP.search(line):
            yield from _follow(computations, match[1], times * int(match[2]))
        elif " while(" in line:
            body = re.search(r"body=%?([\w.-]+)", line)
            sent = list(_follow(computations, body[1], times)) if body else []
            trips = _trips(computations, line)
            if sent and trips is None:
                raise ValueError(f"a loop of unknown length sends data: {line.strip()[:200]}")
            yield from (each._replace(times=each.times * (trips or 0)) for each in sent)
        elif match := _CONDITIONAL.search(line):
            branches = [branch.strip().lstrip("%") for branch in match[2].split(",")]
            taken = _constant(computations[name], match[1])
            branches = branches if taken is None else [branches[taken]]
            sent = [list(_follow(computations, branch, times)) for branch in branches]
            yield from max(sent, key=total_bytes)
        elif match := _CALL.search(line):
            yield from _follow(computations, match[1], times)


def _trips(computations: dict[str, list[str]], line: str) -> int | None:
    """The trips of a loop of JAX's, which counts up from zero, where XLA does not write them down.

    The TPU's compiler does not.
    """
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    ends = [match[1] for each in lines if (match := _BELOW.search(each))]
    return _constant(lines, ends[0]) if len(ends) == 1 else None


def _constant(computation: list[str], name: str) -> int | None:
    """The value of an integer constant of a computation, if the name is one's."""
    definition = re.compile(rf"%?{re.escape(name)} = [su]32\[\]\S* constant\((\d+)\)")
    values = [int(match[1]) for line in computation if (match := definition.search(line))]
    return values[0] if values else None


def _collective(kind: str, result: str, times: int) -> Collective:
    found = _SHAPE.findall(result)
    shapes = tuple(tuple(int(size) for size in sizes.split(",") if size) for _, sizes in found)
    item_bytes = [_BYTES[dtype] for dtype, _ in found]
    size = sum(b * math.prod(shape) for b, shape in zip(item_bytes, shapes, strict=True))
    return Collective(kind, shapes, size, times)

"""The collectives of a compiled program, read from its text: kind, number, bytes, loops."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z]+\d+(?:e\d\w*)?|pred)\[([\d,]*)\]")
CALLED = re.compile(r"(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes
    computation: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


@dataclass(frozen=True)
class Collective:
    """All of one kind, in loops or outside; bytes are the larger of a device's input and output."""

    kind: str
    in_loop: bool
    count: int  # in the program
    runs: int  # in one step, by the loops' trip counts where they are known
    largest: int  # bytes of the largest one
    bytes: int  # of all runs


def shape_bytes(text: str) -> int:
    """Of an array type or a tuple of them."""
    total = 0
    for dtype, dims in SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # pyright: ignore
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def read_instructions(text: str) -> Iterator[Instruction]:
    computation = ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            computation = header[1]
        elif found := INSTRUCTION.match(line):
            yield Instruction(found[1], found[2], found[3], found[4], computation)


def entry_name(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert found is not None, "a program without an entry"
    return found[1]


def trip_count(loop: Instruction, conditions: dict[str, list[Instruction]]) -> int:
    """Of a while: the compiler's word, else the one constant that its condition compares with."""
    if known := TRIPS.search(loop.rest):
        return int(known[1])
    name = re.search(r"condition=%([\w.\-]+)", loop.rest)
    inside = [] if name is None else conditions[name[1]]
    bounds = [re.match(r"(\d+)\)", i.rest) for i in inside if i.opcode == "constant"]
    found = [int(bound[1]) for bound in bounds if bound]
    return found[0] if len(found) == 1 else 1


def loops_of(text: str) -> dict[str, tuple[int, bool]]:
    """(runs in one call of the program, whether inside a loop) of every computation."""
    calls: dict[str, list[tuple[str, int, bool]]] = {}
    bodies: dict[str, list[Instruction]] = {}
    for instruction in read_instructions(text):
        bodies.setdefault(instruction.computation, []).append(instruction)
    for instruction in (i for body in bodies.values() for i in body):
        for attribute, names in CALLED.findall(instruction.rest):
            loop = instruction.opcode == "while" and attribute in ("body", "condition")
            times = trip_count(instruction, bodies) if loop else 1
            for name in re.findall(r"%([\w.\-]+)", names):
                calls.setdefault(instruction.computation, []).append((name, times, loop))
    found: dict[str, tuple[int, bool]] = {}

    def visit(name: str, runs: int, in_loop: bool) -> None:
        before = found.get(name, (0, False))
        found[name] = (before[0] + runs, before[1] or in_loop)
        for callee, times, loop in calls.get(name, []):
            visit(callee, runs * times, in_loop or loop)

    visit(entry_name(text), 1, False)
    return found


def collective_sizes(text: str) -> Iterator[tuple[Instruction, str, int]]:
    """(instruction, kind, bytes) of each.

    A TPU program writes an asynchronous one into every fusion that carries it on; they share its
    channel.
    """
    instructions, seen = list(read_instructions(text)), set()
    types = {instruction.name: instruction.type for instruction in instructions}
    for instruction in instructions:
        kind = instruction.opcode.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if kind in KINDS and channel and "async_collective_fusion_config" in instruction.rest:
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        if kind in KINDS:
            taken = sum(shape_bytes(types[name]) for name in instruction.operands if name in types)
            made = shape_bytes(instruction.type)
            if instruction.opcode in ("all-gather-start", "collective-permute-start"):
                made -= taken  # the type names what goes in too
            yield instruction, kind, max(taken, made)


def find_collectives(text: str) -> list[Collective]:
    loops = loops_of(text)
    groups: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    for instruction, kind, size in collective_sizes(text):
        runs, in_loop = loops[instruction.computation]
        groups.setdefault((kind, in_loop), []).append((runs, size))
    return [
        Collective(
            kind=kind,
            in_loop=in_loop,
            count=len(group),
            runs=sum(runs for runs, _ in group),
            largest=max(size for _, size in group),
            bytes=sum(runs * size for runs, size in group),
        )
        for (kind, in_loop), group in sorted(groups.items())
    ]

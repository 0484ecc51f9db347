"""What a compiled program moves, read from its HLO text: bytes of memory, and of collectives.

The body of a loop counts as often as it runs: its condition compares a counter with a number, and
a loop whose length the program does not state (a rollout's) takes the one it is given.

Memory: what every instruction reads of HBM and writes to it. A slice reads what it takes, an update
in place writes what is new, a kernel its arguments once, and what lies in a core's own fast memory
is free. Padding to tiles is not counted.

Collectives: bytes that a chip sends, by the least that the kind needs in a group of n: an
all-gather (n - 1) times its part, an all-reduce 2 (n - 1) / n of its operand, a reduce-scatter and
an all-to-all (n - 1) / n, a permutation all of it. Between slices the compiler writes sends and
receives, each named after the kind that it is a part of; where a group itself crosses slices, its
part over DCN is what is left after each slice has done its own.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = (  # instructions that move nothing by themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier", "iota"),
    *("async-update", "add-dependency", "get-dimension-size", "domain"),
    *("send-done", "recv", "recv-done"),
)
SENT: dict[str, Callable[[float, int], float]] = {  # bytes of an operand that a chip of n sends
    "all-gather": lambda x, n: x * (n - 1),
    "all-reduce": lambda x, n: 2 * x * (n - 1) / n,
    "reduce-scatter": lambda x, n: x * (n - 1) / n,
    "all-to-all": lambda x, n: x * (n - 1) / n,
    "collective-permute": lambda x, n: x,
}
SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^{}]*\})?")


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Moved(NamedTuple):
    """A collective: how often, in groups of how many chips, and bytes that a chip sends in all."""

    kind: str
    times: float
    group: int
    ici: float
    dcn: float


class Traffic(NamedTuple):
    """Of one chip, in one run of the program."""

    memory: float  # bytes read from HBM and written to it
    collectives: list[Moved]
    unknown: int  # loops whose length is not in the text

    @property
    def ici(self) -> float:
        return sum(m.ici for m in self.collectives)

    @property
    def dcn(self) -> float:
        return sum(m.dcn for m in self.collectives)


def traffic(text: str, slices: Sequence[int], loop: int = 1) -> Traffic:
    """What the program of this HLO text moves. `slices` is the slice of each of its chips, in the
    order of the mesh; `loop` is what a loop of unknown length counts for."""
    return _Reader(text, slices, loop).run()


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by name, by computation; and the name of the entry."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = re.match(r"(?:ENTRY )?%([\w.\-]+)", line)[1]
            here = found.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            here = None
        elif here is not None and (one := _instruction(line)):
            here[one.name] = one
    return found, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:cut], rest[cut:].lstrip()
    op, _, _ = rest.partition("(")
    end = _closing(rest, len(op))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(op) : end]))
    if op == "constant":
        return Instruction(head[2], kind, op, (rest[len(op) + 1 : end],), "", bool(head[1]))
    if op == "parameter":
        operands = (rest[len(op) + 1 : end],)
    return Instruction(head[2], kind, op, operands, rest[end + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def size(kind: str, *, everywhere: bool = False) -> float:
    """Bytes of a type, or of all parts of a tuple; of what lies in HBM unless `everywhere`."""
    total = 0.0
    for name, dims, layout in SHAPE.findall(kind):
        if everywhere or not re.search(r"S\([1-9]\)", layout):
            shape = [int(d) for d in dims.split(",") if d]
            total += math.prod(shape) * _width(name)
    return total


def _width(name: str) -> float:
    if name in SIZES:
        return SIZES[name]
    bits = re.match(r"[suf](\d+)", name)
    return int(bits[1]) / 8 if bits else 1.0


def groups(attributes: str) -> list[list[int]]:
    """The groups of chips of a collective; none is all of them."""
    if pairs := re.search(r"source_target_pairs=\{([{}\d,]*)\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if plain := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return [[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", plain[1])]
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, turned = _numbers(iota[3]), _numbers(iota[4] or "")
        flat = _iota(shape, turned or list(range(len(shape))))
        per = int(iota[2])
        return [flat[i : i + per] for i in range(0, len(flat), per)]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", attributes):
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", named[1])}
        shape, names = list(sizes.values()), list(sizes)
        over = [names.index(n) for n in re.findall(r"'([^']+)'", named[3]) if n in sizes]
        rest = [i for i in range(len(shape)) if i not in over]
        flat, per = _iota(shape, rest + over), math.prod(shape[i] for i in over)
        return [flat[i : i + per] for i in range(0, len(flat), per)]
    return []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """0, 1, 2 ... in `shape`, its axes put into `order`, flat."""
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    out = [0]
    for axis in order:
        out = [base + i * steps[axis] for base in out for i in range(shape[axis])]
    return out


class _Reader:
    def __init__(self, text: str, slices: Sequence[int], loop: int):
        self.all, self.entry = computations(text)
        self.slices, self.loop, self.unknown = slices, loop, 0
        self.seen: dict[str, tuple[float, list[Moved]]] = {}

    def run(self) -> Traffic:
        memory, moved = self.walk(self.entry)
        joined: dict[tuple[str, int], Moved] = {}
        for m in moved:
            old = joined.get((m.kind, m.group), Moved(m.kind, 0, m.group, 0, 0))
            more = (a + b for a, b in zip((old.times, old.ici, old.dcn), (m.times, m.ici, m.dcn)))
            times, ici, dcn = more
            joined[m.kind, m.group] = Moved(m.kind, times, m.group, ici, dcn)
        order = sorted(joined.values(), key=lambda m: -(m.ici + m.dcn))
        return Traffic(memory, order, self.unknown)

    def walk(self, name: str) -> tuple[float, list[Moved]]:
        """Bytes of HBM and the collectives of one run of a computation."""
        if name not in self.seen:
            memory, moved = 0.0, []
            for one in self.all[name].values():
                m, c = self.of(one, self.all[name])
                memory, moved = memory + m, moved + c
            self.seen[name] = memory, moved
        return self.seen[name]

    def of(self, one: Instruction, here: Mapping[str, Instruction]) -> tuple[float, list[Moved]]:
        called = lambda key: re.search(rf"\b{key}=%([\w.\-]+)", one.attributes)
        if one.op == "while":
            times = self.times(one, here)
            memory, moved = self.walk(called("body")[1])
            return times * memory, [
                m._replace(times=m.times * times, ici=m.ici * times, dcn=m.dcn * times)
                for m in moved
            ]
        if one.op == "conditional":
            return max((self.walk(b) for b in _branches(one.attributes)), key=lambda x: x[0])
        if one.op in ("call", "async-start") and (inside := called("to_apply") or called("calls")):
            return self.walk(inside[1])
        if one.op == "send":
            return self.bytes(one, here), [self.between(one, here)]
        kind = one.op.removesuffix("-start")
        if kind in KINDS:
            return self.bytes(one, here), [self.moved(kind, one, here)]
        if one.op == "fusion" and (inside := self.all.get(called("calls")[1])):
            inner = [self.moved(i.op, i, inside) for i in inside.values() if i.op in KINDS]
            if "all-reduce-scatter" in called("calls")[1]:  # sends as a reduce-scatter does
                inner = [m._replace(kind=KINDS[2], ici=m.ici / 2, dcn=m.dcn / 2) for m in inner]
            return self.fused(one, here, inside), inner
        return self.bytes(one, here), []

    def times(self, one: Instruction, here: Mapping[str, Instruction]) -> float:
        """How often a loop runs."""
        if told := re.search(r"known_trip_count[^\d]*(\d+)", one.attributes):
            return int(told[1])
        condition = self.all[re.search(r"condition=%([\w.\-]+)", one.attributes)[1]]
        (root,) = [i for i in condition.values() if i.root]
        sides = [condition[n] for n in root.operands if n in condition]
        by = [s for s in sides if s.op == "constant" and re.fullmatch(r"\d+", s.operands[0])]
        if root.op != "compare" or "direction=LT" not in root.attributes or len(by) != 1:
            self.unknown += 1
            return self.loop
        counter = next(s for s in sides if s is not by[0])
        first = 0
        if at := re.search(r"index=(\d+)", counter.attributes):
            begun = here.get(one.operands[0])
            if begun is not None and begun.op == "tuple":
                start = here[begun.operands[int(at[1])]]
                if start.op == "constant" and re.fullmatch(r"\d+", start.operands[0]):
                    first = int(start.operands[0])
        return int(by[0].operands[0]) - first

    def moved(self, kind: str, one: Instruction, here: Mapping[str, Instruction]) -> Moved:
        found = groups(one.attributes) or [list(range(len(self.slices)))]
        part = sum(size(here[n].type, everywhere=True) for n in one.operands if n in here)
        if kind == "collective-permute":
            apart = [self.slices[a] != self.slices[b] for a, b in found]
            share = sum(apart) / max(len(apart), 1)
            return Moved(kind, 1, 2, part * (1 - share), part * share)
        group = found[0]
        n, across = len(group), len({self.slices[i] for i in group})
        near = n // across
        if across == 1:
            return Moved(kind, 1, n, SENT[kind](part, n), 0.0)
        if kind == "all-gather":  # over DCN first, then what came in the slice
            return Moved(kind, 1, n, SENT[kind](part * across, near), SENT[kind](part, across))
        if kind == "all-to-all":
            return Moved(kind, 1, n, part * (near - 1) / n, part * (n - near) / n)
        return Moved(kind, 1, n, SENT[kind](part, near), SENT[kind](part / near, across))

    def between(self, one: Instruction, here: Mapping[str, Instruction]) -> Moved:
        """What is sent to other slices."""
        told = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        kind = told[1].lower().replace("_", "-") if told else "collective-permute"
        kind = kind if kind in SENT else "collective-permute"
        count = len(set(self.slices))
        part = size(here[one.operands[0]].type, everywhere=True)
        return Moved(kind, 1, count, 0.0, SENT[kind](part, count))

    def bytes(self, one: Instruction, here: Mapping[str, Instruction]) -> float:
        """HBM that an instruction by itself reads and writes."""
        if one.op in FREE:
            return 0.0
        if one.op.endswith("-done"):
            return size(one.type) * (2 if one.op.startswith(("slice", "dynamic-slice")) else 1)
        reads = [size(here[n].type) for n in one.operands if n in here]
        if one.op.endswith("-start"):
            return 0.0 if one.op.startswith(("slice", "dynamic-slice")) else sum(reads)
        match one.op:
            case "dynamic-slice" | "slice" | "gather":
                return 2 * size(one.type)
            case "dynamic-update-slice":
                return 2 * reads[1]
            case "scatter":
                return 2 * sum(reads[2:])
            case "broadcast":
                return size(one.type)
        return sum(reads) + size(one.type)

    def fused(
        self,
        one: Instruction,
        here: Mapping[str, Instruction],
        inside: Mapping[str, Instruction],
    ) -> float:
        """HBM that a fusion reads and writes."""
        total = 0.0
        slots = _slots(inside)
        for at, name in enumerate(one.operands):
            if name not in here:
                continue
            whole = size(here[name].type)
            some = self.taken(slots[at], inside) if at in slots else None
            total += whole if some is None else min(whole, some)
        (root,) = [i for i in inside.values() if i.root]
        parts = [inside[n] for n in root.operands] if root.op == "tuple" else [root]
        kinds = [m[0] for m in SHAPE.finditer(one.type)]
        for part, kind in zip(parts, kinds):
            part, where = self.behind(part, inside)
            written = size(kind)
            if part.op == "dynamic-update-slice" and written:
                written = min(written, size(where[part.operands[1]].type, everywhere=True))
            total += written
        return total

    def inside(self, one: Instruction) -> dict[str, Instruction]:
        """The computation of a fusion."""
        return self.all[re.search(r"\bcalls=%([\w.\-]+)", one.attributes)[1]]

    def taken(self, name: str, inside: Mapping[str, Instruction]) -> float | None:
        """Bytes that a fused computation, and those fused into it, read of a value of which they
        take parts; None: all of it is read."""
        total = 0.0
        for user in inside.values():
            if user.op == "parameter" or name not in user.operands:
                continue
            if (part := self.part(user, name, inside)) is None:
                return None
            total += part
        return total

    def part(self, user: Instruction, name: str, inside: Mapping[str, Instruction]) -> float | None:
        """Bytes that one reader takes of a value; None for all."""
        if user.op == "bitcast":
            return self.taken(user.name, inside)
        if user.op == "fusion":
            within = self.inside(user)
            slots = _slots(within)
            parts = [self.taken(slots[i], within) for i, n in enumerate(user.operands) if n == name]
            return None if None in parts else sum(parts)
        if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            return size(user.type, everywhere=True)
        if user.op == "dynamic-update-slice" and user.operands[0] == name:
            return 0.0  # in place: what is written is counted as output
        return None

    def behind(
        self, part: Instruction, inside: Mapping[str, Instruction]
    ) -> tuple[Instruction, Mapping[str, Instruction]]:
        """What makes a value, behind bitcasts and inside fusions of one output, and where it is."""
        if part.op == "bitcast" and part.operands[0] in inside:
            return self.behind(inside[part.operands[0]], inside)
        if part.op == "fusion" and not part.type.startswith("("):
            within = self.inside(part)
            (root,) = [i for i in within.values() if i.root]
            return self.behind(root, within)
        return part, inside


def _slots(inside: Mapping[str, Instruction]) -> dict[int, str]:
    """The names of a computation's parameters, by their number."""
    return {int(i.operands[0]): i.name for i in inside.values() if i.op == "parameter"}


def _branches(attributes: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        return re.findall(r"%([\w.\-]+)", several[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", attributes)

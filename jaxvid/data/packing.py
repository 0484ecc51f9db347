"""Which row each tree goes to: first fit in every respect at once, largest first.

The unit is the group (a duality pair): it is in one row where it can be, and never leaves its
micro-batch and data shard.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """What a tree takes of a row, and where in a row the next tree starts."""

    tokens: int = 0
    scored: int = 0
    branches: int = 0
    frames: int = 0
    chunks: int = 0

    def plus(self, other: "Size") -> "Size":
        return Size(*(a + b for a, b in zip(self, other)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The static shape of a micro-batch. Every limit holds for one row."""

    rows: int
    tokens: int
    scored: int
    branches: int
    frames: int  # temporal patches (temporal x one frame each)
    patches: int  # patches of one frame
    chunks: int = 0  # of sound

    @property
    def row(self) -> Size:
        return Size(self.tokens, self.scored, self.branches, self.frames, self.chunks)


def _fits(need: Size, used: Size, limit: Size) -> bool:
    return all(a + b <= c for a, b, c in zip(need, used, limit))


def _load(need: Size, limit: Size) -> float:
    """The largest share of a row that `need` takes in any respect."""
    return max(a / c if c else 0.0 for a, c in zip(need, limit))


def _place(needs: list[Size], rows: list[Size], limit: Size) -> list[int] | None:
    """The row of each tree of a group among `rows` (what each has used), or None.

    One row for all where an empty row could hold them all; else first fit, largest tree first.
    """
    total = Size()
    for need in needs:
        total = total.plus(need)
    if _fits(total, Size(), limit):
        row = next((r for r, used in enumerate(rows) if _fits(total, used, limit)), None)
        return None if row is None else [row] * len(needs)
    used, out = list(rows), [0] * len(needs)
    for i in sorted(range(len(needs)), key=lambda i: -_load(needs[i], limit)):
        row = next((r for r, u in enumerate(used) if _fits(needs[i], u, limit)), None)
        if row is None:
            return None
        used[row], out[i] = used[row].plus(needs[i]), row
    return out


def assign(
    groups: Sequence[Sequence[Size]], budget: Budget, *, shards: int = 1
) -> list[list[tuple[int, list[int]]]]:
    """Micro-batches as lists of (group, row of each of its trees). First fit, largest group first.

    A micro-batch's rows are cut into `shards` equal blocks, and a group never leaves its block:
    a pair's two trees stay on one data shard. Raises ValueError naming the group that cannot fit.
    """
    if budget.rows % shards:
        raise ValueError(
            f"{budget.rows} rows do not divide over {shards} data shards. Set budget.rows to a "
            f"multiple of {shards}."
        )
    limit, block = budget.row, budget.rows // shards
    micro: list[list[Size]] = []
    out: list[list[tuple[int, list[int]]]] = []

    def put(g: int) -> bool:
        for m, rows in enumerate(micro):
            for first in range(0, budget.rows, block):
                found = _place(list(groups[g]), rows[first : first + block], limit)
                if found is not None:
                    for need, r in zip(groups[g], found):
                        rows[first + r] = rows[first + r].plus(need)
                    out[m].append((g, [first + r for r in found]))
                    return True
        return False

    load = [sum(_load(need, limit) for need in group) for group in groups]
    for g in sorted(range(len(groups)), key=lambda g: -load[g]):
        if not put(g):
            micro.append([Size()] * budget.rows)
            out.append([])
            if not put(g):
                raise ValueError(
                    f"group {g} has {len(groups[g])} trees that must stay together, but they do "
                    f"not fit in {block} rows of {limit}. Set budget.rows to at least "
                    f"{len(groups[g]) * shards}, or make the rows larger."
                )
    return out

"""Trees and how they are laid out in rows of one static shape. Numpy only; runs in Grain workers.

A tree is a prompt (text and at most one clip) and its branches; a row holds trees one after the
other, depth first. batch.py draws the row and states the mask; this file is the only one that
writes `end`, `sources` and `slot`.

    index  | 0 .. p-1 | p .. b1-1 | b1 .. b2-1 |      prompt of p tokens, two branches
    end    | b2 .. b2 | b1 .. b1  | b2 .. b2   |      first index after the token's subtree
    source of the first token of either branch: p-1, the prompt's last token

A branch may continue another branch instead of the prompt (`parent`): step prefixes with their
alternatives, or a question with its answers below a clip that several questions share.
Left out: several clips in one prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.tree_util
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxvid.batch import Batch, Branches, TokenBatch, VisionBatch
from jaxvid.data import media

Ids = Int[np.ndarray, "n"]


class Branch(NamedTuple):
    """A continuation of the prompt, or of the branch that `parent` names."""

    tokens: Int[np.ndarray, "n"]
    scored: Bool[np.ndarray, "n"]  # the tokens that score this branch
    record: int = -1
    pair: int = -1
    side: int = 0
    branch: int = 0
    mate: int = 0  # 1 + index, within the tree, of the branch it is compared with; 0 none
    axis: int = 0
    weight: float = 1.0
    advantage: float = 0.0
    value: float = 0.0
    old: Float[np.ndarray, "s"] | None = None  # one number per scored token
    ref: Float[np.ndarray, "s"] | None = None
    sampled: Float[np.ndarray, "s"] | None = None
    parent: int = 0  # 1 + index, within the tree, of the branch it continues; 0 the prompt


class Tree(NamedTuple):
    """A prompt and its branches, not yet placed in a row. Made by `tree`."""

    name: str  # the record's id, for errors
    prompt: Int[np.ndarray, "p"]
    positions: Int[np.ndarray, "3 p"]
    media: Int[np.ndarray, "p"]  # 1 + index of the clip's merged feature put here; 0 is text
    patches: UInt8[np.ndarray, "e q C"]
    coords: Int[np.ndarray, "q 2"]
    window: Int[np.ndarray, "q"]
    grid: tuple[int, int, int]  # (time, height, width) in patches; zeros without a clip
    branches: tuple[Branch, ...] = ()


class Size(NamedTuple):
    """What a tree takes of a row, and where in a row the next tree starts."""

    tokens: int = 0
    scored: int = 0
    branches: int = 0
    frames: int = 0

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

    @property
    def row(self) -> Size:
        return Size(self.tokens, self.scored, self.branches, self.frames)


def window_layout(
    grid: tuple[int, int, int], vision: media.Vision
) -> tuple[Int[np.ndarray, "Q 2"], Int[np.ndarray, "Q"]]:
    """(row, column) of each patch of a frame in merge order, and its attention window from 1.

    The windows of Qwen2.5-VL: `window` pixels a side, cut from the top left, partial at the edges.
    """
    _, height, width = grid
    merge, side = vision.merge, vision.window // vision.merge // vision.patch
    if height % merge or width % merge:
        raise ValueError(
            f"a frame of {height} x {width} patches does not divide into {merge} x {merge} groups. "
            f"Set the sampling's height and width to multiples of {merge * vision.patch} pixels."
        )
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    coords = np.stack([rows, columns], -1)
    blocks = coords.reshape(height // merge, merge, width // merge, merge, 2)
    coords = blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)
    at = coords // merge // side
    across = -(-(width // merge) // side)
    return coords, (1 + at[:, 0] * across + at[:, 1]).astype(np.int32)


def tree(
    name: str,
    prompt: Ids,
    positions: Int[np.ndarray, "3 n"],
    vision: media.Vision,
    *,
    placeholders: Bool[np.ndarray, "n"] | None = None,
    patches: UInt8[np.ndarray, "e q C"] | None = None,
    grid: tuple[int, int, int] = (0, 0, 0),
    branches: tuple[Branch, ...] = (),
) -> Tree:
    """A tree, checked: the placeholders are as many as the clip has merged features."""
    if patches is None:
        patches = np.zeros((0, 0, 3 * vision.temporal * vision.patch**2), np.uint8)
        grid, layout = (0, 0, 0), (np.zeros((0, 2), np.int32), np.zeros(0, np.int32))
    else:
        layout = window_layout(grid, vision)
    if placeholders is None:
        placeholders = np.zeros(len(prompt), bool)
    found, wanted = int(placeholders.sum()), grid[0] * grid[1] * grid[2] // vision.merge**2
    if found != wanted:
        raise ValueError(
            f"record {name!r}: the prompt has {found} media placeholders but its clip of "
            f"{grid[0]} x {grid[1]} x {grid[2]} patches gives {wanted} features. Build the prompt "
            f"with {wanted} placeholders."
        )
    index = (np.cumsum(placeholders) * placeholders).astype(np.int32)
    out = Tree(
        name,
        np.asarray(prompt, np.int32),
        np.asarray(positions, np.int32),
        index,
        patches,
        *layout,
        tuple(grid),
        tuple(branches),
    )
    _check_branches(out)
    return out


def _check_branches(tree: Tree) -> None:
    """Raise ValueError naming the first branch that does not hang together."""
    for i, b in enumerate(tree.branches):
        fault = ""
        if not len(tree.prompt):
            fault = "there is no prompt to predict it from; give the tree at least one token"
        elif not len(b.tokens) or len(b.scored) != len(b.tokens):
            fault = f"{len(b.tokens)} tokens, {len(b.scored)} scored flags; give one flag a token"
        elif not 0 <= b.parent <= i:
            fault = f"parent {b.parent}; a parent comes before its branch, so at most {i}"
        elif not 0 <= b.mate <= len(tree.branches) or b.mate == i + 1:
            fault = f"mate {b.mate}; it must be another branch, 1 to {len(tree.branches)}, or 0"
        for field, values in (("old", b.old), ("ref", b.ref), ("sampled", b.sampled)):
            if values is not None and len(values) != b.scored.sum():
                fault = f"{len(values)} numbers in {field!r} for {b.scored.sum()} scored tokens"
        if fault:
            raise ValueError(f"record {tree.name!r}, branch {i}: {fault}")


def size(tree: Tree) -> Size:
    """What the tree takes of a row."""
    return Size(
        len(tree.prompt) + sum(len(b.tokens) for b in tree.branches),
        sum(int(b.scored.sum()) for b in tree.branches),
        len(tree.branches),
        len(tree.patches),
    )


def numbered(tree: Tree, *, record: int, pair: int) -> Tree:
    """The tree with its branches' record and pair set: their indices in the batch to come."""
    return tree._replace(
        branches=tuple(b._replace(record=record, pair=pair) for b in tree.branches)
    )


def next_position(tree: Tree) -> int:
    """The position, on all three axes, of the token that follows the prompt.

    The prompt's last token is text, so this is its position + 1, whatever rule placed that token
    after the clip.
    """
    return int(tree.positions[:, -1].max()) + 1


class Span(NamedTuple):
    """Where a branch lies, counted from the start of its tree."""

    start: int
    end: int  # first index after its subtree
    depth: int  # of its first token
    source: int  # the token that predicts its first token


def spans(tree: Tree) -> list[Span]:
    """Where each branch lies when the tree is written depth first, in the order of `branches`."""
    children: list[list[int]] = [[] for _ in range(len(tree.branches) + 1)]
    for i, b in enumerate(tree.branches):
        children[b.parent].append(i)
    out: list[Span] = [Span(0, 0, 0, 0)] * len(tree.branches)

    def write(node: int, at: int, depth: int, source: int) -> int:
        """Lay out the branches below `node` from index `at`; returns the first free index."""
        for i in children[node]:
            n = len(tree.branches[i].tokens)
            end = write(i + 1, at + n, depth + n, at + n - 1)
            out[i] = Span(at, end, depth, source)
            at = end
        return at

    p = len(tree.prompt)
    write(0, p, p, p - 1)
    return out


# Packing ----------------------------------------------------------------------------------------


def _fits(need: Size, used: Size, limit: Size) -> bool:
    return all(a + b <= c for a, b, c in zip(need, used, limit))


def _load(need: Size, limit: Size) -> float:
    """The largest share of a row that `need` takes in any respect."""
    return max(a / c if c else 0.0 for a, c in zip(need, limit))


def check_fits(tree: Tree, budget: Budget, *, need: Size | None = None) -> None:
    """Raise ValueError, naming the setting to change, if the tree cannot fit in an empty row."""
    for field, wanted, limit in zip(Size._fields, need or size(tree), budget.row):
        if wanted > limit:
            raise ValueError(
                f"record {tree.name!r}: its tree has {wanted} {field}; a row holds {limit}. Set "
                f"budget.{field} to at least {wanted}, or give the record less: fewer frames, "
                f"smaller frames, fewer questions, shorter answers."
            )
    q = tree.patches.shape[1]
    if q > budget.patches:
        raise ValueError(
            f"record {tree.name!r}: its frames have {q} patches; the batch holds {budget.patches} "
            f"a frame. Set budget.patches to at least {q}, or sample smaller frames."
        )


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


def pack(groups: Sequence[Sequence[Tree]], budget: Budget, *, shards: int = 1) -> list[Batch]:
    """Micro-batches of `budget.rows` rows that hold every tree once, each group in one of them.

    A group (a duality pair) is in one row where it fits an empty row, else in rows of the same
    micro-batch and data shard. The same groups always give the same batches.
    """
    for group in groups:
        for t in group:
            _check_branches(t)
            check_fits(t, budget)
    plan = assign([[size(t) for t in group] for group in groups], budget, shards=shards)
    channels = next((t.patches.shape[2] for group in groups for t in group), 0)
    out = []
    for placed in plan:
        batch = empty(budget, channels)
        used = [Size()] * budget.rows
        for g, rows in sorted(placed):
            for t, row in zip(groups[g], rows):
                _write(batch, row, used[row], t)
                used[row] = used[row].plus(size(t))
        out.append(batch)
    return out


def empty(budget: Budget, channels: int) -> Batch:
    """A micro-batch of padding."""
    B, T, S, M = budget.rows, budget.tokens, budget.scored, budget.branches
    E, Q = budget.frames, budget.patches

    def ints(*shape):
        return np.zeros((B, *shape), np.int32)

    def floats(*shape):
        return np.zeros((B, *shape), np.float32)

    return Batch(
        TokenBatch(ints(T), ints(3, T), ints(T), ints(T), ints(T), ints(S), ints(S), ints(S)),
        VisionBatch(np.zeros((B, E, Q, channels), np.uint8), ints(E, Q, 2), ints(E, Q)),
        Branches(
            *(ints(M) - 1, ints(M) - 1, ints(M), ints(M), ints(M), ints(M)),
            *(floats(M), floats(M), floats(M)),
        ),
        floats(S),
        floats(S),
        floats(S),
    )


def _write(batch: Batch, row: int, at: Size, tree: Tree) -> None:
    """Write the tree into a row from `at` on."""
    x, p, total = batch.tokens, len(tree.prompt), size(tree).tokens
    here = slice(at.tokens, at.tokens + p)
    x.tokens[row, here], x.positions[row, :, here] = tree.prompt, tree.positions
    x.end[row, here], x.depth[row, here] = at.tokens + total, np.arange(p)
    if len(tree.patches):
        x.media[row, here] = _media_index(tree, at.frames, batch.vision.window.shape[2])
        e, q, _ = tree.patches.shape
        frames = slice(at.frames, at.frames + e)
        batch.vision.patches[row, frames, :q] = tree.patches
        batch.vision.coords[row, frames, :q] = tree.coords
        batch.vision.window[row, frames, :q] = tree.window
    scored = at.scored
    for i, (b, span) in enumerate(zip(tree.branches, spans(tree))):
        n, start = len(b.tokens), at.tokens + span.start
        here, column = slice(start, start + n), at.branches + i
        x.tokens[row, here], x.end[row, here] = b.tokens, at.tokens + span.end
        depth = span.depth + np.arange(n)
        x.depth[row, here] = depth
        # Text advances all three axes alike, so a branch's position follows its depth.
        x.positions[row, :, here] = next_position(tree) + depth - p
        which = np.flatnonzero(b.scored)
        s = slice(scored, scored := scored + len(which))
        x.targets[row, s], x.slot[row, s] = b.tokens[which], column + 1
        x.sources[row, s] = np.where(which, start + which - 1, at.tokens + span.source)
        for leaf, values in ((batch.old, b.old), (batch.ref, b.ref), (batch.sampled, b.sampled)):
            if values is not None:
                leaf[row, s] = values
        _write_column(batch.branches, row, column, b, at.branches)


def _write_column(table: Branches, row: int, column: int, b: Branch, first: int) -> None:
    at = row, column
    table.record[at], table.pair[at], table.side[at] = b.record, b.pair, b.side
    table.branch[at], table.axis[at] = b.branch, b.axis
    table.mate[at] = first + b.mate if b.mate else 0
    table.weight[at], table.advantage[at], table.value[at] = b.weight, b.advantage, b.value


def _media_index(tree: Tree, first_frame: int, q_row: int) -> Int[np.ndarray, "p"]:
    """The tree's `media` as indices of the row, whose frames are q_row patches and start later."""
    e, q, _ = tree.patches.shape
    per_frame = int((tree.media > 0).sum()) // e
    merged = q // per_frame  # patches of one merged feature
    if q_row % merged:
        raise ValueError(
            f"budget.patches is {q_row}; {merged} patches merge into one token. Set it to a "
            f"multiple of {merged}."
        )
    frame, place = np.divmod(tree.media - 1, per_frame)
    return np.where(tree.media > 0, 1 + (first_frame + frame) * (q_row // merged) + place, 0)


def prompts(
    trees: Sequence[Tree], rows: int, tokens: int, frames: int, patches: int
) -> tuple[TokenBatch, VisionBatch]:
    """One prompt a row, in the order given, branches left out: what the sampler reads (S = 0)."""
    if len(trees) > rows:
        raise ValueError(f"{len(trees)} prompts for {rows} rows; give at most {rows} at a time")
    budget = Budget(rows=rows, tokens=tokens, scored=0, branches=0, frames=frames, patches=patches)
    batch = empty(budget, trees[0].patches.shape[2] if trees else 0)
    for row, t in enumerate(trees):
        bare = t._replace(branches=())
        check_fits(bare, budget)
        _write(batch, row, Size(), bare)
    return batch.tokens, batch.vision


def stack(batches: Sequence[Batch], multiple: int = 0) -> Batch:
    """One Batch with a leading axis of micro-batches, padded with empty ones.

    multiple > 0 pads to a multiple of it; 0 pads to the next power of two, so that a run compiles
    a handful of step shapes and not one per count.
    """
    if not batches:
        raise ValueError("no micro-batches to stack; pack at least one group")
    n = len(batches)
    count = -(-n // multiple) * multiple if multiple else 1 << (n - 1).bit_length()
    blank = jax.tree_util.tree_map(np.zeros_like, batches[0])
    none = np.full_like(batches[0].branches.record, -1)
    blank = blank._replace(branches=blank.branches._replace(record=none, pair=none))
    return jax.tree_util.tree_map(
        lambda *leaves: np.stack(leaves), *batches, *[blank] * (count - n)
    )

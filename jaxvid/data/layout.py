"""Trees and how they are laid out in rows of one static shape. Numpy only; runs in Grain workers.

A tree is a prompt (text and clips) and its branches; a row holds trees one after the other, depth
first. batch.py draws the row and states the mask; this file is the only one that
writes `end`, `sources` and `slot`.

    index  | 0 .. p-1 | p .. b1-1 | b1 .. b2-1 |      prompt of p tokens, two branches
    end    | b2 .. b2 | b1 .. b1  | b2 .. b2   |      first index after the token's subtree
    source of the first token of either branch: p-1, the prompt's last token

A branch may continue another branch instead of the prompt (`parent`): step prefixes with their
alternatives, or a question with its answers below a clip that several questions share.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.tree_util
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxvid.batch import AudioBatch, Batch, Branches, TokenBatch, VisionBatch
from jaxvid.data.packing import Budget, Size, assign
from jaxvid.prompting import Sound, Vision

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
    across: int = 0  # which tree of its group has its mate, counted from its own: 0 its own


class Clip(NamedTuple):
    """One medium of a prompt as the model takes it: patches, log-mel chunks, or both."""

    patches: UInt8[np.ndarray, "e q C"] | None = None
    grid: tuple[int, int, int] = (0, 0, 0)  # (time, height, width) in patches
    sound: Float[np.ndarray, "a F Z"] | None = None
    lengths: Int[np.ndarray, "a"] | None = None  # log-mel frames of each chunk that are sound


class Frames(NamedTuple):
    """The frames of one clip with the place of each patch, which is the same in all of them."""

    patches: UInt8[np.ndarray, "e q C"]
    coords: Int[np.ndarray, "q 2"]
    window: Int[np.ndarray, "q"]
    slots: int  # features a frame


class Tree(NamedTuple):
    """A prompt and its branches, not yet placed in a row. Made by `tree`."""

    name: str  # the record's id, for errors
    prompt: Int[np.ndarray, "p"]
    positions: Int[np.ndarray, "3 p"]
    seen: Int[np.ndarray, "p"]  # 1 + index among the clips' vision features; -1 separator; 0 none
    heard: Int[np.ndarray, "p"]  # 1 + index among the clips' sound slots; 0 none
    clips: tuple[Frames, ...]
    sound: Float[np.ndarray, "a F Z"]
    lengths: Int[np.ndarray, "a"]
    order: Int[np.ndarray, "a"]  # place of each chunk in its own sound
    vision: Vision
    slots: int  # features of a sound chunk
    branches: tuple[Branch, ...] = ()


def window_layout(
    grid: tuple[int, int, int], vision: Vision
) -> tuple[Int[np.ndarray, "Q 2"], Int[np.ndarray, "Q"]]:
    """(row, column) of each patch of a frame in merge order, and its attention window from 1.

    The windows of Qwen2.5-VL: `window` pixels a side, cut from the top left, partial at the edges.
    """
    _, height, width = grid
    merge = vision.merge
    side = vision.window // merge // vision.patch or max(height, width)  # 0: one window for all
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
    vision: Vision,
    sound: Sound | None = None,
    *,
    clips: Sequence[Clip] = (),
    seen: Ids | None = None,
    heard: Ids | None = None,
    branches: tuple[Branch, ...] = (),
) -> Tree:
    """A tree, checked: what stands in the prompt for its clips is what they give.

    `seen` and `heard` are those of `Tree`, numbered over all clips; None is a prompt of text alone.
    """
    none = np.zeros(len(prompt), np.int32)
    seen, heard = none if seen is None else seen, none if heard is None else heard
    frames = tuple(
        Frames(c.patches, *window_layout(c.grid, vision), vision.slots(c.patches.shape[1]))
        for c in clips
        if c.patches is not None
    )
    given = sum(len(f.patches) * f.slots for f in frames)
    # A tower of fixed size sees padding that an image's own shape leaves out again.
    _check_used(name, "vision features", seen, given, some=vision.size > 0)
    tracks = [c for c in clips if c.sound is not None]
    slots = sound.slots if sound else 0
    shape = (0, sound.chunk, sound.mels) if sound else (0, 0, 0)
    track = np.concatenate([np.zeros(shape, np.float32), *(c.sound for c in tracks)])
    lengths = np.concatenate([none[:0], *(c.lengths for c in tracks)]).astype(np.int32)
    order = np.concatenate([none[:0], *(np.arange(len(c.sound)) for c in tracks)]).astype(np.int32)
    _check_used(name, "sound slots", heard, len(track) * slots, some=True)
    out = Tree(
        name,
        np.asarray(prompt, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(seen, np.int32),
        np.asarray(heard, np.int32),
        frames,
        track,
        lengths,
        order,
        vision,
        slots,
        tuple(branches),
    )
    _check_branches(out)
    return out


def in_order(placeholders: Bool[np.ndarray, "n"]) -> Ids:
    """`seen` or `heard` of a prompt whose placeholders take the features one after the other."""
    return (np.cumsum(placeholders) * placeholders).astype(np.int32)


def _check_used(name: str, what: str, index: Ids, given: int, *, some: bool) -> None:
    """Raise ValueError unless each feature is in the prompt once (`some`: at most once)."""
    used = np.sort(index[index > 0])
    found = len(used)
    if found > given or (found < given and not (some and found)):
        raise ValueError(
            f"record {name!r}: the prompt has {found} media placeholders but its clips give "
            f"{given} {what}. Build the prompt with {given} placeholders."
        )
    if found and (used[-1] > given or (np.diff(used) == 0).any()):
        raise ValueError(
            f"record {name!r}: the prompt names {what} up to {used[-1]}, some of them perhaps "
            f"twice; its clips give {given}. Give each placeholder a feature of its own."
        )


def most_patches(tree: Tree) -> int:
    """Patches of the largest frame of the tree's clips."""
    return max((f.patches.shape[1] for f in tree.clips), default=0)


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
        elif not b.across and (not 0 <= b.mate <= len(tree.branches) or b.mate == i + 1):
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
        sum(len(f.patches) for f in tree.clips),
        len(tree.sound),
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


def extend(tree: Tree, tokens: Ids) -> Tree:
    """The tree whose prompt goes on with these tokens of text, such as the first steps of a reply:
    what a branch of them would be, as a prompt to sample from. Its branches go on from there."""
    n = len(tokens)
    after = np.broadcast_to((next_position(tree) + np.arange(n))[None], (3, n))
    grown = lambda x, more: np.concatenate([x, more], axis=-1).astype(np.int32)
    return tree._replace(
        prompt=grown(tree.prompt, tokens),
        positions=grown(tree.positions, after),
        seen=grown(tree.seen, np.zeros(n)),
        heard=grown(tree.heard, np.zeros(n)),
    )


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


def check_fits(tree: Tree, budget: Budget, *, need: Size | None = None) -> None:
    """Raise ValueError, naming the setting to change, if the tree cannot fit in an empty row."""
    for field, wanted, limit in zip(Size._fields, need or size(tree), budget.row):
        if wanted > limit:
            raise ValueError(
                f"record {tree.name!r}: its tree has {wanted} {field}; a row holds {limit}. Set "
                f"budget.{field} to at least {wanted}, or give the record less: fewer frames, "
                f"smaller frames, fewer questions, shorter answers."
            )
    q = most_patches(tree)
    if q > budget.patches:
        raise ValueError(
            f"record {tree.name!r}: its frames have {q} patches; the batch holds {budget.patches} "
            f"a frame. Set budget.patches to at least {q}, or sample smaller frames."
        )


def pack(groups: Sequence[Sequence[Tree]], budget: Budget, *, shards: int = 1) -> list[Batch]:
    """Micro-batches of `budget.rows` rows that hold every tree once, each group in one of them.

    A group (a duality pair) is in one row where it fits an empty row, else in rows of the same
    micro-batch and data shard. The same groups always give the same batches.
    """
    for group in groups:
        for t in group:
            _check_branches(t)
            check_fits(t, budget)
        _check_across(group, budget)
    plan = assign([[size(t) for t in group] for group in groups], budget, shards=shards)
    first = next((t for group in groups for t in group), None)
    out = []
    for placed in plan:
        batch = empty(budget, first)
        used = [Size()] * budget.rows
        for g, rows in sorted(placed):
            starts = []
            for t, row in zip(groups[g], rows):
                starts.append(used[row])
                used[row] = used[row].plus(size(t))
            for i, (t, row) in enumerate(zip(groups[g], rows)):
                mates = [
                    starts[i + b.across].branches + b.mate if b.mate else 0 for b in t.branches
                ]
                _write(batch, row, starts[i], t, mates)
        out.append(batch)
    return out


def _check_across(group: Sequence[Tree], budget: Budget) -> None:
    """Raise ValueError unless branches compared across trees exist and stand in one row."""
    far = [(i, b) for i, t in enumerate(group) for b in t.branches if b.across]
    for i, b in far:
        at = i + b.across
        if not 0 <= at < len(group) or not 1 <= b.mate <= len(group[at].branches):
            raise ValueError(
                f"record {group[i].name!r}: a branch names branch {b.mate} of tree {at} as its "
                f"mate; its group has {[len(t.branches) for t in group]} branches in its trees"
            )
    if far:  # slots are a row's own, so what is compared shares a row
        need = Size()
        for t in group:
            need = need.plus(size(t))
        check_fits(group[far[0][0]], budget, need=need)


def empty(budget: Budget, like: Tree | None) -> Batch:
    """A micro-batch of padding, for trees of the family of `like`."""
    B, T, S, M = budget.rows, budget.tokens, budget.scored, budget.branches
    E, Q, A = budget.frames, budget.patches, budget.chunks
    v = like.vision if like else Vision()
    C = 3 * v.temporal * v.patch**2

    def ints(*shape):
        return np.zeros((B, *shape), np.int32)

    def floats(*shape):
        return np.zeros((B, *shape), np.float32)

    return Batch(
        TokenBatch(ints(T), ints(3, T), ints(T), ints(T), ints(T), ints(S), ints(S), ints(S)),
        VisionBatch(np.zeros((B, E, Q, C), np.uint8), ints(E, Q, 2), ints(E, Q)),
        AudioBatch(floats(A, *(like.sound.shape[1:] if like else (0, 0))), ints(A), ints(A)),
        Branches(
            *(ints(M) - 1, ints(M) - 1, ints(M), ints(M), ints(M), ints(M)),
            *(floats(M), floats(M), floats(M)),
        ),
        floats(S),
        floats(S),
        floats(S),
    )


def _write(batch: Batch, row: int, at: Size, tree: Tree, mates: Sequence[int] = ()) -> None:
    """Write the tree into a row from `at` on; `mates` are its branches' slots of the row."""
    x, p, total = batch.tokens, len(tree.prompt), size(tree).tokens
    here = slice(at.tokens, at.tokens + p)
    x.tokens[row, here], x.positions[row, :, here] = tree.prompt, tree.positions
    x.end[row, here], x.depth[row, here] = at.tokens + total, np.arange(p)
    x.media[row, here] = _media_index(tree, at, batch.vision.window.shape[1:])
    first = at.frames
    for clip in tree.clips:
        e, q, _ = clip.patches.shape
        frames = slice(first, first := first + e)
        batch.vision.patches[row, frames, :q] = clip.patches
        batch.vision.coords[row, frames, :q] = clip.coords
        batch.vision.window[row, frames, :q] = clip.window
    chunks = slice(at.chunks, at.chunks + len(tree.sound))
    batch.audio.features[row, chunks] = tree.sound
    batch.audio.length[row, chunks], batch.audio.order[row, chunks] = tree.lengths, tree.order
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
        _write_column(batch.branches, row, column, b, mates[i])


def _write_column(table: Branches, row: int, column: int, b: Branch, mate: int) -> None:
    at = row, column
    table.record[at], table.pair[at], table.side[at] = b.record, b.pair, b.side
    table.branch[at], table.axis[at] = b.branch, b.axis
    table.mate[at] = mate
    table.weight[at], table.advantage[at], table.value[at] = b.weight, b.advantage, b.value


def _media_index(tree: Tree, at: Size, frames: tuple[int, int]) -> Int[np.ndarray, "p"]:
    """The tree's `seen` and `heard` as indices of the row, which has `frames` (E, Q) and where
    the tree's frames and chunks start at `at`."""
    E, Q = frames
    if Q % tree.vision.merge**2:
        raise ValueError(
            f"budget.patches is {Q}; {tree.vision.merge**2} patches merge into one token. Set it "
            f"to a multiple of {tree.vision.merge**2}."
        )
    slots = tree.vision.slots(Q)  # of a frame of the row, padding included
    where = [
        (at.frames + i) * slots + np.arange(clip.slots)
        for i, clip in enumerate(clip for clip in tree.clips for _ in clip.patches)
    ]
    where = 1 + np.concatenate([np.zeros(0, int), *where])
    index = np.where(tree.seen < 0, tree.seen, 0)
    index[tree.seen > 0] = where[tree.seen[tree.seen > 0] - 1]
    first = E * slots + at.chunks * tree.slots
    return np.where(tree.heard > 0, first + tree.heard, index)


def bucket(n: int, least: int = 32) -> int:
    """The least of `least` (a power of 2) times 1, 1.5, 2, 3, 4, ... that is at least n: two sizes
    an octave, so that a handful of shapes is compiled."""
    size = least
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def prompts(trees: Sequence[Tree], budget: Budget) -> tuple[TokenBatch, VisionBatch, AudioBatch]:
    """One prompt a row, in the order given, branches left out: what the sampler reads."""
    batch = rows([t._replace(branches=()) for t in trees], budget)
    return batch.tokens, batch.vision, batch.audio


def rows(trees: Sequence[Tree], budget: Budget) -> Batch:
    """One tree a row, in the order given; rows that are left over are padding."""
    if len(trees) > budget.rows:
        raise ValueError(
            f"{len(trees)} prompts for {budget.rows} rows; give at most {budget.rows} at a time"
        )
    batch = empty(budget, trees[0] if trees else None)
    for row, t in enumerate(trees):
        check_fits(t, budget)
        _write(batch, row, Size(), t, [b.mate for b in t.branches])
    return batch


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

"""The layout loses nothing, mixes nothing, and its one-integer mask is the tree's own relation.

Every test token is a number of its own, so where a token lies and what its path is can be checked
from the tree alone, without the code under test.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvid.data import layout, media
from jaxvid.data.layout import Branch, Budget, Size

# beartype draws from `random` when it checks a list, perhaps on another test's reader thread.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

VISION = media.Vision(patch=2, temporal=2, merge=2, window=8)
CHANNELS = 3 * 2 * 2 * 2
BUDGET = Budget(rows=4, tokens=48, scored=16, branches=8, frames=4, patches=24)


@st.composite
def shapes(draw):
    """Groups of (grid, text before the clip, text after, branches as (tokens, scored, parent))."""

    def tree():
        grid = draw(st.sampled_from([(0, 0, 0), (1, 2, 2), (2, 2, 4), (1, 4, 4), (2, 4, 6)]))
        before, after = draw(st.integers(0, 3)), draw(st.integers(1, 4))
        branches = []
        for i in range(draw(st.integers(0, 4))):
            flags = draw(st.lists(st.booleans(), min_size=1, max_size=4))
            branches.append((flags, draw(st.integers(0, i))))
        return grid, before, after, branches

    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    return [[tree() for _ in range(n)] for n in sizes]


def build(groups, first=1000):
    """Trees of the given shapes whose tokens and patches are all different numbers."""
    out, token = [], first
    for g, group in enumerate(groups):
        out.append([])
        for side, (grid, before, after, branches) in enumerate(group):
            t, h, w = grid
            features = t * h * w // 4
            n = before + features + after
            placeholders = (np.arange(n) >= before) & (np.arange(n) < before + features)
            patches = None
            if features:
                patches = np.full((t, h * w, CHANNELS), 7, np.uint8)
                marks = token + np.arange(t * h * w).reshape(t, h * w)
                patches[..., 0], patches[..., 1] = marks // 256 % 256, marks % 256
            prompt, token = np.arange(token, token + n), token + n
            made = []
            for i, (flags, parent) in enumerate(branches):
                tokens, token = np.arange(token, token + len(flags)), token + len(flags)
                flags = np.array(flags)
                made.append(
                    Branch(
                        tokens.astype(np.int32),
                        flags,
                        side=side,
                        branch=i,
                        axis=i % 4,
                        mate=1 if i else 0,
                        weight=0.5 + i,
                        advantage=float(token),
                        value=token / 1024,
                        old=tokens[flags] / 2.0,
                        sampled=tokens[flags] / 4.0,
                        parent=parent,
                    )
                )
            tree = layout.tree(
                f"r{g}",
                prompt.astype(np.int32),
                np.stack([np.arange(n), np.arange(n) % 5, np.arange(n) % 3]),
                VISION,
                clips=[layout.Clip(patches, grid)] if features else [],
                seen=layout.in_order(placeholders),
                branches=tuple(made),
            )
            out[-1].append(layout.numbered(tree, record=g, pair=10 * g))
    return out


def paths(tree):
    """Token -> the tokens from the tree's root to it, it included. By parents, not by order."""
    out = {t: tree.prompt[: i + 1].tolist() for i, t in enumerate(tree.prompt.tolist())}
    for b in tree.branches:
        above = tree.prompt if not b.parent else tree.branches[b.parent - 1].tokens
        for i, t in enumerate(b.tokens.tolist()):
            out[t] = out[int(above[-1])] + b.tokens[: i + 1].tolist()
    return out


@settings(max_examples=30, deadline=None)
@given(shapes())
def test_packing_loses_nothing_and_mixes_nothing(groups):
    groups = build(groups)
    batches = layout.pack(groups, BUDGET)
    trees = [t for group in groups for t in group]
    path = {k: v for t in trees for k, v in paths(t).items()}
    seen, scored = [], []
    for batch in batches:
        x = batch.tokens
        assert x.tokens.shape == (4, 48) and batch.vision.patches.shape == (4, 4, 24, CHANNELS)
        for row in range(4):
            used = np.flatnonzero(x.end[row])
            np.testing.assert_array_equal(used, np.arange(len(used)))  # padding is at the end
            assert not x.tokens[row, len(used) :].any()
            tokens = x.tokens[row, used].tolist()
            seen += tokens
            i, j = np.indices((48, 48))
            mask = (j <= i) & (i < x.end[row][None])
            explicit = np.zeros((48, 48), bool)
            for a, token in enumerate(tokens):
                explicit[a, [tokens.index(t) for t in path[token]]] = True
            np.testing.assert_array_equal(mask, explicit)
            np.testing.assert_array_equal(x.depth[row, used], [len(path[t]) - 1 for t in tokens])
            for source, target, slot in zip(x.sources[row], x.targets[row], x.slot[row]):
                if slot:
                    assert tokens[source] == path[target][-2]
                    scored.append((int(target), batch.branches.record[row, slot - 1]))
    assert sorted(seen) == sorted(path)
    wanted = [(t, b.record) for tree in trees for b in tree.branches for t in b.tokens[b.scored]]
    assert sorted(scored) == sorted(wanted)


@settings(max_examples=25, deadline=None)
@given(shapes())
def test_what_travels_with_a_token_is_its_trees(groups):
    groups = build(groups)
    batches = layout.pack(groups, BUDGET)
    for group in groups:
        for tree in group:
            (batch,) = [b for b in batches if (b.tokens.tokens == tree.prompt[0]).any()]
            x = batch.tokens
            ((row, at),) = np.argwhere(x.tokens == tree.prompt[0])
            here = slice(at, at + len(tree.prompt))
            np.testing.assert_array_equal(x.positions[row, :, here], tree.positions)
            last = tree.positions[:, -1].max()
            for i, b in enumerate(tree.branches):
                ((r, start),) = np.argwhere(x.tokens == b.tokens[0])
                assert r == row
                after = x.depth[row, start] - len(tree.prompt) + 1
                step = last + after + np.arange(len(b.tokens))
                got = x.positions[row, :, start : start + len(b.tokens)]
                np.testing.assert_array_equal(got, np.tile(step, (3, 1)))
                for s in np.flatnonzero(np.isin(x.targets[row], b.tokens)):
                    m = x.slot[row, s] - 1
                    assert [leaf[row, m] for leaf in batch.branches[:4]] == list(b[2:6])
                    assert batch.branches.axis[row, m] == b.axis
                    assert batch.branches.weight[row, m] == b.weight
                    assert batch.branches.advantage[row, m] == b.advantage
                    assert batch.branches.value[row, m] == b.value
                    assert batch.old[row, s] == x.targets[row, s] / 2.0
                    assert batch.sampled[row, s] == x.targets[row, s] / 4.0
                    mate = batch.branches.mate[row, m]
                    assert mate == (m + 1 - i if i else 0)  # the tree's first branch


@settings(max_examples=25, deadline=None)
@given(shapes())
def test_placeholders_point_at_their_own_patches(groups):
    groups = build(groups)
    batches = layout.pack(groups, BUDGET)
    per_frame = BUDGET.patches // 4
    found = 0
    for batch in batches:
        for row, at in np.argwhere(batch.tokens.media > 0):
            feature = batch.tokens.media[row, at] - 1
            frame, place = divmod(int(feature), per_frame)
            merged = slice(4 * place, 4 * place + 4)
            marks = batch.vision.patches[row, frame, merged, :2].astype(int) @ [256, 1]
            token = batch.tokens.tokens[row, at]
            (tree,) = [t for g in groups for t in g if token in t.prompt]
            index = int(np.flatnonzero(tree.prompt == token)[0] - np.argmax(tree.seen > 0))
            wanted = tree.clips[0].patches.reshape(-1, 4, CHANNELS)[index, :, :2].astype(int) @ [
                256,
                1,
            ]
            np.testing.assert_array_equal(marks, wanted)
            assert (batch.vision.window[row, frame, merged] > 0).all()
            found += 1
    assert found == sum((t.seen > 0).sum() for g in groups for t in g)
    patches = sum((b.vision.window > 0).sum() for b in batches)
    assert patches == sum(f.patches[..., 0].size for g in groups for t in g for f in t.clips)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.builds(
                Size,
                st.integers(1, 20),
                st.integers(0, 8),
                st.integers(0, 3),
                st.integers(0, 4),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=2,
        ),
        max_size=12,
    ),
    st.sampled_from([1, 2]),
)
def test_assignment_keeps_groups_together_within_every_bound(groups, shards):
    budget = Budget(rows=4, tokens=24, scored=10, branches=4, frames=5, patches=4, chunks=3)
    plan = layout.assign(groups, budget, shards=shards)
    assert sorted(g for micro in plan for g, _ in micro) == list(range(len(groups)))
    for micro in plan:
        used = [Size()] * 4
        for g, rows in micro:
            assert len({r // (4 // shards) for r in rows}) == 1  # one data shard
            total = np.sum(groups[g], axis=0)
            if (total <= budget.row).all():
                assert len(set(rows)) == 1
            for need, r in zip(groups[g], rows):
                used[r] = used[r].plus(need)
        assert all((np.array(u) <= budget.row).all() for u in used)
    # No two micro-batches are both less than half full, or first fit would have joined them.
    share = lambda n: max(np.divide(n, budget.row))
    heavy = [sum(share(n) for g, _ in micro for n in groups[g]) for micro in plan]
    assert sum(h <= 0.5 for h in heavy) <= 1


def test_rows_are_filled_by_hand():
    budget = Budget(rows=1, tokens=8, scored=9, branches=9, frames=9, patches=4)
    groups = [[Size(n, 1, 1, 1)] for n in (5, 3, 8, 2, 6, 8)]
    plan = layout.assign(groups, budget)
    assert [[g for g, _ in micro] for micro in plan] == [[2], [5], [4, 3], [0, 1]]
    # A pair that one row cannot hold takes two rows of one micro-batch.
    (micro,) = layout.assign([[Size(6), Size(7)]], Budget(rows=2, tokens=8, **REST))
    assert micro == [(0, [1, 0])]


REST = {"scored": 4, "branches": 4, "frames": 4, "patches": 4}


def test_a_row_drawn_by_hand():
    """The picture of batch.py: a prompt of 3, a prefix of 2 with two alternatives, a branch."""
    ids = lambda *x: np.array(x, np.int32)
    on = lambda n: np.ones(n, bool)
    tree = layout.tree(
        "r",
        ids(1, 2, 3),
        np.tile(np.array([0, 1, 4]), (3, 1)),
        VISION,
        branches=(
            Branch(ids(4, 5), ~on(2), weight=0.0),
            Branch(ids(6), on(1)),
            Branch(ids(7, 8), on(2), parent=1),
            Branch(ids(9), on(1), mate=3, parent=1),
        ),
    )
    budget = Budget(rows=1, tokens=10, scored=5, branches=4, frames=0, patches=0)
    (batch,) = layout.pack([[tree]], budget)
    x = batch.tokens
    np.testing.assert_array_equal(x.tokens[0], [1, 2, 3, 4, 5, 7, 8, 9, 6, 0])
    np.testing.assert_array_equal(x.end[0], [9, 9, 9, 8, 8, 7, 7, 8, 9, 0])
    np.testing.assert_array_equal(x.depth[0], [0, 1, 2, 3, 4, 5, 6, 5, 3, 0])
    np.testing.assert_array_equal(x.positions[0, 0], [0, 1, 4, 5, 6, 7, 8, 7, 5, 0])
    np.testing.assert_array_equal(x.targets[0], [6, 7, 8, 9, 0])
    np.testing.assert_array_equal(x.sources[0], [2, 4, 5, 4, 0])
    np.testing.assert_array_equal(x.slot[0], [2, 3, 3, 4, 0])
    np.testing.assert_array_equal(batch.branches.mate[0], [0, 0, 0, 3])
    np.testing.assert_array_equal(batch.branches.weight[0], [0, 1, 1, 1])


def test_packing_is_deterministic():
    groups = build([[((1, 4, 4), 1, 2, [([True], 0)])] * 2] * 5)
    first, again = layout.pack(groups, BUDGET), layout.pack(groups, BUDGET)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_tree_too_large_is_named_with_the_setting():
    ((tree,),) = build([[((2, 4, 6), 1, 1, [([True] * 4, 0)] * 3)]])
    for field, limit in (("tokens", 20), ("scored", 11), ("branches", 2), ("frames", 1)):
        tight = Budget(**{**vars(BUDGET), field: limit})
        with pytest.raises(ValueError, match=rf"record 'r0'.*a row holds {limit}.*budget.{field}"):
            layout.pack([[tree]], tight)
    with pytest.raises(ValueError, match="24 patches; the batch holds 8.*budget.patches"):
        layout.pack([[tree]], Budget(**{**vars(BUDGET), "patches": 8}))
    with pytest.raises(ValueError, match="2 trees that must stay together.*budget.rows"):
        layout.assign([[Size(6), Size(7)]], Budget(rows=1, tokens=8, **REST))
    with pytest.raises(ValueError, match="26 patches|multiple of 4|26; 4 patches"):
        layout.pack([[tree]], Budget(**{**vars(BUDGET), "patches": 26}))
    with pytest.raises(ValueError, match="4 rows do not divide over 3"):
        layout.assign([], BUDGET, shards=3)


def test_a_tree_that_does_not_hang_together_is_refused():
    ids, positions = np.arange(3, dtype=np.int32), np.zeros((3, 3), np.int32)
    patches = np.zeros((1, 4, CHANNELS), np.uint8)
    with pytest.raises(ValueError, match="2 media placeholders .* give 1 vision features"):
        clips, two = [layout.Clip(patches, (1, 2, 2))], np.array([1, 2, 0])
        layout.tree("r", ids, positions, VISION, clips=clips, seen=two)
    with pytest.raises(ValueError, match="names vision features up to 3"):
        layout.tree("r", ids, positions, VISION, clips=clips, seen=np.array([0, 3, 0]))
    with pytest.raises(ValueError, match="1 media placeholders .* give 0 sound slots"):
        layout.tree("r", ids, positions, VISION, heard=np.array([1, 0, 0]))
    for branch, fault in (
        (Branch(ids, np.ones(2, bool)), "2 scored flags"),
        (Branch(ids, np.ones(3, bool), parent=1), "parent 1"),
        (Branch(ids, np.ones(3, bool), mate=2), "mate 2"),
        (Branch(ids, np.ones(3, bool), old=np.zeros(2)), "2 numbers in 'old' for 3"),
    ):
        with pytest.raises(ValueError, match=rf"record 'r', branch 0: .*{fault}"):
            layout.tree("r", ids, positions, VISION, branches=(branch,))
    with pytest.raises(ValueError, match="3 x 2 patches does not divide"):
        layout.window_layout((1, 3, 2), VISION)


def test_text_after_a_clip_sets_where_branches_start():
    """Where the clip's times run past the text after it, the text counts and not the maximum."""
    positions = np.array([[0, 9, 3], [0, 1, 3], [0, 1, 3]])
    flags = np.array([False, True, False])
    tree = layout.tree(
        "r",
        np.arange(3, dtype=np.int32),
        positions,
        VISION,
        clips=[layout.Clip(np.zeros((1, 4, CHANNELS), np.uint8), (1, 2, 2))],
        seen=layout.in_order(flags),
    )
    assert layout.next_position(tree) == 4


def test_prompts_one_a_row_without_branches():
    groups = build([[((1, 2, 2), 1, 2, [([True], 0)])], [((0, 0, 0), 0, 3, [])]])
    rows = lambda n, tokens: Budget(
        rows=n, tokens=tokens, scored=0, branches=0, frames=2, patches=4
    )
    tokens, vision, _ = layout.prompts([t for g in groups for t in g], rows(3, 8))
    np.testing.assert_array_equal((tokens.end > 0).sum(1), [4, 3, 0])
    np.testing.assert_array_equal(tokens.end[0, :4], 4)
    np.testing.assert_array_equal(tokens.tokens[1, :3], groups[1][0].prompt)
    np.testing.assert_array_equal(tokens.media[0], [0, 1, 0, 0, 0, 0, 0, 0])
    assert tokens.sources.shape == (3, 0) and vision.patches.shape == (3, 2, 4, CHANNELS)
    with pytest.raises(ValueError, match="2 prompts for 1 rows"):
        layout.prompts([g[0] for g in groups], rows(1, 8))
    with pytest.raises(ValueError, match="record 'r0'.*budget.tokens"):
        layout.prompts([groups[0][0]], rows(1, 3))


def test_stack_pads_with_empty_micro_batches():
    groups = build([[((2, 4, 6), 1, 2, [([True], 0)])]] * 17)
    batches = layout.pack(groups, BUDGET)
    assert len(batches) == 3  # two clips of 2 frames in each of 4 rows
    for multiple, count in ((0, 4), (1, 3), (2, 4), (5, 5)):
        out = layout.stack(batches, multiple)
        assert out.tokens.tokens.shape == (count, 4, 48)
        jax.tree.map(
            lambda leaf, *parts: np.testing.assert_array_equal(leaf[:3], np.stack(parts)),
            out,
            *batches,
        )
        assert not out.tokens.end[3:].any() and not out.branches.weight[3:].any()
        assert (out.branches.record[3:] == -1).all() and (out.branches.pair[3:] == -1).all()
    with pytest.raises(ValueError, match="no micro-batches"):
        layout.stack([])


@pytest.mark.parametrize("grid", [(2, 6, 6), (1, 4, 4), (3, 8, 10), (1, 2, 14), (2, 16, 12)])
@pytest.mark.parametrize("window", [8, 12, 16])
def test_window_layout_is_hugging_faces(grid, window):
    torch = pytest.importorskip("torch", reason="transformers' own window index is the oracle")
    from transformers import vision_utils

    grids = torch.tensor([grid])
    vision = media.Vision(patch=2, temporal=2, merge=2, window=window)
    coords, windows = layout.window_layout(grid, vision)
    positions = vision_utils.get_vision_position_ids(grids, 2).numpy()
    np.testing.assert_array_equal(np.tile(coords, (grid[0], 1)), positions)
    index, ends = vision_utils.get_vision_window_index(grids, 2, window, 2)
    of_patch = np.zeros(np.prod(grid), int)  # the oracle's window of each patch, in merge order
    patches = (4 * index.numpy()[:, None] + np.arange(4)).reshape(-1)
    for w, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist())):
        of_patch[patches[a:b]] = w
    ours = np.concatenate([windows + frame * (windows.max() + 1) for frame in range(grid[0])])
    np.testing.assert_array_equal(of_patch[:, None] == of_patch, ours[:, None] == ours)

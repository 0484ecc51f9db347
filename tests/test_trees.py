"""A row of a tree is the separate sequences: log-probs and parameter gradients, whatever stands
beside it and wherever padding stands.

Rows are made by data.layout alone, of the real model's classes, in one shape: one compiled function
serves the properties.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import QUICK
from qwen import CFG, VIDEO, fresh

from jaxvid import score, sharding
from jaxvid.batch import Batch, Scores, TokenBatch
from jaxvid.data import layout, media
from jaxvid.models import decoder, hf, qwen25vl
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.ops import _flash
from jaxvid.ops import attention as attention_module
from jaxvid.ops.attention import attention
from jaxvid.train import optimizers, step
from jaxvid.train import state as states

# beartype draws from `random` when it checks a list, perhaps on another test's reader thread.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
# Lengths that no other axis has, so that they can be told in a jaxpr.
ROWS, T, S = 8, 61, 29
BUDGET = layout.Budget(rows=1, tokens=T, scored=S, branches=7, frames=5, patches=16)
NONE, SMALL, CLIP = (0, 0, 0), (1, 4, 2), (2, 4, 4)
WINDOW = 5  # shorter than a clip and than some branches


def grow(record, shape, *, grid=NONE, text=(2, 3), policy="max", side=0):
    """A prompt (text, clip, text) and a branch for each (length, parent) of `shape`. `old` is the
    weight of each scored token in the sums that are differentiated."""
    rng = np.random.default_rng(record)
    ids = lambda n: rng.integers(6, 64, n).astype(np.int32)
    around = lambda mean, n: rng.normal(mean, 1, n).astype(np.float32)
    prompt = np.concatenate([ids(text[0]), np.full(np.prod(grid) // 4, VIDEO), ids(text[1])])
    branches = []
    for i, (n, parent) in enumerate(shape):
        flags = rng.random(n) < 0.7
        flags[rng.integers(n)] = True
        n_scored = int(flags.sum())
        branches.append(
            layout.Branch(
                ids(n),
                flags,
                record=record,
                pair=record // 2,
                side=side,
                branch=i,
                mate=1 if i else 0,
                axis=i % 4,
                weight=[1.0, 0.5, 0.0][i % 3],
                advantage=float(rng.normal()),
                old=around(0.0, n_scored),
                ref=around(-4.0, n_scored),
                sampled=around(-4.0, n_scored),
                parent=parent,
            )
        )
    grids, seconds = ([], []) if grid == NONE else ([grid], [1.5])
    fractional = policy == "hf5"
    positions = qwen25vl.positions(
        prompt, grids, seconds, CFG, text_after_video=policy, fractional_seconds=fractional
    )
    frames = rng.integers(0, 256, (grid[0], grid[1] * grid[2], 96), np.uint8)
    return layout.tree(
        f"record {record}",
        prompt,
        positions,
        VISION,
        clips=[] if grid == NONE else [layout.Clip(frames, grid)],
        seen=layout.in_order(prompt == VIDEO),
        branches=tuple(branches),
    )


def apart(tree):
    """A tree of one branch for each branch: what stands above it, unscored, and itself."""
    for b in tree.branches:
        tokens, scored, parent = b.tokens, b.scored, b.parent
        while parent:
            above = tree.branches[parent - 1]
            tokens = np.concatenate([above.tokens, tokens])
            scored = np.concatenate([np.zeros(len(above.tokens), bool), scored])
            parent = above.parent
        one = b._replace(tokens=tokens, scored=scored, parent=0, mate=0)
        yield tree._replace(branches=(one,))


def rows(groups):
    """A batch with one group of trees a row, and rows of padding."""
    micro = [layout.pack([group], BUDGET) for group in groups]
    assert all(len(m) == 1 for m in micro) and len(micro) <= ROWS
    return jax.tree.map(lambda x: x[:, 0], layout.stack([m[0] for m in micro], ROWS))


def branches(values, batch):
    """(record, branch) -> its numbers among values [B, S]."""
    table, values = batch.branches, np.asarray(values)
    return {
        (int(table.record[r, m]), int(table.branch[r, m])): values[r][batch.tokens.slot[r] == m + 1]
        for r, m in np.argwhere(table.record >= 0)
    }


@functools.cache
def compiled(window=0):
    """(parameters, batch) -> (sum of `old` x log-prob, scores), and the sum's gradient."""
    graph = fresh(window=window).graph

    def weighted(params, batch):
        scores = score.score(nnx.merge(graph, params), batch.tokens, batch.vision)
        return jnp.where(batch.tokens.slot > 0, batch.old * scores.logp, 0.0).sum(), scores

    return jax.jit(jax.value_and_grad(weighted, has_aux=True), compiler_options=QUICK)


def evaluate(groups, window=0):
    """(log-probs by branch, gradient of their weighted sum)."""
    batch = rows(groups)
    (_, scores), grads = compiled(window)(fresh().params, batch)
    return branches(scores.logp, batch), grads


def assert_equal(got, want):
    """Gradients by the largest number of each parameter's own."""
    (logp, grads), (logp_apart, grads_apart) = got, want
    assert logp.keys() == logp_apart.keys()
    for key, one in logp_apart.items():
        assert len(one)
        np.testing.assert_allclose(logp[key], one, atol=1e-5, rtol=0, err_msg=str(key))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for (path, a), b in zip(leaves, jax.tree.leaves(grads_apart), strict=True):
        atol, name = 1e-5 * np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=name)


# --- a tree is its separate sequences


# pDPO: a step's prefix, two alternatives, rollouts behind one of them
DEEP = ((3, 0), (4, 1), (2, 1), (5, 2), (3, 2))
CASES = {
    "text": lambda: [[grow(1, ((4, 0), (7, 0), (1, 0)))]],
    "video, positions of 4.x": lambda: [[grow(2, ((4, 0), (7, 0)), grid=CLIP)]],
    "video, positions of 5.x": lambda: [[grow(3, ((4, 0), (7, 0)), grid=CLIP, policy="hf5")]],
    "two trees in a row": lambda: [
        [grow(4, ((6, 0), (2, 0), (3, 0)), grid=CLIP), grow(5, ((1, 0), (8, 0)), grid=SMALL)]
    ],
    "three deep": lambda: [
        [grow(6, DEEP, grid=CLIP), grow(7, ((2, 0), (3, 1)), grid=SMALL, policy="hf5")]
    ],
}


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("case", CASES)
def test_a_tree_is_its_separate_sequences(case, window):
    groups = CASES[case]()
    alone = [[one] for group in groups for t in group for one in apart(t)]
    assert_equal(evaluate(groups, window), evaluate(alone, window))


@st.composite
def forests(draw):
    """One or two trees for a row, three deep at the most."""

    def tree(record):
        shape, level = [], [0]
        for _ in range(draw(st.integers(1, 4 - record))):
            parent = draw(st.sampled_from([i for i, n in enumerate(level) if n < 3]))
            shape.append((draw(st.integers(1, 5)), parent))
            level.append(level[parent] + 1)
        return grow(
            record,
            tuple(shape),
            grid=draw(st.sampled_from([NONE, SMALL, CLIP])),
            text=(draw(st.integers(0, 3)), draw(st.integers(1, 3))),
            policy=draw(st.sampled_from(["max", "hf5"])),
        )

    return [tree(record) for record in range(draw(st.integers(1, 2)))]


@settings(max_examples=8, deadline=None)
@given(forests(), st.sampled_from([0, WINDOW]))
def test_any_trees_are_their_separate_sequences(trees, window):
    alone = [[one] for t in trees for one in apart(t)]
    assert_equal(evaluate([trees], window), evaluate(alone, window))


def siblings(x, at):
    return x._replace(end=np.where(x.end > 0, x.end.max(1, keepdims=True), 0))


def in_a_line(x, at):
    return x._replace(depth=np.where(x.end > 0, np.arange(T, dtype=np.int32)[None], 0))


def moved_on(x, at):
    later = np.where(np.arange(T) >= at, 4, 0).astype(np.int32)
    return x._replace(positions=x.positions + later[None, None])


def after_its_sibling(x, at):
    first = np.cumsum(x.slot == 2, 1) == 1  # until the second of the branch, and what follows is 0
    return x._replace(sources=np.where(first & (x.slot == 2), at - 1, x.sources))


@pytest.mark.parametrize("fault", [siblings, in_a_line, moved_on, after_its_sibling])
def test_a_fault_in_the_layout_would_be_seen(fault):
    """What the properties above would say of a layout with each of four faults."""
    tree = grow(8, ((4, 0), (7, 0)), grid=CLIP)
    all_scored = tuple(
        layout.Branch(b.tokens, b.tokens > 0, 8, branch=b.branch) for b in tree.branches
    )
    batch, at = rows([[tree._replace(branches=all_scored)]]), len(tree.prompt) + 4
    found = []
    for tokens in (batch.tokens, fault(batch.tokens, at)):
        (_, scores), _ = compiled(WINDOW)(fresh().params, batch._replace(tokens=tokens))
        found.append(branches(scores.logp, batch))
    np.testing.assert_array_equal(found[0][8, 0], found[1][8, 0])
    assert np.abs(found[0][8, 1] - found[1][8, 1]).max() > 1e-2


def test_the_unembedding_meets_scored_positions_alone():
    """Forward and backward: [rows S, V] and never rows x T x V, in whatever order."""
    batch, params = rows(CASES["two trees in a row"]()), fresh().params
    program = str(compiled().trace(params, batch).jaxpr)
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"\[(\d+(?:,\d+)+)\]", program)}
    V = CFG.text.vocab
    assert (ROWS * S, V) in shapes and (ROWS, T, CFG.text.width) in shapes
    assert not [x for x in shapes if T in x and V in x]
    assert max(np.prod(x) for x in shapes if V in x) <= ROWS * S * V


# --- one mask: where padding stands and who stands beside a tree does not matter


def moved(batch, tokens, scored, columns, frames):
    """The batch with that much of the padding of every row moved to its front."""
    x, seen, table = batch.tokens, batch.vision, batch.branches
    merged = frames * BUDGET.patches // 4
    on = lambda a, n: np.where(a > 0, a + n, a).astype(np.int32)
    sources = np.where(x.slot > 0, x.sources + tokens, 0).astype(np.int32)
    x = x._replace(
        end=on(x.end, tokens), media=on(x.media, merged), sources=sources, slot=on(x.slot, columns)
    )
    roll = lambda n: lambda a: np.roll(a, n, axis=-1)
    last = 3  # sources, targets and slot come last
    x = (*map(roll(tokens), x[:-last]), *map(roll(scored), x[-last:]))
    table = table._replace(mate=on(table.mate, columns))
    of_scored = map(roll(scored), (batch.old, batch.ref, batch.sampled))
    return Batch(
        TokenBatch(*x),
        jax.tree.map(lambda a: np.roll(a, frames, axis=1), seen),
        batch.audio,
        jax.tree.map(roll(columns), table),
        *of_scored,
    )


@functools.cache
def pairs():
    """Two duality pairs: each tree a prompt with one accepted and two rejected branches, the last
    a step further on. Packed, alone, and both with padding at the front: the trees are the same."""
    shape = ((3, 0), (5, 0), (2, 0), (2, 1))
    trees = [
        grow(i, shape[: 3 + i % 2], grid=[CLIP, SMALL][i % 2], text=(i % 2, 2), side=i % 2)
        for i in range(4)
    ]
    alone, packed = rows([[t] for t in trees]), rows([trees[:2], trees[2:]])
    front = moved(alone, 23, 11, 3, 2), moved(packed, 1, 2, 0, 1)
    return {"alone": alone, "packed": packed, "front": front[0], "packed, front": front[1]}


@functools.cache
def scored_pairs(window=0):
    """Of each layout of the pairs, (scores, gradient of the weighted sum)."""
    of = lambda batch: compiled(window)(fresh().params, batch)
    return {name: (s, g) for name, b in pairs().items() for (_, s), g in [of(b)]}


@pytest.mark.parametrize("window", [0, WINDOW])
def test_padding_and_company_change_no_log_prob_and_no_gradient(window):
    every = {
        name: (branches(scores.logp, pairs()[name]), grads)
        for name, (scores, grads) in scored_pairs(window).items()
    }
    for got in every.values():
        assert_equal(got, every["alone"])


IMPLEMENTATIONS = {
    "_attend": {},
    "_triangle": {"SHORT": 8},
    "_blocks": {"LONG": 32, "BLOCK": 16},
    "flash": {},
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_of_attention_gives_the_same_anywhere(name, monkeypatch):
    scores, _ = scored_pairs(WINDOW)["alone"]
    want, used = branches(scores.logp, pairs()["alone"]), []
    for constant, value in IMPLEMENTATIONS[name].items():
        monkeypatch.setattr(attention_module, constant, value)
    if name == "flash":
        monkeypatch.setattr(_flash, "TILE", 128)
        monkeypatch.setattr(decoder, "attention", functools.partial(attention, impl="interpret"))
    real = vars(attention_module)[name]
    monkeypatch.setattr(attention_module, name, lambda q, *a: used.append(q.shape) or real(q, *a))
    graph = fresh(window=WINDOW).graph
    run = jax.jit(
        lambda params, b: score.score(nnx.merge(graph, params), b.tokens, b.vision).logp,
        compiler_options=QUICK,
    )
    for batch in pairs().values():
        got = branches(run(fresh().params, batch), batch)
        assert got.keys() == want.keys()
        for key, one in want.items():
            np.testing.assert_allclose(got[key], one, atol=1e-5, rtol=0, err_msg=str(key))
    assert (ROWS, T, CFG.text.heads, CFG.text.head) in used


OBJECTIVES = [
    SFT(),
    SFT("branch"),
    DPO(axis_weights=(0.5, 2.0, 3.0), ce_weight=0.1),
    *(DPO(kind=kind) for kind in ("ipo", "hinge", "sigmoid_norm")),
    *(DPO(kind=kind, label_smoothing=0.1) for kind in ("conservative", "robust")),
    Policy(kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0),
    Policy(aggregation="group_token"),
    Policy(aggregation="sequence"),
    Policy(aggregation="fixed", fixed_length=4),
    Policy(ratio="sequence", kl_coef=0.1, kl_kind="k2"),
    Policy(clip="weight", dual_clip=None, kl_coef=0.1, kl_kind="k1"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_losses_do_not_know_where_padding_stands(objective):
    """Numerator, denominator, every metric, and the gradient to each log-prob."""

    def loss(logp, entropy, batch):
        value = objective(Scores(logp, entropy), batch)
        return value.numerator, value

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    results = {}
    for name, (scores, _) in scored_pairs().items():
        grad, value = run(*scores, pairs()[name])
        assert not np.asarray(grad)[pairs()[name].tokens.slot == 0].any()
        results[name] = (value, branches(grad, pairs()[name]))
    assert results["alone"][0].denominator > 0 and results["alone"][0].numerator
    for got in results.values():
        jax.tree.map(close, got, results["alone"])


@pytest.mark.parametrize("window", [0, 40])
def test_the_kernel_with_padding_before_between_and_behind(window, monkeypatch):
    """Rows of three tiles: the same two trees at the start, and with gaps that fill a tile."""
    monkeypatch.setattr(_flash, "TILE", 128)
    small, large = [60] * 20 + [40] * 20 + [60] * 20, [90] * 50 + [90] * 40
    q, k, v = (normal(i, 150, heads, 8) for i, heads in enumerate((4, 2, 2)))

    def spread(x, first, second):
        """The two trees' parts of x [150, ...] from index `first` and `second` of 384."""
        out = np.zeros((1, 384, *x.shape[1:]), x.dtype)
        out[0, first : first + 60], out[0, second : second + 90] = x[:60], x[60:]
        return out

    @functools.partial(jax.jit, static_argnums=0)
    def both(impl, end, depth, weight, *x):
        path = {"depth": depth, "window": window} if window else {}
        y, pull = jax.vjp(lambda *x: attention(*x, end=end, impl=impl, **path), *x)
        return y, *pull(weight)

    def run(impl, first, second):
        at = lambda x: spread(np.asarray(x), first, second)
        end = np.array([x + first for x in small] + [x + second for x in large], np.int32)
        depth = np.array([*range(40), *range(20, 40), *range(90)], np.int32)
        got = both(impl, at(end), at(depth), at(np.cos(q)), at(q), at(k), at(v))
        pick = lambda x: np.concatenate([x[0, first : first + 60], x[0, second : second + 90]])
        return jax.tree.map(pick, got)

    want = run("xla", 0, 60)
    for places in ((0, 60), (140, 290), (70, 294)):
        close(run("interpret", *places), want, 1e-5)


# --- on a mesh


MESH = {"fsdp": 2, "tensor": 4}  # two kv heads do not divide: replicated


def test_trees_on_eight_devices_are_those_of_one():
    mesh, name, params = sharding.make_mesh(**MESH), "packed", fresh().params
    with jax.set_mesh(mesh):
        batch = jax.device_put(pairs()[name], sharding.row_sharding(mesh, ROWS))
        spread = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        (_, scores), grads = compiled()(spread, batch)
    assert not scores.logp.is_fully_replicated
    of = lambda scores, grads: (branches(scores.logp, pairs()[name]), grads)
    assert_equal(of(scores, grads), of(*scored_pairs()[name]))


def test_the_step_pins_activations_forward_and_backward():
    """What runs here under a mesh is what runs on a pod: the decoder's and the tower's activations
    are pinned to the rows' axes in the program itself, each in both passes."""
    graph, shapes = hf.abstract(CFG)
    tx = optimizers.AdamW(lr=1e-3).build(2, shapes)
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), pairs()["packed"])
    train_step = step.make_step(graph, SFT(), tx)
    with jax.set_mesh(sharding.make_mesh(**MESH)):
        state = jax.eval_shape(lambda p: states.create(p, tx), shapes)
        program = train_step.lower(state, data).as_text()
    frames = ROWS * BUDGET.frames
    for shape in (f"{ROWS}x{T}x{CFG.text.width}", f"{frames}x16x{CFG.vision.width}"):
        pinned = rf'sharding_constraint .*\[{{"fsdp"}}, .*: tensor<{shape}xf32>'
        assert len(re.findall(pinned, program)) >= 2, shape

"""DPO from trees to gradient: several rejected replies a row, also about another clip, against a
computation by hand on separate sequences; on eight devices; and mixtures of preferences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pairs
import pytest
from flax import nnx
from prompts import QUICK
from qwen import fresh
from test_trees import CLIP, MESH, ROWS, SMALL, apart, branches, compiled, grow, rows

from jaxvid import score, sharding
from jaxvid.data import pipeline, records, shards
from jaxvid.data.records import Response
from jaxvid.objectives.preference import DPO
from jaxvid.train import step

# beartype draws from `random` when it checks a list, perhaps on another test's reader thread.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

BETA, AXES = 0.5, (1.0, 0.5, 2.0, 3.0)  # weight of no axis, spatial, temporal, cross-frame
OBJECTIVE = DPO(beta=BETA, axis_weights=AXES[1:])


def groups():
    """One clip with a chosen and three rejected replies, of which the words of the first are also
    rejected on another clip (its weight is 0.5); and a tree of its own with two rejected."""
    one = grow(1, ((4, 0), (5, 0), (3, 0), (4, 0)), grid=CLIP)
    words = one.branches[0]
    far = grow(2, ((4, 0),), grid=SMALL)
    there = far.branches[0]._replace(
        tokens=words.tokens, scored=words.scored, ref=words.ref - 0.5, mate=1, across=-1, weight=0.5
    )
    two = grow(3, ((2, 0), (3, 0), (6, 0)))
    kept = tuple(b._replace(weight=1.0) for b in one.branches)  # `grow` gives one of three none
    return [[one._replace(branches=kept), far._replace(branches=(there,))], [two]]


PAIRS = [  # (rejected, its chosen), each (record, branch), with weight and axis
    ((1, 1), (1, 0), 1.0, 1),
    ((1, 2), (1, 0), 1.0, 2),
    ((1, 3), (1, 0), 1.0, 3),
    ((2, 0), (1, 0), 0.5, 0),
    ((3, 1), (3, 0), 0.5, 1),
]  # and the last of record 3, which weighs nothing


def unpaired(sequence):
    return sequence._replace(branches=tuple(b._replace(across=0) for b in sequence.branches))


def by_hand(weighted, params):
    """(loss, margins by pair) of log-probs of one sequence a row."""
    alone = rows([[unpaired(s)] for g in groups() for t in g for s in apart(t)])
    _, scores = weighted(params, jax.tree.map(jnp.asarray, alone))
    at = {}  # of a branch: its row and column
    for r, m in np.argwhere(alone.branches.record >= 0):
        name = int(alone.branches.record[r, m]), int(alone.branches.branch[r, m])
        at[name] = r, alone.tokens.slot[r] == m + 1
    ratio = {}
    for name, (r, here) in at.items():
        ratio[name] = jnp.where(here, scores.logp[r] - alone.ref[r], 0.0).sum()
    total, weight, margins = 0.0, 0.0, []
    for rejected, chosen, w, axis in PAIRS:
        margin = BETA * (ratio[chosen] - ratio[rejected])
        total, weight = total + w * AXES[axis] * jnp.log1p(jnp.exp(-margin)), weight + w
        margins.append(margin)
    return total / weight, jnp.stack(margins)


def mean(graph):
    inner = step.make_loss(graph, OBJECTIVE, 1.0)

    def loss(params, batch):
        _, found = inner(params, batch)
        return found.numerator / found.denominator, found

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


@pytest.fixture(scope="module")
def trees():
    """The batch of trees, its loss and gradient."""
    loaded, batch = fresh(), rows(groups())
    return batch, mean(loaded.graph)(loaded.params, batch)


def same(got, want):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
        atol, name = 1e-5 * np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=name)


def test_a_batch_of_trees_is_its_separate_sequences(trees):
    _, ((got, loss), grads) = trees
    weighted = lambda params, batch: compiled()(params, batch)[0]
    want, margins = by_hand(weighted, fresh().params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    told = {name: s / n for name, (s, n) in loss.metrics.items()}
    np.testing.assert_allclose(told["rewards/margins"], margins.mean(), rtol=1e-4)
    right = np.asarray(margins) > 0
    np.testing.assert_allclose(told["rewards/accuracies"], right.mean(), rtol=1e-6)
    for axis, name in enumerate(("spatial", "temporal", "crossframe"), 1):
        of = [i for i, pair in enumerate(PAIRS) if pair[3] == axis]
        np.testing.assert_allclose(
            told[f"rewards/margins/{name}"], np.mean([margins[i] for i in of]), rtol=1e-4
        )
        np.testing.assert_allclose(told[f"rewards/accuracies/{name}"], np.mean(right[of]))
        assert loss.metrics[f"rewards/margins/{name}"][1] == len(of)
    graph = fresh().graph

    def plain(params, batch):
        scores = score.score(nnx.merge(graph, params), batch.tokens, batch.vision)
        return None, scores

    alone = jax.jit(jax.grad(lambda p: by_hand(plain, p)[0]), compiler_options=QUICK)
    same(grads, alone(fresh().params))


def test_eight_devices_give_what_one_gives(trees):
    batch, ((want, _), grads) = trees
    loaded, mesh = fresh(), sharding.make_mesh(**MESH)
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, sharding.row_sharding(mesh, ROWS))
        where = sharding.parameter_shardings(loaded.params, mesh)
        (got, _), spread = mean(loaded.graph)(jax.device_put(loaded.params, where), placed)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    same(spread, grads)


def test_the_hand_meets_every_pair_of_the_batch(trees):
    """What is written out above is all that the batch compares."""
    batch, _ = trees
    table = batch.branches
    name = lambda r, m: (int(table.record[r, m]), int(table.branch[r, m]))
    found = [
        (name(r, m), name(r, table.mate[r, m] - 1), table.weight[r, m], table.axis[r, m])
        for r, m in np.argwhere((table.mate > 0) & (table.weight > 0))
    ]
    assert sorted(found) == sorted(PAIRS)
    assert branches(batch.ref, batch).keys() >= {p[0] for p in PAIRS}


def preference(i, name, axis):
    said = Response("it gets brighter", "chosen"), Response("it gets darker", "rejected", axis)
    example = records.Example("p", "preference", 0, "What happens?", (), "", said)
    made = dataclasses.replace(pairs.record(i, split="train"), examples=(example,))
    return dataclasses.replace(made, id=f"{name} {i}")


def test_a_mixture_of_preferences_holds_its_weights_and_tells_its_axes(tmp_path):
    """Two sources, 3 : 1, whatever their sizes; each on an axis, which the batch carries."""
    pairs.write(tmp_path, [preference(i, "near", "spatial") for i in range(2)], split="train")
    other = [preference(i, "far", "temporal") for i in range(6)]
    shards.write(tmp_path / "more", other, split="train")
    builder = pairs.builder(tmp_path, "train")
    data = dataclasses.replace(
        builder.data,
        shards=(*builder.data.shards, str(tmp_path / "more")),
        weights=(3.0, 1.0),
        tasks=("preference",),
        pairs=4,
    )
    ids = [pipeline.update_ids(data, 0, n) for n in range(6)]
    assert all(sum(i.startswith("near") for i in update) == 3 for update in ids)
    batches = iter(pipeline.batches(data, dataclasses.replace(builder, data=data), 0))
    batch = next(batches)
    axes = batch.branches.axis[batch.branches.mate > 0]
    assert sorted(axes) == [1, 1, 1, 2]

"""The train step: by hand, cut into micro-batches, over devices, and when it fails."""

import jax
import numpy as np
import optax
import pytest
from toy import assert_same, batch, compiled, mesh_of, row, small, toy

from jaxvid.models import hf
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.train import checkpoint, loop, optimizers, step
from jaxvid.train import state as states


def test_step_learns_and_counts():
    _, tx, train_step = compiled()
    state, data, losses = states.create(toy()[1], tx), batch([1, 2], rows=2), []
    for _ in range(6):
        state, values = train_step(state, data)
        losses.append(float(values["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert int(values["num_tokens"]) == 2 * (5 + 2 * 4)
    assert int(state.step) == int(values["optimizer_step"]) == 6


def test_step_by_hand():
    """The reported norm is the gradient's before clipping, and AdamW's first step is its sign."""
    graph, params = toy()
    data = batch([1, 2, 3], rows=1)
    data.branches.weight[1] = 0.5

    def loss(p):
        of = step.make_loss(graph, SFT(), 1.0)
        parts = [of(p, row(data, i))[1] for i in range(3)]
        return sum(x.numerator for x in parts) / sum(x.denominator for x in parts)

    value, grads = jax.value_and_grad(loss)(params)
    _, tx, train_step = compiled()
    before = jax.tree.map(np.array, params)
    state, values = train_step(states.create(params, tx), data)
    np.testing.assert_allclose(values["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(values["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, state.params, before)
    sure = lambda g: np.abs(g) > 1e-3
    for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(moved)):
        np.testing.assert_allclose(m[sure(g)], -1e-2 * np.sign(g)[sure(g)], rtol=1e-2)


@pytest.mark.parametrize(
    "objective", [SFT(), DPO(), Policy(kl_coef=0.1)], ids=lambda o: type(o).__name__
)
def test_cutting_a_batch_changes_nothing(objective):
    """A step on 1 micro-batch of 4 rows, on 2 of 2, on 4 of 1, and on those and an empty one gives
    the same parameters, with unequal weights."""
    rng, tx = np.random.default_rng(0), optax.sgd(0.5)
    old, ref, sampled = rng.normal(-4, 1, (3, 4, 8)).astype(np.float32)
    advantage = rng.normal(size=(4, 2)).astype(np.float32)
    weight = np.float32([[1, 1], [0.5, 0.5], [1, 0], [1, 2]])
    train_step, results = step.make_step(toy()[0], objective, tx), []
    for rows in (4, 2, 1, 0):
        data = batch([1, 2, 3, 4], rows or 1, mates=True)
        cut = lambda x, like: x.reshape(like.shape)
        table = data.branches
        table = table._replace(
            weight=cut(weight, table.weight), advantage=cut(advantage, table.weight)
        )
        numbers = {k: cut(x, data.old) for k, x in dict(old=old, ref=ref, sampled=sampled).items()}
        data = data._replace(branches=table, **numbers)
        if not rows:
            data = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), data)
        state, values = train_step(states.create(toy()[1], tx), data)
        results.append((jax.tree.map(np.array, state.params), values))
    params, values = results[0]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, toy()[1])
    assert min(jax.tree.leaves(moved)) > 1e-3
    for other, also in results[1:]:
        assert_same(params, other, rtol=0, atol=1e-6)
        for name in ("loss", "grad_norm", "num_tokens"):
            np.testing.assert_allclose(also[name], values[name], rtol=1e-5)


def test_scores_keep_the_batchs_shape():
    graph, params = toy()
    score, data = step.make_score(graph), batch([1, 2, 3, 4], 2)
    stacked = score(params, data)
    assert stacked.logp.shape == (2, 2, 8)
    for i in range(2):
        one = score(params, row(data, i))
        np.testing.assert_allclose(one.logp, stacked.logp[i], rtol=1e-6)


def test_non_finite_step_changes_nothing_and_is_counted():
    _, tx, train_step = compiled()
    good, bad = batch([1, 2], rows=2), batch([1, 2], rows=2)
    bad.branches.weight[:] = np.nan
    state, _ = train_step(states.create(toy()[1], tx), good)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    for n in range(1, 3):
        state, values = train_step(state, bad)
        assert not np.isfinite(values["loss"])
        assert int(values["skipped"]) == int(values["skipped_total"]) == n
    assert_same(before, (state.params, state.opt_state))
    state, values = train_step(state, good)
    assert (int(state.step), int(state.skipped), int(state.skipped_total)) == (4, 0, 2)
    assert int(values["optimizer_step"]) == 2


def test_one_device_is_eight(tmp_path):
    """fsdp 4 x tensor 2 gives what one device gives; layouts are stable; checkpoints move over."""
    data, results, saver = batch(range(1, 9), 4), [], checkpoint.Checkpoints(tmp_path / "c")
    for mesh in mesh_of(4, 2), mesh_of():
        with jax.set_mesh(mesh):
            loaded = hf.initialise(small(), 0, mesh=mesh)
            optimizer = optimizers.AdamW(lr=1e-3)
            tx = optimizer.build(6, loaded.params)
            state = states.create(loaded.params, tx, mesh)
            placed = jax.tree.map(lambda x: x.sharding, state)
            train_step = step.make_step(loaded.graph, SFT(), tx)
            for _ in range(2):
                state, values = train_step(state, loop.place(data, mesh))
            assert jax.tree.map(lambda x: x.sharding, state) == placed
            assert train_step._cache_size() == 1
            if mesh.size == 8:
                weights = state.params["decoder"]["table"]
                moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == weights.shape]
                assert len(moments) == 2
                for x in (weights, *moments):
                    assert x.sharding.spec == jax.P("tensor", "fsdp")
                saver.save(1, state, checkpoint.Meta(0, None, {}))
            else:
                saver.wait()
                assert_same(saver.restore(state)[1], results[0][0])
            results.append(jax.tree.map(np.array, (state, values)))
    saver.close()
    # Adam divides by the root of tiny squares, so parameters are compared by the size of a step.
    assert_same(results[0][0].params, results[1][0].params, rtol=1e-3, atol=2e-4)
    for name in ("loss", "grad_norm", "num_tokens"):
        np.testing.assert_allclose(results[0][1][name], results[1][1][name], rtol=1e-4)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match=r"batch of 3 rows does not divide .* multiple of 4"):
        loop.place(batch([1, 2, 3], 3), mesh_of(4, 2))

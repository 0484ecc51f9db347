"""Training: the step's arithmetic, resuming bit for bit, stopping, optimizers, overrides."""

import dataclasses
import functools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxvid import config, main, runs, sharding
from jaxvid.data import layout, media
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.train import checkpoint, loop, metrics, optimizers, step
from jaxvid.train import state as states

VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
BUDGET = layout.Budget(rows=1, tokens=16, scored=8, branches=2, frames=2, patches=4)
SETTINGS = loop.Settings(steps=6, log_every=1, checkpoint_every=2)
ADAM = optimizers.AdamW(lr=1e-2)


class Toy(nnx.Module):
    """What the step asks of a model, small enough to compile at once: no token sees another."""

    def __init__(self, *, rngs: nnx.Rngs, width: int = 8):
        draw = lambda *shape: 0.5 * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(draw(64, width), axes=("vocab", "embed"))
        self.up = nnx.Param(draw(2, width, 16), axes=("embed", "ffn"))  # two stacked layers
        self.down = nnx.Param(draw(2, 16, width), axes=("ffn", "embed"))
        self.scale = nnx.Param(jnp.ones((width,)), axes=("embed",))

    def hidden(self, tokens, vision):
        light = vision.patches.astype(jnp.float32).mean((1, 2, 3)) / 255
        x = self.table[...][tokens.tokens] + light[:, None, None]
        for up, down in zip(self.up[...], self.down[...]):
            x = x + jnp.tanh(x @ up) @ down
        return x * self.scale[...].reshape(1, 1, -1)

    def unembedding(self):
        return self.table[...]


def toy(width=8):
    return nnx.split(Toy(rngs=nnx.Rngs(0), width=width))


@functools.cache
def small():
    """The smallest real model."""
    return qwen25vl.Config(
        text=decoder.Config(
            layers=2, width=32, ffn=64, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
        ),
        vision=vision.Config(
            layers=2, width=32, ffn=64, heads=2, out=32, full=(1,), patch=4, window=16
        ),
        tied=True,
        image_token_id=1,
        video_token_id=2,
        remat=False,
    )


def tree(seed, mates=False):
    """A prompt of a clip of two temporal patches, then two branches of three scored tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.array([5, 2, 2, 6, 7])
    branches = tuple(
        layout.Branch(
            rng.integers(8, 64, 4),
            np.array([False, True, True, True]),
            record=seed,
            branch=m,
            mate=int(m and mates),
        )
        for m in range(2)
    )
    return layout.tree(
        f"record {seed}",
        tokens,
        qwen25vl.positions(tokens, [(2, 2, 2)], [1.0], small()),
        VISION,
        placeholders=tokens == 2,
        patches=rng.integers(0, 256, (2, 4, 96), np.uint8),
        grid=(2, 2, 2),
        branches=branches,
    )


def batch(seeds, rows, mates=False):
    """One tree to a row, `rows` rows to a micro-batch."""
    micro = [layout.pack([[tree(s, mates)]], BUDGET)[0] for s in seeds]
    together = lambda *x: np.concatenate(x).reshape(len(seeds) // rows, rows, *x[0].shape[1:])
    return jax.tree.map(together, *micro)


def row(data, i):
    """Micro-batch i, on the device."""
    return jax.tree.map(lambda x: jnp.asarray(x[i]), data)


class Stream:
    """Batches by number. Those in `bad` have no finite loss."""

    def __init__(self, bad=(), mates=False, before=lambda n: None):
        self.n, self.bad, self.mates, self.before = 0, bad, mates, before

    def __next__(self):
        self.n += 1
        self.before(self.n)
        out = batch([self.n, self.n + 100], rows=2, mates=self.mates)
        if self.n in self.bad:
            out.branches.weight[:] = np.nan
        return out

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


def mesh_of(ways=1, tensor=1):
    """A mesh (1, ways, tensor) over the first devices."""
    devices = np.array(jax.devices()[: ways * tensor]).reshape(1, ways, tensor)
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.Mesh(devices, sharding.AXES, axis_types=auto)


@functools.cache
def compiled(optimizer=ADAM, objective=None):
    """(graph, transformation, step) of the toy: compiled once for all tests that share them."""
    graph, params = toy()
    tx = optimizer.build(6, params)
    return graph, tx, step.make_step(graph, objective or SFT(), tx)


def train(folder, stream, settings=SETTINGS, **options):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        _, tx, train_step = compiled()
        state = states.create(toy()[1], tx, mesh)
        update = loop.supervised(train_step, mesh)
        rate = ADAM.rate(6)
        return loop.train(state, update, stream, settings, folder, rate=rate, **options)


def assert_same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


# The step -----------------------------------------------------------------------------------------


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


# The loop -----------------------------------------------------------------------------------------


def logged(folder):
    """metrics.jsonl without what depends on the clock."""
    timed = ("step_time", "perf/throughput")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics.read(folder)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of six steps without interruption: (folder, state)."""
    folder = tmp_path_factory.mktemp("straight")
    result = train(folder, Stream())
    assert (result.step, result.interrupted) == (6, False)
    return folder, jax.tree.map(np.array, result.state)


def test_resume_after_sigterm_is_bit_exact(tmp_path, straight):
    """Stopped by a signal in the middle, between two checkpoints, and started again."""
    hook = lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 3 else None
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(tmp_path, Stream(before=hook))
    assert (stopped.step, stopped.interrupted) == (3, True)
    assert signal.getsignal(signal.SIGTERM) == before
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a killed run may have logged on
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    result = train(tmp_path, Stream())
    assert_same(straight[1], jax.tree.map(np.array, result.state))
    assert logged(straight[0]) == logged(tmp_path)


def test_lines_have_what_a_run_is_judged_by(straight):
    lines = metrics.read(straight[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "grad_norm", "learning_rate", "step_time", "num_tokens", "skipped"}
    assert wanted <= lines[0].keys()
    assert lines[0]["learning_rate"] == pytest.approx(1e-2)
    assert lines[5]["learning_rate"] < lines[1]["learning_rate"]
    assert list((straight[0] / "tensorboard").iterdir())


def test_a_finished_run_is_left_alone(straight):
    stream = Stream()
    result = train(straight[0], stream)
    assert result.step == 6 and stream.n == 6
    assert len(metrics.read(straight[0])) == 6


def test_run_without_finite_loss_stops_and_names_the_records(tmp_path):
    settings = dataclasses.replace(SETTINGS, patience=2)
    with pytest.raises(loop.NonFinite, match=r"2 updates in a row.*update 4 \(records 4, 104\)"):
        train(tmp_path, Stream(bad=(3, 4, 5)), settings)
    # What was saved last is the state before the trouble.
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").latest() == 2


def test_single_bad_step_is_passed_over(tmp_path):
    result = train(tmp_path, Stream(bad=(3,)))
    lines = metrics.read(tmp_path)
    assert int(result.state.skipped_total) == 1 and result.step == 6
    assert lines[2]["loss"] is None and lines[2]["skipped"] == 1 and lines[3]["skipped"] == 0


def test_data_that_ends_is_an_error(tmp_path):
    def end(n):
        if n == 3:
            raise StopIteration

    with pytest.raises(ValueError, match="ended before update 3 of 6.*--steps 2"):
        train(tmp_path, Stream(before=end))


def test_best_and_last_are_kept(tmp_path):
    """Validation at every step; the best is at step 2; the last two and the best remain."""
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, float("nan")])
    settings = dataclasses.replace(SETTINGS, eval_every=1, checkpoint_every=1)
    train(tmp_path, Stream(), settings, evaluate=lambda state: {"eval_loss": next(losses)})
    saver = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert sorted(saver.manager.all_steps()) == [2, 5, 6]
    assert saver.best_step() == 2
    assert [x["eval_loss"] for x in metrics.read(tmp_path) if "eval_loss" in x][:2] == [3.0, 1.0]


def test_validation_is_the_mean_over_all_tokens():
    graph, params = toy()
    first, second = batch([1, 2], 2), batch([3, 4], 2)
    second.branches.weight[:, 1] = 0
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        _, tx, _ = compiled()
        loss = step.make_eval(graph, SFT())
        evaluate = loop.validation(loss, lambda: [first, second], mesh)
        state = states.create(params, tx, mesh)
        found = evaluate(state)
        parts = [loss(state.params, b) for b in (first, second)]
    expected = sum(p.numerator for p in parts) / sum(p.denominator for p in parts)
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="validation split gave no batch"):
        loop.validation(loss, lambda: [], mesh)(state)


def test_preference_reference_is_frozen():
    """At the first step policy and reference agree; the reference outlives the donated state."""
    graph, params = toy()
    _, tx, train_step = compiled(objective=DPO(beta=0.5))
    mesh, stream = mesh_of(), Stream(mates=True)
    with jax.set_mesh(mesh):
        reference = loop.frozen(params)
        before = jax.tree.map(np.array, reference)
        update = loop.preference(train_step, step.make_score(graph), reference, mesh)
        state = states.create(params, tx, mesh)
        margins = []
        for _ in range(4):
            data = batch([1, 2], rows=2, mates=True)
            state, values = update(state, data)
            margins.append(float(values["rewards/margins"]))
    assert margins[0] == 0 and margins[-1] > margins[1] > 0
    assert_same(before, jax.tree.map(np.array, reference))
    assert next(stream).branches.mate.max() == 1


# Checkpoints --------------------------------------------------------------------------------------


def saved(folder, width=8):
    _, params = toy(width)
    tx = ADAM.build(6, params)
    state = states.create(params, tx)
    with_folder = checkpoint.Checkpoints(folder)
    return with_folder, state


def test_checkpoint_of_another_model(tmp_path):
    saver, state = saved(tmp_path)
    saver.save(3, state, checkpoint.Meta(7, {"n": 3}, {"lr": 1}))
    saver.wait()
    n, back, meta = saver.restore(state)
    assert (n, meta) == (3, checkpoint.Meta(7, {"n": 3}, {"lr": 1}))
    assert_same(state, back)
    with pytest.raises(
        ValueError, match=r"(?s)another model or optimizer.*params\.up.*\(2, 8, 16\)"
    ):
        saver.restore(saved(tmp_path / "other", width=4)[1])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 .* \[3\]"):
        saver.restore(state, 2)
    saver.close()


def test_checkpoint_gives_parameters_alone(tmp_path):
    saver, state = saved(tmp_path)
    saver.save(1, state, checkpoint.Meta(0, None, {}))
    saver.wait()
    _, shapes = nnx.split(nnx.eval_shape(lambda: Toy(rngs=nnx.Rngs(0))))
    found = saver.restore_params(shapes, sharding.parameter_shardings(shapes, mesh_of()))
    assert_same(state.params, found)
    saver.close()


def test_checkpoint_notices_changed_arrays(tmp_path, monkeypatch):
    saver, state = saved(tmp_path)
    honest = checkpoint.checksums
    monkeypatch.setattr(
        checkpoint, "checksums", lambda a: {k: v + ("scale" in k) for k, v in honest(a).items()}
    )
    saver.save(1, state, checkpoint.Meta(0, None, {}))
    saver.wait()
    monkeypatch.setattr(checkpoint, "checksums", honest)
    with pytest.raises(ValueError, match="damaged: 3 arrays differ.*scale.*Delete the folder 1"):
        saver.restore(state)
    saver.close()


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 16), ("embed", "ffn"), ((0,), (1,))),
        ((3, 8, 16), ("embed", "ffn"), ((1,), (2,))),  # stacked
        ((3, 8, 4, 2), ("embed", "heads", "head"), ((1,), (2, 3))),
        ((3, 4, 2, 8), ("heads", "head", "embed"), ((1, 2), (3,))),
        ((3, 8, 4, 2), ("embed", "kv_heads", "head"), ((1,), (2, 3))),
        ((3, 4, 2), ("heads", "head"), None),  # a bias
        ((3, 8), ("embed",), None),
        ((64, 8), ("vocab", "embed"), None),
    ],
)
def test_matrices_of_muon(shape, axes, expected):
    found = optimizers.matrix_axes(nnx.Param(jnp.zeros(shape), axes=axes))
    assert (found and (found.reduction_axis, found.output_axis)) == expected


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    _, params = toy()
    optimizer = optimizers.Muon(lr=0.1, schedule="constant", adam_lr=0.01, clip=0.0)
    tx = optimizer.build(6, params)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    moved, _ = tx.update(grads, tx.init(params), params)
    for layer in np.asarray(moved["up"][...]):  # [8, 16]: 8 orthogonal rows, scaled by sqrt(2)
        sizes = np.linalg.svd(layer / (0.1 * np.sqrt(2)), compute_uv=False)
        assert (sizes > 0.6).all() and (sizes < 1.3).all()
    for name in ("table", "scale"):
        # Nesterov: the first step looks ahead by 0.9 / (1 + 0.9) of itself.
        ahead = -0.01 * (1 + 0.9 / 1.9) * np.sign(grads[name][...])
        np.testing.assert_allclose(moved[name][...], ahead, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [optimizers.Muon, optimizers.AdamW, optimizers.Adafactor])
def test_weight_decay_is_on_matrices_alone(optimizer):
    _, params = toy()
    still = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer(lr=0.1, schedule="constant", weight_decay=0.5).build(6, params)
    moved, _ = tx.update(still, tx.init(params), params)
    assert np.abs(moved["up"][...]).max() > 1e-3 and np.abs(moved["down"][...]).max() > 1e-3
    assert not np.abs(moved["table"][...]).max() and not np.abs(moved["scale"][...]).max()


def test_learning_rates():
    rate = optimizers.AdamW(lr=1.0, warmup=4, schedule="linear", final=0.5).rate(12)
    found = [float(rate(n)) for n in (0, 1, 3, 4, 8, 12)]
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0, 1.0, 0.75, 0.5])
    with pytest.raises(ValueError, match="warmup of 12 steps.*--optimizer.warmup"):
        optimizers.Muon(warmup=12).rate(12)


# Metrics, configs and the command line ------------------------------------------------------------


def test_window_means_leave_out_skipped_steps():
    window = metrics.Window()
    for loss, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        window.add({"loss": loss, "skipped": skipped})
    assert window.take() == {"loss": 2.0, "skipped": 0}
    assert window.take() == {}


RECIPE = '''"""A recipe."""
from jaxvid.config import Data, Muon, SFTRun
from jaxvid.data.layout import Budget

def get_config(runlocal=False):
    budget = Budget(rows=2, tokens=8, scored=4, branches=1, frames=2, patches=4)
    data = Data(shards=("a", "b"), tasks=("sft",), budget=budget)
    return SFTRun(model="m", data=data, optimizer=Muon(lr=1e-3), steps=2 if runlocal else 9)
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def test_overrides_are_typed(recipe):
    flags = ["--optimizer.lr", "0.5", "--data.shards", "c", "--optimizer.schedule", "linear"]
    run = runs.load_config(recipe, flags)
    assert run.optimizer == optimizers.Muon(lr=0.5, schedule="linear")
    assert run.data.shards == ("c",) and run.steps == 9
    assert runs.load_config(recipe + ":runlocal", []).steps == 2
    assert run.loop_settings().steps == 9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.lrr", "0.5"], "--optimizer.lr"),
        (["--stepps", "3"], "--steps"),
        (["--optimizer.lr", "fast"], "could not convert string to float"),
        (["--steps", "2.5"], "--steps"),
    ],
)
def test_wrong_overrides_name_the_remedy(recipe, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["train", recipe, "--workdir", "nowhere", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not pathlib.Path("nowhere").exists()


def test_command_line_errors_are_one_line(recipe, capsys):
    for line, said in (
        (["train", "tiny_sftt", "--workdir", "w"], "no recipe 'tiny_sftt'"),
        (["train", recipe], "no --workdir"),
        (["train", recipe + ":small", "--workdir", "w"], "variants are `:runlocal`"),
        (["inspect", "nowhere"], "config.json"),
        (["validate", "nowhere"], None),
        (["report", "nowhere"], "nowhere"),
    ):
        assert main.main(line) == 1
        err = capsys.readouterr().err
        assert said is None or (said in err and err.count("\n") == 1), err
    for line in (["validate", "a", "--medai"], ["reprot", "a"]):
        with pytest.raises(SystemExit):
            main.main(line)
        assert {"validate": "--media", "reprot": "report"}[line[0]] in capsys.readouterr().err


def test_env(capsys):
    assert main.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out and "8 x cpu" in out


def test_saved_run_reads_back(recipe):
    run = runs.load_config(recipe, ["--optimizer.warmup", "3"])
    text = json.dumps(config.plain(run))
    assert config.read(json.loads(text)) == run
    other = json.loads(json.dumps(config.plain(dataclasses.replace(run, steps=7))))
    assert config.differences(json.loads(text), other) == ["steps: 9 -> 7"]
    with pytest.raises(ValueError, match="unknown settings \\['speed'\\]"):
        config.read(json.loads(text) | {"speed": 1})
    with pytest.raises(FileNotFoundError, match="@checkpoints/nothing"):
        config.resolve(dataclasses.replace(run, model="@checkpoints/nothing"))

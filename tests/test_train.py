"""The loop and its checkpoints: resumed = uninterrupted, and what stops a run."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from toy import (
    ADAM,
    SETTINGS,
    Stream,
    Toy,
    assert_same,
    batch,
    compiled,
    mesh_of,
    toy,
    train,
)

from jaxvid import sharding
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.train import checkpoint, loop, metrics, step
from jaxvid.train import state as states


def logged(folder):
    """metrics.jsonl without what depends on the clock."""
    timed = ("step_time", "perf/", "time/")
    untimed = lambda line: {k: v for k, v in line.items() if not k.startswith(timed)}
    return [untimed(line) for line in metrics.read(folder)]


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
        refer = loop.fixed(step.make_score(graph), reference)
        update = loop.preference(train_step, refer, mesh)
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
    code = checkpoint.code_version()
    assert (n, meta) == (3, checkpoint.Meta(7, {"n": 3}, {"lr": 1}, code))
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
    other = lambda *a: {k: v + ("scale" in k) for k, v in honest(*a).items()}
    monkeypatch.setattr(checkpoint, "checksums", other)
    saver.save(1, state, checkpoint.Meta(0, None, {}))
    saver.wait()
    monkeypatch.setattr(checkpoint, "checksums", honest)
    with pytest.raises(ValueError, match="damaged: 3 arrays differ.*scale"):
        saver.restore(state)
    saver.close()

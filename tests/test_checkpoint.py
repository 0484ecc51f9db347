"""Checkpoints that are damaged, of other code, of another config, or wanted as other types."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import ADAM, SETTINGS, Stream, Toy, assert_same, mesh_of, toy, train

from jaxvid import sharding
from jaxvid.train import checkpoint, loop, metrics
from jaxvid.train import state as states

META = checkpoint.Meta(0, {"n": 1}, {"lr": 1, "model": "a"})


def whole(x):
    return jax.tree.map(np.array, x)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints, each worth a copy: (folder, state)."""
    folder = tmp_path_factory.mktemp("written")
    state = states.create(toy()[1], ADAM.build(6, toy()[1]))
    saver = checkpoint.Checkpoints(folder)
    for n in (1, 2):
        saver.save(n, state, META, {"eval_loss": 1.0 / n})
    saver.close()
    return folder, state


@pytest.fixture
def copied(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "c")
    return tmp_path / "c", written[1]


def values(step: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the arrays' values."""
    return [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARM = {
    "values changed": lambda f: [flip(p) for p in values(f)],
    "values cut": lambda f: [cut(p) for p in values(f)],
    "values missing": lambda f: [p.unlink() for p in values(f)],
    "index missing": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "tree cut": lambda f: cut(f / "state" / "_METADATA"),
    "meta cut": lambda f: cut(f / "meta" / "metadata"),
    "meta changed": lambda f: flip(f / "meta" / "metadata"),
    "meta missing": lambda f: (f / "meta" / "metadata").unlink(),
    "empty": lambda f: [p.unlink() for p in f.rglob("*") if p.is_file()],
}


@pytest.mark.parametrize("name", HARM)
def test_the_one_before_a_damaged_checkpoint_is_taken(copied, capsys, name):
    folder, state = copied
    HARM[name](folder / "2")
    saver = checkpoint.Checkpoints(folder)
    step, back, meta = saver.restore(state)
    assert (step, saver.passed, saver.latest()) == (1, [2], 1)
    assert_same(whole(state), whole(back))
    told = capsys.readouterr().out
    assert f"{folder}/2 is damaged" in told and "set aside as 2.damaged; going on from" in told
    saver.save(2, state, META, {"eval_loss": 0.1})  # the step is free again
    saver.close()
    again = checkpoint.Checkpoints(folder)
    assert again.restore(state)[0] == again.best_step() == 2
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "2.damaged"]
    again.close()


def test_metrics_that_cannot_be_read_cost_the_rank_alone(copied, capsys):
    folder, state = copied
    cut(folder / "2" / "metrics" / "metrics")
    saver = checkpoint.Checkpoints(folder)
    assert saver.best_step() == 1 and saver.restore(state)[0] == 2
    assert "counts as one without validation" in capsys.readouterr().out
    saver.save(3, state, META)
    saver.close()


def test_without_a_whole_checkpoint_nothing_is_moved(copied):
    folder, state = copied
    for n in (1, 2):
        cut(folder / str(n) / "meta" / "metadata")
    saver = checkpoint.Checkpoints(folder)
    with pytest.raises(checkpoint.Damaged, match=r"(?s)no checkpoint in .*/2 is .*/1 is damaged"):
        saver.restore(state)
    with pytest.raises(checkpoint.Damaged, match="2 is damaged: JSONDecodeError"):
        saver.restore(state, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    saver.close()


def test_a_run_goes_on_from_the_one_before(tmp_path, capsys):
    """Two runs of six steps; one finds its checkpoint of step 4 cut. Both end in the same state."""
    straight = train(tmp_path / "a", Stream())
    train(tmp_path / "b", Stream(), dataclasses.replace(SETTINGS, steps=4))
    HARM["values cut"](tmp_path / "b" / "checkpoints" / "4")
    result = train(tmp_path / "b", Stream())
    assert_same(whole(straight.state), whole(result.state))
    assert "set aside as 4.damaged; going on from step 2" in capsys.readouterr().out
    lines = metrics.read(tmp_path / "b")
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [(x["step"], x["checkpoint/damaged"]) for x in lines if "loss" not in x] == [(2, 4.0)]


def test_a_checkpoint_of_another_config_says_what_differs(written):
    folder, _ = written
    other = states.create(toy(4)[1], ADAM.build(6, toy(4)[1]))
    saver = checkpoint.Checkpoints(folder)
    told = r"(?s)another model.*The config has changed since:\n  model: \"a\" -> \"b\"$"
    with pytest.raises(ValueError, match=told) as error:
        saver.restore(other, config={"lr": 1, "model": "b"})
    assert not isinstance(error.value, checkpoint.Damaged) and saver.passed == []
    saver.close()


def test_an_old_format_is_named(copied):
    folder, state = copied
    path = folder / "2" / "meta" / "metadata"
    content = json.loads(path.read_text()) | {"format": 1}
    del content["sha256"]
    path.write_text(json.dumps(content))
    saver = checkpoint.Checkpoints(folder)
    with pytest.raises(ValueError, match="checkpoints of format 1; this version reads 2"):
        saver.restore(state)
    saver.close()


# The code that wrote it ---------------------------------------------------------------------------


def test_other_code_is_told(tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(SETTINGS, steps=2)
    train(tmp_path, Stream(), few)
    train(tmp_path, Stream(), few)
    assert "changed since" not in capsys.readouterr().out
    for module in (checkpoint, loop):
        monkeypatch.setattr(module, "code_version", lambda: "9.9, commit 0123")
    train(tmp_path, Stream(), few)
    assert "-> 9.9, commit 0123" in capsys.readouterr().out


def test_the_code_is_named_by_its_commit(tmp_path, monkeypatch):
    checkpoint.code_version.cache_clear()
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "jaxvid" / "train" / "c.py"))
    answers = {"rev-parse": "abc\n", "status": " M jaxvid/main.py\n"}
    monkeypatch.setattr(checkpoint, "_git", lambda folder, verb, *rest: answers[verb])
    assert checkpoint.code_version().endswith(", commit abc+")
    checkpoint.code_version.cache_clear()
    answers["status"] = ""
    assert checkpoint.code_version().endswith(", commit abc")
    checkpoint.code_version.cache_clear()
    (tmp_path / ".git").rmdir()
    assert "commit" not in checkpoint.code_version()
    checkpoint.code_version.cache_clear()


# Other types --------------------------------------------------------------------------------------


def cast(state, kind):
    to = lambda x: x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(to, state)


def test_floats_are_cast_and_it_is_told(written, tmp_path, capsys):
    folder, state = written
    short = cast(state, jnp.bfloat16)
    saver = checkpoint.Checkpoints(folder)
    assert_same(whole(short), whole(saver.restore(short)[1]))
    assert "12 arrays are cast, float32 to bfloat16" in capsys.readouterr().out
    saver.restore(state)
    assert "cast" not in capsys.readouterr().out
    _, shapes = nnx.split(nnx.eval_shape(lambda: Toy(rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    found = saver.restore_params(shapes, sharding.parameter_shardings(shapes, mesh_of()))
    assert_same(whole(short.params), whole(found))
    saver.close()
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(1, short, META)
    saver.wait()
    assert_same(whole(cast(short, jnp.float32)), whole(saver.restore(state)[1]))  # nothing is lost
    assert "12 arrays are cast, bfloat16 to float32" in capsys.readouterr().out
    saver.close()


def test_counters_are_not_cast(written):
    folder, state = written
    saver = checkpoint.Checkpoints(folder)
    with pytest.raises(ValueError, match=r"(?s)another model or optimizer.*skipped: .*int32"):
        saver.restore(state._replace(skipped=jnp.float32(0)))
    saver.close()


def test_processes_must_see_the_same_checkpoints(written, monkeypatch):
    folder, _ = written
    monkeypatch.setattr(checkpoint.hosts, "gather", lambda steps: [steps, []])
    with pytest.raises(ValueError, match=r"see different checkpoints in .*: \[\[.*\], \[\]\]"):
        checkpoint.Checkpoints(folder)


@pytest.mark.parametrize("first, then", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_frozen_weights_may_change_their_type_alone(tmp_path, capsys, first, then):
    trained, frozen = states.split(toy()[1], freeze=["table"])
    begun = states.create(trained, ADAM.build(6, trained))
    saver = checkpoint.Checkpoints(tmp_path)
    saver.save(1, begun._replace(frozen=cast(frozen, first)), META)
    saver.wait()
    _, back, _ = saver.restore(begun._replace(frozen=cast(frozen, then)))
    assert_same(whole(cast(frozen, then)), whole(back.frozen))
    assert f"the frozen weights go from {first} to {then}" in capsys.readouterr().out
    other = jax.tree.map(lambda x: (1.01 * x).astype(then), frozen)
    with pytest.raises(ValueError, match="1 frozen weights are not those"):
        saver.restore(begun._replace(frozen=other))
    saver.close()

"""The counter of FLOPs by hand numbers; scripts at a tiny size, the TPU compiler left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import attention as attention_script
from benchmarks import dna as dna_script
from benchmarks import grpo as grpo_script
from benchmarks import load as load_script
from benchmarks import logprob as logprob_script
from benchmarks import measure
from benchmarks import step as step_script
from benchmarks import tree as tree_script
from jaxvid import flops, sharding
from jaxvid.models import hf
from jaxvid.ops.attention import attention
from jaxvid.ops.logprob import logprob

A, B, C = jax.ShapeDtypeStruct((3, 5), "f4"), jax.ShapeDtypeStruct((5, 7), "f4"), 2 * 3 * 5 * 7
SQUARE, ONE = jax.ShapeDtypeStruct((3, 3), "f4"), 2 * 3 * 3 * 3


@jax.custom_vjp
def product(a, b):
    return a @ b


product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, d: (d @ kept[1].T, kept[0].T @ d))


def layers(x):
    """Three products, rematerialised: 1 forward, and 1 again and 2 backward, each."""
    step = jax.checkpoint(lambda x, _: (jnp.sin(x @ x), None))
    return jax.lax.scan(step, x, None, length=3)[0].sum()


@pytest.mark.parametrize(
    "f,args,want",
    [
        (jnp.matmul, (A, B), C),
        (lambda a, b: jnp.einsum("gij,gjk->gik", a[None], b[None]), (A, B), C),
        (jax.jit(lambda a, b: a @ b), (A, B), C),
        (product, (A, B), C),
        (jax.grad(lambda a, b: product(a, b).sum(), (0, 1)), (A, B), 3 * C),
        (lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=4)[0], (SQUARE,), 4),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x), (SQUARE,), 2),
        (layers, (SQUARE,), 3),
        (jax.grad(layers), (SQUARE,), 3 * 4),
    ],
)
def test_flops_by_hand(f, args, want):
    assert flops.count(f, *args) == (want * ONE if want < C else want)


def test_flops_of_a_shard_map_are_those_of_all_devices():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    args = jax.ShapeDtypeStruct((8, 5), "f4"), B
    assert flops.count(spread, *args) == 2 * (2 * 8 * 5 * 7)  # along y the same work twice


def test_flops_of_a_loop_of_unknown_length_are_refused():
    loop = lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x)
    with pytest.raises(ValueError, match="length"):
        flops.count(loop, SQUARE)
    kernel = jax.ShapeDtypeStruct((1, 1, 3), "f4")
    with pytest.raises(ValueError, match="convolution"):
        flops.count(lambda x: jax.lax.conv(x, x, (1,), "SAME"), kernel)


def test_flops_of_the_kernels():
    """Attention of 1024 tokens in tiles of 512: forward 2 products, backward 3 + 4, each of
    [512, H] by [512, H]; 3 of 4 tiles in a causal row. The log-prob: 1 forward, 3 backward."""
    T, N, H = 1024, 2, 64
    q, k = jax.ShapeDtypeStruct((1, T, N, H), "f4"), jax.ShapeDtypeStruct((1, T, 1, H), "f4")
    end = np.full((1, T), T, np.int32)
    run = lambda *x: attention(*x, end=jnp.asarray(end), impl="interpret").sum()
    shares = dict.fromkeys(tree_script.KERNELS, tree_script.share_visited(end))
    assert set(shares.values()) == {3 / 4}
    whole = 2 * N * T * T * H
    assert flops.count(run, q, k, k, shares=shares) == 2 * whole * 3 / 4
    assert flops.count(jax.grad(run, (0, 1, 2)), q, k, k, shares=shares) == 9 * whole * 3 / 4
    assert flops.count(run, q, k, k) == 2 * whole

    S, V, D = 128, 1024, 128
    args = (jax.ShapeDtypeStruct(shape, "f4") for shape in ((1, S, D), (V, D)))
    targets = jnp.zeros((1, S), jnp.int32)
    score = lambda x, w: logprob(x, w, targets, block=512, impl="interpret")[0].sum()
    assert flops.count(jax.grad(score, (0, 1)), *args) == 4 * 2 * S * V * D


def cells(capsys):
    """The table that was printed, as {what: the rest of its line}."""
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    return {line[0].strip("| "): line[1:] for line in lines}


def test_tree_script(capsys, tmp_path):
    out = tmp_path / "table.md"
    small = ["--prompt", "24", "--branch", "4", "--branches", "2", "--repeats", "1"]
    tree_script.main([*small, "--skip-tpu", "--out", str(out)])
    table = cells(capsys)
    assert table["gradients, largest relative difference"][2].startswith("yes")
    assert "times faster" in table and "times faster" in out.read_text()


def test_logprob_script(capsys):
    small = ["--scored", "8", "--vocab", "64", "--widths", "16", "--repeats", "1"]
    logprob_script.main([*small, "--skip-tpu"])
    table = cells(capsys)
    assert table["value and gradients, largest relative difference"][2].startswith("yes")


def test_attention_script(capsys):
    small = ["--heads", "2", "--kv-heads", "1", "--head", "4", "--repeats", "1"]
    attention_script.main(["--tokens", "128", "--long", "64", *small])
    table = cells(capsys)
    assert table["gradients, largest relative difference"][2].startswith("yes")
    assert float(table["T = 64: peak resident memory of the process, GiB"][0]) > 0.05


def test_load_script(tmp_path, capsys, monkeypatch):
    """In this process: a folder, one loading of it, and a table."""
    own = {"own": 2**20, "above": 2**19, "largest": 2**20, "seconds": 1.0}
    asked = []
    monkeypatch.setattr(load_script, "run", lambda folder, n: asked.append((folder, n)) or own)
    small = ["--layers", "2", "--width", "256", "--ffn", "64", "--vocab", "128"]
    load_script.main(["--folder", str(tmp_path / "m"), *small])
    table = cells(capsys)
    assert table["2 processes: above its weights, MiB"][2].startswith("yes")
    assert [n for _, n in asked] == [1, 2]
    loaded = hf.load(tmp_path / "m", mesh=sharding.make_mesh())
    whole = hf.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.params)


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="run it alone"):
        measure.peak_resident("json.tool", "--no-such-flag")


@pytest.mark.parametrize("row,less,more", [(measure.at_most, 0.5, 0.6), (measure.at_least, 2, 3)])
def test_rows_say_whether_a_target_is_reached(row, less, more):
    assert row("x", less, less).reached == row("x", more, more).reached == "yes"
    assert {row("x", less, more).reached, row("x", more, less).reached} == {"yes", "no"}
    assert row("x", less, more).reached == ("yes" if row is measure.at_most else "no")


def test_the_7b_step_is_of_its_size_and_keeps_its_state_in_place():
    mesh = sharding.make_mesh()
    objective, branches = step_script.OBJECTIVES["policy"]
    batch = step_script.abstract_batch(mesh, 8, 256, 128, branches)
    lowered = step_script.lower(mesh, step_script.config(parts=step_script.PARTS), objective, batch)
    state = lowered.in_avals[0][0]
    text = jax.tree.leaves((state.params["decoder"], state.params["head"]))
    assert sum(x.size for x in text) == 7_615_616_512  # Qwen2.5-7B
    assert all(x.donated for x in jax.tree.leaves(lowered.args_info[0][0]))


def test_rollout_script(capsys):
    pytest.importorskip("torch")
    from benchmarks import rollout as rollout_script

    rollout_script.main(["--tiny", "--group", "4", "--reply", "3", "--repeats", "1"])
    table = cells(capsys)  # 26 tokens and 4 replies of 3: 38 entries against 4 x 29, or 4 x 28
    assert float(table["cache, ours / theirs"][0]) in (0.33, 0.34)


def test_dna_script(capsys, monkeypatch):
    """Both steps are made, from the same prompts; what is shared and what is not is seen in the
    batches."""
    taken, seen = [], dna_script.Run.__call__
    monkeypatch.setattr(dna_script, "SIDE", 2)

    def watch(run):
        step = run.parts.train_step
        spy = lambda now, batch: (taken.append(batch), step(now, batch))[1]
        run.parts = run.parts._replace(train_step=spy)
        run.update = dna_script.policy.make_update(run.parts, 0)
        return seen(run)

    monkeypatch.setattr(dna_script.Run, "__call__", watch)
    small = ["--prompt", "72", "--reply", "3", "--group", "2", "--layers", "1", "--width", "64"]
    dna_script.main([*small, "--repeats", "1"])
    assert "times faster" in cells(capsys)
    (shared, alone) = (int((b.branches.record >= 0).any(-1).sum()) for b in taken[:2])
    assert (shared, alone) == (2, 4)  # rows: a prompt with its replies, against one for each reply


def test_grpo_script(monkeypatch, capsys, quick):
    """Our side in this process, in the place of both."""
    told = []

    def run(command, sizes):
        told.append(command[-1])
        return grpo_script.ours(sizes | {"text": small}) if not told[1:] else first

    small = {"layers": 1, "width": 32, "ffn": 48, "heads": 2, "kv_heads": 1, "vocab": 400}
    first = {"seconds": [2.0], "peak": 3 * 2**20, "before": 2**20, "parameters": 0}
    monkeypatch.setattr(grpo_script, "run", run)
    sizes = ["--prompt", "16", "--reply", "3", "--group", "2", "--repeats", "1", "--turns", "1"]
    with pytest.raises(RuntimeError, match="not of one size"):
        grpo_script.main(sizes)
    assert told == ["--worker", str(grpo_script.TUNIX)]
    monkeypatch.setattr(grpo_script, "run", lambda command, sizes: first)
    grpo_script.main(sizes)
    assert cells(capsys)["times faster"][2].startswith("yes")

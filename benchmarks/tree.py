"""A policy step on rows of trees against the same step on G separate sequences.

    python -m benchmarks.tree               about 10 minutes; 3 with --skip-tpu

A prompt of P tokens and G branches of R, all scored. The tree is one row of P + G R tokens; the
sequences are G rows of P + R. Both go through data.layout, objectives.policy and train.step.

On CPU: a small text-only Qwen2.5-VL of the real classes in float32, time of the whole step (the
median of runs in turns) and the first step's gradients, which AdamW's first moment holds.

By the TPU compiler: the 7B shape in bfloat16 on v5p:4x4x4, one group a chip. FLOPs are those of the
matrix products over the jaxpr, attention by the tiles its tables visit. The separate sequences are
compiled both as one micro-batch of G rows a chip and as G micro-batches of one.
"""

import argparse
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from benchmarks.measure import GIB, Row
from jaxvid import flops, sharding
from jaxvid.batch import Batch
from jaxvid.data import layout, media
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.objectives.policy import Policy
from jaxvid.ops import _flash
from jaxvid.train import state as states
from jaxvid.train import step
from launch.ahead import chips

RATE = 1e-5  # of AdamW
DECAY = 0.9  # of its first moment
KERNELS = ("_forward_kernel", "_query_kernel", "_key_kernel")  # of attention, in ops/_flash.py


class Group(NamedTuple):
    """P, R and G of a prompt and its branches."""

    prompt: int
    branch: int
    branches: int


def config(**text) -> qwen25vl.Config:
    """Text-only: the tower is as small as it can be, and never runs."""
    text = decoder.Config(**text)
    tower = vision.Config(layers=1, width=16, ffn=16, heads=1, out=text.width, full=(0,))
    return qwen25vl.Config(text=text, vision=tower)


def grown(group: Group, vocab: int) -> layout.Tree:
    """One tree: a random prompt and its scored branches with random advantages."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, vocab, n).astype(np.int32)
    P, R, G = group
    every = np.ones(R, bool)
    present = np.full(R, np.nan, np.float32)  # old log-probs: the present ones
    branches = tuple(
        layout.Branch(ids(R), every, branch=g, advantage=float(rng.normal()), old=present)
        for g in range(G)
    )
    positions = np.broadcast_to(np.arange(P)[None], (3, P))
    tree = layout.tree("benchmark", ids(P), positions, media.Vision(), branches=branches)
    return layout.numbered(tree, record=0, pair=0)


def tree_batch(group: Group, vocab: int) -> Batch:
    """One row of P + G R tokens, as one micro-batch."""
    P, R, G = group
    return packed([grown(group, vocab)], P + G * R, G * R, G)


def separate_batch(group: Group, vocab: int) -> Batch:
    """G rows of P + R tokens, as one micro-batch."""
    tree = grown(group, vocab)
    apart = [tree._replace(branches=(b,)) for b in tree.branches]
    return packed(apart, group.prompt + group.branch, group.branch, 1)


def packed(trees: list[layout.Tree], tokens: int, scored: int, branches: int) -> Batch:
    """A tree a row, without a place to spare."""
    budget = layout.Budget(
        rows=len(trees), tokens=tokens, scored=scored, branches=branches, frames=0, patches=0
    )
    return layout.stack(layout.pack([[t] for t in trees], budget))


def gradient(state: states.TrainState) -> list[np.ndarray]:
    """Of the only step so far: what the first moment holds."""
    mu = optax.tree.get(state.opt_state, "mu")
    return [np.asarray(x) / (1 - DECAY) for x in jax.tree.leaves(mu)]


def apart(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Largest difference of the parameters' gradients, relative to the parameter's largest."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if np.abs(y).max() > 0]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


# ---- on CPU


class Run:
    """A state of its own that a step moves on."""

    def __init__(self, advance, params, tx, batch: Batch):
        self.advance, self.batch = advance, batch
        self.state = states.create(jax.tree.map(jnp.copy, params), tx)

    def __call__(self):
        self.state, metrics = self.advance(self.state, self.batch)
        return metrics


def on_cpu(group: Group, cfg: qwen25vl.Config, repeats: int) -> list[Row]:
    """Time of a step and gradients, tree against separate sequences."""
    loaded = hf.initialise(cfg, 0)
    tx = optax.adamw(RATE, b1=DECAY)
    advance = step.make_step(loaded.graph, Policy(), tx)
    batches = {"tree": tree_batch, "separate": separate_batch}
    runs = {
        name: Run(advance, loaded.params, tx, make(group, cfg.text.vocab))
        for name, make in batches.items()
    }
    for run in runs.values():
        run()
    off = apart(*(gradient(run.state) for run in runs.values()))
    took = measure.seconds(runs, repeats)
    sizes = f"CPU, P = {group.prompt}, R = {group.branch}, G = {group.branches}"
    times = f"{took['tree']:.2f} / {took['separate']:.2f}"
    return [
        Row(f"{sizes}: time of a step, s, tree / separate", times),
        measure.at_least("times faster", took["separate"] / took["tree"], 3.0),
        measure.at_most("gradients, largest relative difference", off, 1e-4, "{:.1e}"),
    ]


# ---- by the TPU compiler


def share_visited(end: np.ndarray) -> float:
    """Of the attention kernel's tiles (query, key) over rows `end` [B, T], those it works in."""
    T = end.shape[1]
    tile = min(_flash.TILE, -(-T // _flash.LANES) * _flash.LANES)
    whole = -(-T // tile) * tile
    index = jnp.broadcast_to(jnp.arange(T)[None], end.shape)
    facts = _flash.Facts(index, jnp.asarray(end))
    rows, columns = _flash._facts(facts, facts, whole, whole)
    shape = _flash._Shape(tree=True, window=0, scale=1.0, tile=tile, interpret=False)
    return float(_flash._visible(rows, columns, shape).mean())


def abstract(batch: Batch, mesh: jax.sharding.Mesh, micro: int) -> Batch:
    """The batch of one chip as the shapes of all chips, in `micro` micro-batches."""
    rows = batch.tokens.tokens.shape[1] // micro * mesh.size
    place = sharding.row_sharding(mesh, rows, 1)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((micro, rows, *x.shape[2:]), x.dtype, sharding=place), batch
    )


def on_tpu(group: Group, cfg: qwen25vl.Config, mesh: jax.sharding.Mesh, batch: Batch, micro: int):
    """(FLOPs on each chip, memory of each chip) of one step, a group on each chip."""
    graph, params = hf.abstract(cfg)
    tx = optax.adamw(RATE)
    advance = step.make_step(graph, Policy(), tx)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    shares = dict.fromkeys(KERNELS, share_visited(batch.tokens.end[0]))
    with jax.set_mesh(mesh):
        moments = jax.eval_shape(tx.init, params)
        state = states.TrainState(zero, params, moments, zero, zero)
        placed = states.shardings(state, mesh)
        like = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        args = jax.tree.map(like, state, placed), abstract(batch, mesh, micro)
        work = flops.count(advance, *args, shares=shares) / mesh.size
        return work, chips.memory(advance.lower(*args).compile())


def compare_on_tpu(group: Group, cfg: qwen25vl.Config, topology: str) -> list[Row]:
    """FLOPs and memory, tree against separate sequences."""
    mesh = chips.mesh(topology)
    run = functools.partial(on_tpu, group, cfg, mesh)
    tree, apart = tree_batch(group, cfg.text.vocab), separate_batch(group, cfg.text.vocab)
    (work, held), (others, wide), (_, thin) = (
        run(tree, 1),
        run(apart, 1),
        run(apart, group.branches),
    )
    sizes = f"{topology}, P = {group.prompt}, R = {group.branch}, G = {group.branches}"
    tera = f"{work / 1e12:.0f} / {others / 1e12:.0f}"
    rows = [
        Row(f"{sizes}: matmul TFLOPs a chip, tree / separate", tera),
        measure.at_least("times fewer matmul FLOPs", others / work, 4.5),
    ]
    for what, other in (("one micro-batch", wide), (f"{group.branches} micro-batches", thin)):
        for name, of in (
            ("arguments + temporaries", lambda m: m.arguments + m.temporaries),
            ("peak", lambda m: m.peak),
        ):
            rows += [
                Row(
                    f"{name}, GiB a chip, tree / separate in {what}",
                    f"{of(held) / GIB:.2f} / {of(other) / GIB:.2f}",
                ),
                measure.at_most(f"{name}, tree / separate in {what}", of(held) / of(other), 1.0),
            ]
    return rows


def small() -> qwen25vl.Config:
    """What runs on CPU."""
    return config(
        layers=4, width=256, ffn=704, heads=4, kv_heads=2, vocab=4096, rope_sections=(8, 12, 12)
    )


def published() -> qwen25vl.Config:
    """The text model of Qwen2.5-VL-7B, in bfloat16."""
    cfg = config(
        layers=28,
        width=3584,
        ffn=18944,
        heads=28,
        kv_heads=4,
        vocab=152064,
        rope_sections=(16, 24, 24),
    )
    return dataclasses.replace(cfg, compute=Compute(dtype="bfloat16"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=1024, help="P on CPU")
    parser.add_argument("--branch", type=int, default=64, help="R on CPU")
    parser.add_argument("--branches", type=int, default=8, help="G, everywhere")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--skip-tpu", action="store_true", help="do without the TPU compiler")
    parser.add_argument("--out", default="", help="file to write the table to")
    args = parser.parse_args(argv)
    rows = on_cpu(Group(args.prompt, args.branch, args.branches), small(), args.repeats)
    if not args.skip_tpu:
        rows += compare_on_tpu(Group(4096, 256, args.branches), published(), args.topology)
    measure.table(rows, args.out)


if __name__ == "__main__":
    main()

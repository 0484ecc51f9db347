"""A recipe's programs, on shapes alone: its train step, and for RL its prefill and its decode step.

They are the ones that `jaxvid train` runs (`train.step.make_step`, `rollout.groups`), lowered for
the chips of a slice that is not here. Weights, optimizer state and batches are never made.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid import config, flops, sharding
from jaxvid.batch import AudioBatch, Batch, Branches, TokenBatch, VisionBatch
from jaxvid.data import layout
from jaxvid.models import hf, lora
from jaxvid.rollout import groups
from jaxvid.train import optimizers, state, step
from launch.ahead import chips

ATTENTION = ("_forward_kernel", "_query_kernel", "_key_kernel")  # kernels, in jaxvid/ops/_flash.py
TILE = 512  # of queries and of keys, that those kernels work in or skip


class Plan(NamedTuple):
    """A recipe on a slice, in shapes."""

    run: config.Run
    cfg: Any  # the family's Config, computing as the run asks
    mesh: Mesh
    graph: nnx.GraphDef
    state: state.TrainState  # placed
    tx: Any
    batch: Batch  # placed, with its axis of micro-batches


class Program(NamedTuple):
    """Something to compile, and what is known of it before."""

    name: str  # train, prefill or decode
    lowered: jax.stages.Lowered
    trace: Callable[[], float]  # products in it, over all chips; traces, so it takes seconds
    useful: Callable[[], float]  # the same without what is computed twice to save memory
    kinds: dict[str, float]  # bytes a chip of its arguments, by kind
    beside: dict[str, float]  # bytes a chip of what is there while it runs and is no argument
    loop: int  # what its while loop of unknown length counts for
    gradients: float = 0.0  # bytes a chip of all of them, which the step holds at its end


def plan(run: config.Run, cfg: Any, topology: chips.Topology) -> Plan:
    """Raises ValueError for a mesh or rows that do not divide."""
    cfg = dataclasses.replace(cfg, compute=run.compute)
    asked = {axis: vars(run)[axis] for axis in sharding.AXES}
    mesh = chips.mesh_of(topology, asked)
    with nnx.use_eager_sharding(False), jax.set_mesh(mesh):
        graph, params = _model(run, cfg)
        trained, frozen = config.divide(run, params)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, run.frozen_dtype), frozen)
        tx = run.optimizer.build(run.steps * run.updates_per_step(), trained)
        tx = optimizers.scaled(tx, run.rates, trained)
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        moments = jax.eval_shape(tx.init, trained)
        whole = state.TrainState(zero, trained, moments, zero, zero, frozen)
        whole = jax.tree.map(_placed, whole, state.shardings(whole, mesh))
    return Plan(run, cfg, mesh, graph, whole, tx, batch(run, cfg, mesh))


def _model(run, cfg):
    graph, params = hf.abstract(cfg)
    if not run.lora.rank:
        return graph, params
    graphs = []

    def attached(params):
        adapted, all_of_it = lora.attach(graph, params, run.lora, run.seed)
        graphs.append(adapted)
        return all_of_it

    return (shapes := jax.eval_shape(attached, params)) and (graphs[0], shapes)


def batch(run: config.Run, cfg: Any, mesh: Mesh) -> Batch:
    """A batch of the run's budget, as `layout.empty` shapes one."""
    budget, family = run.data.budget, cfg.prompting
    rows, count = budget.rows, micro_batches(run)
    place = sharding.row_sharding(mesh, rows, 1)
    leaf = lambda kind, *shape: jax.ShapeDtypeStruct((count, rows, *shape), kind, sharding=place)
    whole, real = jnp.int32, jnp.float32
    row, some = leaf(whole, budget.tokens), leaf(whole, budget.scored)
    frames, patches, sees = budget.frames, budget.patches, family.vision
    numbers = 3 * sees.temporal * sees.patch**2
    seen = VisionBatch(
        leaf(jnp.uint8, frames, patches, numbers),
        leaf(whole, frames, patches, 2),
        leaf(whole, frames, patches),
    )
    hears = (family.sound.chunk, family.sound.mels) if family.sound else (0, 0)
    chunks = leaf(whole, budget.chunks)
    heard = AudioBatch(leaf(real, budget.chunks, *hears), chunks, chunks)
    reals = ("weight", "advantage", "value")
    each = (leaf(real if name in reals else whole, budget.branches) for name in Branches._fields)
    tokens = TokenBatch(row, leaf(whole, 3, budget.tokens), row, row, row, some, some, some)
    return Batch(tokens, seen, heard, Branches(*each), *(leaf(real, budget.scored),) * 3)


def micro_batches(run: config.Run) -> int:
    """Those of an update: as set, or what its pairs need where each takes two rows at most."""
    if run.data.microbatches:
        return run.data.microbatches
    each = 2 if isinstance(run, config.PolicyRun) else 1
    pairs = run.data.pairs
    if isinstance(run, config.PolicyRun):
        pairs = -(-pairs // run.rollout.minibatches)
    return 1 << (-(-each * pairs // run.data.budget.rows) - 1).bit_length()


def train(plan: Plan) -> Program:
    """One optimizer step, its state donated."""
    with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
        lowered = _step(plan, plan.graph).lower(plan.state, plan.batch)
    whole, now = plan.state, bytes_of
    kinds = {
        "parameters": now(whole.params) + now(whole.frozen),
        "optimizer": now(whole.opt_state),
        "batch": now(plan.batch),
    }
    beside = {}
    if isinstance(plan.run, config.PreferenceRun) and not (plan.run.sidecar or plan.run.lora.rank):
        beside["reference"] = now(whole.params)
    if isinstance(plan.run, config.PolicyRun) and plan.run.objective.kl_coef:
        beside["reference"] = 0.0 if plan.run.lora.rank else now(whole.params)
    work, useful, grads = lambda: _work(plan), lambda: _useful(plan), now(whole.params)
    return Program("train", lowered, work, useful, kinds, beside, 1, grads)


def _step(plan: Plan, graph: nnx.GraphDef):
    run = plan.run
    hot = run.rollout.sampling.temperature if isinstance(run, config.PolicyRun) else 1.0
    drop = lora.drop if run.lora.dropout else None
    return step.make_step(graph, run.objective, plan.tx, temperature=hot, drop=drop, seed=run.seed)


def _work(plan: Plan) -> float:
    tiles = max(-(-plan.run.data.budget.tokens // TILE), 1)
    shares = dict.fromkeys(ATTENTION, (tiles + 1) / (2 * tiles))  # causal, in tiles
    with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
        return flops.count(_step(plan, plan.graph), plan.state, plan.batch, shares=shares)


def _useful(plan: Plan) -> float:
    plain = dataclasses.replace(plan.run.compute, remat="none", ffn_parts=1)
    cfg = dataclasses.replace(plan.cfg, compute=plain)
    with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
        graph, _ = _model(plan.run, cfg)
    return _work(plan._replace(graph=graph, cfg=cfg))


def rollout(plan: Plan) -> list[Program]:
    """What a PolicyRun samples with: the prompts at once, then a token of every branch at a time.

    Prompts are as long as a row leaves them beside a group of replies.
    """
    run, budget = plan.run, plan.run.data.budget
    asked = run.rollout
    ways = sharding.data_shards(plan.mesh)
    rows = -(-(asked.rows or 2 * run.data.pairs) // ways) * ways
    room = layout.bucket(max(budget.tokens - asked.group * asked.sampling.max_tokens, 1))
    small = dataclasses.replace(budget, rows=rows, tokens=room, scored=0, branches=0)
    alone = dataclasses.replace(run.data, budget=small, microbatches=1)
    inputs = batch(dataclasses.replace(run, data=alone), plan.cfg, plan.mesh)
    place = sharding.row_sharding(plan.mesh, rows)
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)
    inputs = jax.tree.map(one, (inputs.tokens, inputs.vision, inputs.audio))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=place)
    ends = plan.cfg.eos_token_id if plan.cfg.eos_token_id is not None else 2
    sampling = dataclasses.replace(asked.sampling, stop=())
    banned = (plan.cfg.image_token_id, plan.cfg.video_token_id)
    setup = groups.Setup(plan.graph, asked.group, sampling, (ends,), banned)
    weights = plan.state.weights
    everywhere = NamedSharding(plan.mesh, P())
    with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
        first = groups.begin.lower(setup, room, weights, inputs, keys)
        slots = jax.eval_shape(lambda *x: groups.begin(setup, room, *x), weights, inputs, keys)
        slots = _slots(slots, plan.mesh)
        scalar = lambda kind: jax.ShapeDtypeStruct((), kind, sharding=everywhere)
        counts = scalar(jnp.int32), scalar(bool)
        further = groups.advance.lower(setup, weights, slots, *counts)
    cache = {"parameters": bytes_of(weights), "cache": bytes_of(slots)}
    beside = {"optimizer": bytes_of(plan.state.opt_state)}
    if plan.run.objective.kl_coef and not plan.run.lora.rank:
        beside["reference"] = bytes_of(plan.state.params)

    def prefill() -> float:
        with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
            return flops.count(
                lambda *x: groups.begin(setup, room, *x), weights, inputs, keys, shares=shares
            )

    def decode() -> float:
        with nnx.use_eager_sharding(False), jax.set_mesh(plan.mesh):
            return flops.count(
                lambda *x: groups.advance(setup, *x), weights, slots, *counts, loop=tokens
            )

    tiles, tokens = max(room // TILE, 1), sampling.max_tokens
    shares = {ATTENTION[0]: (tiles + 1) / (2 * tiles)}
    begun = {"parameters": cache["parameters"], "batch": bytes_of(inputs)}
    return [
        Program("prefill", first, prefill, prefill, begun, beside, 1),
        Program("decode", further, decode, decode, cache, beside, tokens),
    ]


def _slots(slots: groups.Slots, mesh: Mesh) -> groups.Slots:
    """Shapes of slots where `groups` pins them."""

    def place(x, axes):
        over = []
        for size, name in zip(x.shape, axes):
            rule = sharding.RULES[name] if name else None
            named = rule if isinstance(rule, tuple) else (rule,) if rule else ()
            named = tuple(a for a in named if mesh.shape[a] > 1)
            over.append(named if size % math.prod(mesh.shape[a] for a in named) == 0 else ())
        spec = P(*(named or None for named in over))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    rows = lambda x: place(x, ("rows",) if x.ndim else ())
    placed = jax.tree.map(rows, slots._replace(prompt=None, branch=None))
    return placed._replace(
        prompt=jax.tree.map(lambda x: place(x, groups.CACHE), slots.prompt),
        branch=jax.tree.map(lambda x: place(x, groups.RING), slots.branch),
    )


def bytes_of(tree: Any) -> float:
    """Bytes that each chip holds of an abstract tree with shardings."""
    part = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return float(sum(math.prod(part(x)) * _width(x) for x in jax.tree.leaves(tree)))


def whole(x: jax.ShapeDtypeStruct) -> float:
    """Bytes of an array over all chips, one copy."""
    return float(math.prod(x.shape) * _width(x))


def _width(x: jax.ShapeDtypeStruct) -> int:
    return 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize


def _placed(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

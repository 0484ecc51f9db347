"""Slots that take the next prompt: the same replies in fewer steps, cut at stop strings."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from slots import CONFIG, GROUP, HOW, KEYS, LIMIT, TREES, model, run, same, talker

from jaxvid import sharding
from jaxvid.data import layout
from jaxvid.models import qwen25vl
from jaxvid.models.layers import Compute
from jaxvid.rollout import groups, sampler
from jaxvid.rollout.sampler import Sampling


def test_refilled_slots_give_the_same_replies_in_fewer_steps():
    together, _ = run(0)
    refilled, steps = run(2)
    same(together, refilled)
    longest = together.length.max(1)  # a group takes as many steps as its longest branch, less one
    assert len(set(longest)) > 2, "groups of one length would leave no slot free early"
    in_pairs = sum(longest[i : i + 2].max() - 1 for i in range(0, len(TREES), 2))
    assert (longest - 1).sum() / 2 <= steps < in_pairs


def test_no_prompts_give_no_replies():
    how = {"group": GROUP, "keys": KEYS[:0]}
    out = sampler.generate_all(model(), [], talker(), HOW, **how)
    assert out.tokens.shape == (0, GROUP, LIMIT) and out.length.shape == (0, GROUP)


def cut_by_hand(out, stops):
    """Every reply up to the first token with which its text holds a stop string."""
    out = sampler.Rollouts(*(leaf.copy() for leaf in out))
    cuts = 0
    for at in np.ndindex(out.length.shape):
        for n in range(1, out.length[at] + 1):
            if any(s in talker().decode(out.tokens[at][:n]) for s in stops):
                cuts += n < out.length[at]
                out.length[at], out.ended[at] = n, True
                out.tokens[at][n:], out.logp[at][n:] = 0, 0
                break
    return out, cuts


@pytest.mark.parametrize("rows", [2, 0])
def test_stop_strings_cut_after_the_token_that_completes_them(rows, monkeypatch):
    plain, _ = run(0)
    text = lambda at, a, b: talker().decode(plain.tokens[at][a:b])
    longest = np.unravel_index(plain.length.argmax(), plain.length.shape)
    across = text(longest, 3, 5)[1:-1] or text(longest, 3, 5)
    stops = across, text((0, 0), 1, 2)
    assert all(stops) and across not in (text(longest, 3, 4), text(longest, 4, 5))
    wanted, cuts = cut_by_hand(plain, stops)
    assert cuts >= 2
    for stride in (1, 3, 16):
        monkeypatch.setattr(sampler, "STRIDE", stride)
        got, _ = run(rows, dataclasses.replace(HOW, stop=stops))
        same(got, wanted)


def test_replies_are_handed_over_as_they_end():
    told = []
    how = {"group": GROUP, "keys": KEYS, "rows": 2, "done": lambda i, out: told.append((i, out))}
    every = sampler.generate_all(model(), TREES, talker(), HOW, **how)
    order = [i for i, _ in told]
    assert sorted(order) == list(range(len(TREES))) and order != sorted(order)
    for i, out in told:
        same(out, sampler.Rollouts(*(leaf[i : i + 1] for leaf in every)), 0)


def test_engine_in_this_process():
    engine = sampler.Local(model(), talker(), rows=2)
    prompts = [sampler.Prompt(t) for t in TREES]
    same(engine(prompts, HOW, group=GROUP, keys=KEYS), run(2)[0], 0)


def planned(layers, room, limit, rows=4):
    """(the compiler's plan of a step, bytes of the prompts' caches and of the rings)."""
    cfg = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=layers))
    shapes = nnx.eval_shape(lambda: qwen25vl.Qwen25VL(cfg, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(shapes)
    setup = groups.Setup(graph, GROUP, Sampling(max_tokens=limit), (1,), ())
    budget = layout.Budget(rows=rows, tokens=64, scored=0, branches=0, frames=2, patches=16)
    inputs = layout.prompts(TREES[:rows], budget)
    fill = lambda p, k: groups.begin(setup, room, p, inputs, k)
    slots = jax.eval_shape(fill, params, KEYS[:rows])
    args = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)
    plan = groups.advance.lower(setup, params, slots, *args).compile().memory_analysis()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return plan, size(slots.prompt), size(slots.branch)


def test_the_caches_are_one_copy():
    """A prompt's cache takes P + G R entries. By the compiler, a step of all slots gives its caches
    back in place, and what it holds besides is one layer's, however many layers there are."""
    (rows, room, limit), few, many = (4, 2048, 512), 2, 8
    entry = 2 * few * CONFIG.text.kv_heads * CONFIG.text.head * 4  # keys and values, float32
    plan, prompt, branch = planned(few, room, limit)
    assert (prompt, branch) == (rows * room * entry, rows * GROUP * limit * entry)
    assert plan.alias_size_in_bytes >= prompt + branch
    deep, deep_prompt, deep_branch = planned(many, room, limit)
    assert deep.alias_size_in_bytes >= deep_prompt + deep_branch == 4 * (prompt + branch)
    assert deep.temp_size_in_bytes < 1.1 * plan.temp_size_in_bytes
    assert deep.temp_size_in_bytes < (deep_prompt + deep_branch) / 4


def placed(net, mesh):
    """The model with its parameters over the mesh as training keeps them."""
    graph, params = nnx.split(net)
    params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    return nnx.merge(graph, params)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "context": 2}]
)
def test_eight_devices_refill_as_one(sizes):
    """Four slots on four data shards, weights over fsdp and tensor, kv heads over tensor."""
    mesh = sharding.make_mesh(**sizes)
    net = placed(model(), mesh)
    how = {"group": GROUP, "keys": KEYS[:5], "rows": 4, "mesh": mesh}
    wanted = sampler.Rollouts(*(leaf[:5] for leaf in run(0)[0]))
    same(sampler.generate_all(net, TREES[:5], talker(), HOW, **how), wanted, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_device_holds_the_whole_of_the_weights(dtype):
    """What eight devices' programs hold, by the compiler's text of them."""
    cfg = dataclasses.replace(CONFIG, compute=Compute(dtype=dtype, remat="none"))
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    graph, params = nnx.split(nnx.eval_shape(lambda: qwen25vl.Qwen25VL(cfg, rngs=nnx.Rngs(0))))
    like = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    params = jax.tree.map(like, params, sharding.parameter_shardings(params, mesh))
    setup = groups.Setup(graph, GROUP, HOW, (1,), (2,))
    budget = layout.Budget(rows=4, tokens=64, scored=0, branches=0, frames=2, patches=16)
    with jax.set_mesh(mesh):
        rows = sharding.row_sharding(mesh, 4)
        inputs, keys = jax.device_put((layout.prompts(TREES[:4], budget), KEYS[:4]), rows)
        first = groups.begin.lower(setup, 64, params, inputs, keys)
        begin = first.compile()
        slots = jax.tree.map(like, first.out_info, begin.output_shardings)
        args = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)
        advance = groups.advance.lower(setup, params, slots, *args).compile()
    for caches, heads in ((slots.prompt, 3), (slots.branch, 4)):
        assert {str(x.sharding.spec[1]) for x in caches} == {"fsdp"}
        assert {str(x.sharding.spec[heads]) for x in caches} == {"tensor"}
    text = begin.as_text() + advance.as_text()
    stacked = {x.shape for x in jax.tree.leaves(params["decoder"]["blocks"]) if x.size >= 1024}
    words = {(320, 32)}  # the tables of tokens and of the unembedding
    assert len(stacked) == 5
    for shape in stacked | words:
        whole = r"[a-z0-9]+\[" + ",".join(map(str, shape)) + r"\]"
        assert not re.search(whole, text), f"{shape}: {re.search(whole, text)}"
    # In a step of decoding the rows travel: no weight is gathered, not over the width alone either.
    c = cfg.text
    split = [n // 2 for n in (c.ffn, c.heads * c.head, c.kv_heads * c.head, c.vocab)]
    weights = {n * c.width for n in split} | {c.vocab * c.width // 4}  # in whatever shape
    gathered = re.findall(r"= [a-z0-9]+\[([0-9,]*)\][^ ]* all-gather\(", advance.as_text())
    assert len(gathered) >= 3
    assert not weights & {math.prod(map(int, shape.split(","))) for shape in gathered}
    size = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert advance.memory_analysis().argument_size_in_bytes < size / 4

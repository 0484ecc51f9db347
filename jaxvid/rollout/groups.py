"""Groups of branches in the slots of one batch: begin, step, and take the place of one that ended.

    slots   | prompt's cache, one copy     | ring of G branches' last R tokens | newest token, step
    0       | P tokens of prompt 3         | . . a b c . . . . .               | step 3
    1       | P tokens of prompt 7         | . . . . c . . . . .               | step 1: began later
                                                     ^ column: where every slot writes next

Each slot holds one prompt and its G branches; `begin` fills all, `refill` some. A slot is its own:
its branches draw from its prompt's key, so a reply is the same whichever slot it has, whoever
stands beside it and whenever it began (up to the order in which a sum over the ring is taken).
All slots write into one column at a time, because a cache takes that in place where rows with
columns of their own would have to be scattered.

Three programs of static shapes: `begin`, `refill`, `advance`. The slots are donated to the last
two, so there is one copy of the caches. `advance` runs on the device until there is something to
do for the host.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvid import sharding
from jaxvid.rollout.drawing import Sampling, draw


class Rollouts(NamedTuple):
    """Sampled branches. R is max_tokens; past `length` tokens are 0 and so are log-probs.

    `logp` is under the model itself at the sampling temperature (1 if greedy), before top-k,
    top-p, min-p and banned ids: what `score.score` gives for these tokens at that temperature. An
    engine elsewhere that does not say gives NaN.
    """

    tokens: Int[Array, "B G R"]
    logp: Float[Array, "B G R"]
    length: Int[Array, "B G"]  # with the stop token
    ended: Bool[Array, "B G"]  # by a stop token or a stop string, not by the limit


class Setup(NamedTuple):
    """What a program is compiled for, besides the shapes."""

    graph: Any  # of the model
    group: int
    sampling: Sampling
    stop: tuple[int, ...]  # ids that end a reply
    banned: tuple[int, ...]  # ids that are never drawn


class Slots(NamedTuple):
    """B slots of G branches. The caches are the family's own, [L, B, P, K, H] and
    [L, B, G, R, K, H]."""

    prompt: Any
    branch: Any
    keys: Key[Array, "B G"]
    start: Int[Array, "B"]  # position of the branches' first token
    length: Int[Array, "B"]  # tokens of the prompt; 0 is an empty slot
    step: Int[Array, "B"]  # index of the newest token in its branch
    token: Int[Array, "B G"]  # the newest token, not yet run through the model
    out: Rollouts
    column: Int[Array, ""]  # of the ring that the next token is written in
    steps: Int[Array, ""]  # decode steps run so far


CACHE = (None, "rows", None, "kv_heads", None)  # of a prompt
RING = (None, "rows", None, None, "kv_heads", None)


def live(slots: Slots) -> Bool[Array, "B G"]:
    """The branches that go on."""
    out = slots.out
    going = ~out.ended & (out.length < out.tokens.shape[-1])
    return going & (slots.length > 0)[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(setup: Setup, room: int, params, inputs, keys: Key[Array, "B"]) -> Slots:
    """Slots with the prompts of `inputs` (tokens, vision, audio), one a row, and the first token of
    each branch. A row of padding is an empty slot. `room` is the most tokens of a prompt."""
    return _begin(setup, room, params, inputs, keys)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="slots")
def refill(setup: Setup, params, slots: Slots, inputs, keys, where: Int[Array, "W"]) -> Slots:
    """The prompts of `inputs` [W, ...] in the slots `where`; -1 puts none.

    On a mesh the rows of `inputs` and those of the slots are split alike, and `where` counts among
    the slots of the row's own data shard: no cache leaves its device.
    """
    fresh = _begin(setup, 0, params, inputs, keys)
    kv_heads = jax.tree.leaves(slots.prompt)[0].shape[3]
    on = sharding.splits({"rows": len(slots.step), "kv_heads": kv_heads})

    def put(axes):
        row = axes.index("rows")
        write = lambda into, new, where: _write(into, new, where, row)
        return sharding.spread(write, (axes, axes, ("rows",)), axes, on)

    rows = lambda x: ("rows", *(None,) * (x.ndim - 1))
    each = lambda old, new: put(rows(old))(old, new, where)
    alike = ("keys", "start", "length", "step", "token", "out")
    written = {n: jax.tree.map(each, getattr(slots, n), getattr(fresh, n)) for n in alike}
    prompt = jax.tree.map(lambda *x: put(CACHE)(*x, where), slots.prompt, fresh.prompt)
    return slots._replace(prompt=prompt, **written)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="slots")
def advance(setup: Setup, params, slots: Slots, most: Int[Array, ""], waiting: Bool[Array, ""]):
    """The slots after at most `most` more tokens a branch: sooner when no branch goes on, or, with
    prompts `waiting`, when all branches of one slot have ended."""
    model, prompt, first = nnx.merge(setup.graph, params), slots.prompt, slots.steps

    def unfinished(slots):
        going = live(slots)
        free = waiting & ~going.any(1).all()
        return going.any() & ~free & (slots.steps - first < most)

    def body(slots):
        positions = jnp.broadcast_to((slots.start + slots.step)[:, None], slots.token.shape)
        hidden, branch = model.decode(
            slots.token, positions, prompt, slots.length, slots.branch, slots.step, slots.column
        )
        branch = jax.tree.map(lambda x: sharding.fit(x, *RING), branch)
        columns = slots.out.tokens.shape[-1]
        slots = slots._replace(
            branch=branch,
            step=slots.step + 1,
            column=(slots.column + 1) % columns,
            steps=slots.steps + 1,
        )
        return _drawn(setup, model, slots, hidden)

    # Outside of what the loop carries, the prompts' caches cannot be copied by it.
    slots = jax.lax.while_loop(unfinished, body, slots._replace(prompt=None))
    return slots._replace(prompt=prompt)


def _begin(setup, room, params, inputs, keys):
    model, limit = nnx.merge(setup.graph, params), setup.sampling.max_tokens
    tokens, group = inputs[0], setup.group
    hidden, prompt = model.prefill(*inputs)
    (B, T), D = tokens.tokens.shape, hidden.shape[-1]
    spare = [(0, 0), (0, 0), (0, max(room - T, 0)), (0, 0), (0, 0)]
    prompt = jax.tree.map(lambda x: sharding.fit(jnp.pad(x, spare), *CACHE), prompt)
    length = (tokens.end > 0).sum(axis=1, dtype=jnp.int32)
    # A branch starts one past the prompt's last token, on all three axes, as in training's rows.
    last = jnp.maximum(length - 1, 0)[:, None, None]
    start = jnp.take_along_axis(tokens.positions, last, axis=2)[..., 0].max(axis=1) + 1

    def ring(cache):  # [L, B, P, K, H] of the prompt -> [L, B, G, R, K, H] of its branches
        layers, _, _, kv, head = cache.shape
        zeros = jnp.zeros((layers, B, group, limit, kv, head), cache.dtype)
        return sharding.fit(zeros, *RING)

    slots = Slots(
        prompt,
        jax.tree.map(ring, prompt),
        jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group)))(keys),
        start,
        length,
        jnp.zeros(B, jnp.int32),
        jnp.zeros((B, group), jnp.int32),
        Rollouts(
            jnp.zeros((B, group, limit), jnp.int32),
            jnp.zeros((B, group, limit), jnp.float32),
            jnp.zeros((B, group), jnp.int32),
            jnp.zeros((B, group), bool),
        ),
        jnp.int32(0),
        jnp.int32(0),
    )
    return _drawn(setup, model, slots, jnp.broadcast_to(hidden[:, None], (B, group, D)))


def _drawn(setup, model, slots, hidden):
    """The slots with the token of their step, predicted from `hidden` [B, G, D]."""
    step, out, going = slots.step, slots.out, live(slots)
    keys = jax.vmap(lambda ks, s: jax.vmap(lambda k: jax.random.fold_in(k, s))(ks))
    token, logp = draw(
        keys(slots.keys, step), hidden, model.unembedding(), setup.sampling, setup.banned
    )
    token, logp = jnp.where(going, token, 0), jnp.where(going, logp, 0.0)
    ends = going & jnp.isin(token, jnp.asarray(setup.stop, jnp.int32))
    here = (jnp.arange(out.tokens.shape[-1])[None] == step[:, None])[:, None] & going[..., None]
    out = Rollouts(
        jnp.where(here, token[..., None], out.tokens),
        jnp.where(here, logp[..., None], out.logp),
        out.length + going,
        out.ended | ends,
    )
    return _placed(slots._replace(token=token, out=out))


def _placed(slots):
    """All but the caches: rows over the data shards, as the next program takes them."""
    rows = lambda x: sharding.fit(x, "rows", *(None,) * (x.ndim - 1)) if x.ndim else x
    caches = {"prompt": slots.prompt, "branch": slots.branch}
    return jax.tree.map(rows, slots._replace(prompt=None, branch=None))._replace(**caches)


def _write(into, new, where, axis):
    """`into` with row i of `new` as its row `where[i]` along `axis`, in its corner."""
    for i in range(new.shape[axis]):
        row = jax.lax.slice_in_dim(new, i, i + 1, axis=axis)
        at = [0] * into.ndim
        at[axis] = jnp.maximum(where[i], 0)
        old = jax.lax.dynamic_slice(into, at, row.shape)
        row = jnp.where(where[i] >= 0, row, old)
        into = jax.lax.dynamic_update_slice(into, row, at)
    return into

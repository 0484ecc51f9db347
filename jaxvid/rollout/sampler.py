"""Sample G branches from each prompt: the prompt is computed once and its cache kept once.

    prefill:  hidden of the prompt's last token [B, D] and its cache [L, B, P, K, H]
    decode:   one token for each of B x G branches at a time, until all have stopped

The prompt's cache is never copied per branch; the branches own a small cache [L, B, G, R, K, H].
Randomness belongs to the branch, not to the batch: branch g of a row draws from its row's key and
g alone, so a prompt gives the same replies whatever stands beside it.

Left out: continuous batching. A call ends when its longest branch ends.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvid import sharding
from jaxvid.batch import AudioBatch, TokenBatch, VisionBatch
from jaxvid.data import layout
from jaxvid.data.chat import Chat


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        bad = [
            f"{name} = {value}, wanted {wanted}"
            for name, value, ok, wanted in (
                ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
                ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            )
            if not ok
        ]
        if bad:
            raise ValueError("sampling: " + "; ".join(bad))


class Rollouts(NamedTuple):
    """Sampled branches. R is max_tokens; past `length` tokens are 0 and so are log-probs.

    `logp` is under the model itself at the sampling temperature (1 if greedy), before top-k,
    top-p and banned ids: what `score.score` gives for these tokens at that temperature.
    """

    tokens: Int[Array, "B G R"]
    logp: Float[Array, "B G R"]
    length: Int[Array, "B G"]  # with the stop token
    ended: Bool[Array, "B G"]  # by a stop token, not by the limit


def generate(
    model: nnx.Module,
    tokens: TokenBatch,
    vision: VisionBatch,
    audio: AudioBatch | None = None,
    *,
    group: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    banned_ids: tuple[int, ...] = (),
    keys: Key[Array, "B"],
) -> Rollouts:
    """Draw `group` branches from the prompt in each row. A row of padding gives length 0.

    Compiled once for each static shape and setting. Rows hold one prompt and no branch.
    """
    stop, banned = tuple(stop_ids), tuple(banned_ids)
    if not stop:
        raise ValueError("stop_ids is empty: name the tokens that end a reply (chat.stop_ids)")
    if set(stop) & set(banned):
        raise ValueError(
            f"ids {sorted(set(stop) & set(banned))} are both stop and banned; a reply could never "
            f"end. Take them out of banned_ids."
        )
    graph, params = nnx.split(model)
    inputs = (tokens, vision, audio)
    return _generate(graph, group, sampling, stop, banned, params, inputs, keys)


def generate_all(
    model: nnx.Module,
    trees: Sequence[layout.Tree],
    chat: Chat,
    sampling: Sampling,
    *,
    group: int,
    keys: Key[Array, "n"],
    rows: int = 0,
    mesh: Mesh | None = None,
) -> Rollouts:
    """Draw from the prompts of `trees`, `rows` at a time (0: all at once). numpy, [n, G, R].

    Lengths are rounded up, so that prompts of about one length compile once.
    """
    ways = 1 if mesh is None else data_shards(mesh)
    rows = -(-(rows or len(trees)) // ways) * ways
    out = []
    for at in range(0, len(trees), rows):
        here = trees[at : at + rows]
        needs = [layout.size(t) for t in here]
        budget = layout.Budget(
            rows=rows,
            tokens=bucket(max(len(t.prompt) for t in here)),
            scored=0,
            branches=0,
            frames=max(need.frames for need in needs),
            patches=max(layout.most_patches(t) for t in here),
            chunks=max(need.chunks for need in needs),
        )
        inputs = layout.prompts(here, budget)
        row_keys = keys[at + np.minimum(np.arange(rows), len(here) - 1)]
        if mesh is not None:
            where = sharding.row_sharding(mesh, rows)
            inputs, row_keys = jax.device_put((inputs, row_keys), where)
        drawn = generate(
            model,
            *inputs,
            group=group,
            sampling=sampling,
            stop_ids=chat.stop_ids,
            banned_ids=banned_ids(chat, model),
            keys=row_keys,
        )
        out.append([leaf[: len(here)] for leaf in jax.device_get(drawn)])
    return Rollouts(*(np.concatenate(leaves) for leaves in zip(*out)))


def banned_ids(chat: Chat, model: nnx.Module) -> tuple[int, ...]:
    """What a reply never holds: the chat's control tokens, and rows of the model's table that are
    no token of the tokenizer."""
    rows = jax.eval_shape(model.unembedding).shape[0]
    return chat.banned_ids + tuple(range(chat.size, rows))


def data_shards(mesh: Mesh) -> int:
    """Ways in which the mesh cuts rows."""
    return int(np.prod([mesh.shape[a] for a in sharding.RULES["rows"]]))


def bucket(n: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192, ... that is at least n: two sizes an octave."""
    size = 32
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class _Loop(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, "B G"]  # the newest of each branch, not yet run through the model
    cache: tuple  # the family's own (k, v) of the branches
    out: Rollouts


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(graph, group, sampling, stop, banned, params, inputs, keys) -> Rollouts:
    model = nnx.merge(graph, params)
    unembed, limit = model.unembedding(), sampling.max_tokens
    tokens = inputs[0]
    hidden, prompt = model.prefill(*inputs)
    seen = tokens.end > 0
    length = seen.sum(axis=1, dtype=jnp.int32)
    # A branch starts one past the prompt's last token, on all three axes, as in training's rows.
    last = jnp.maximum(length - 1, 0)[:, None, None]
    start = jnp.take_along_axis(tokens.positions, last, axis=2)[..., 0].max(axis=1) + 1
    keys = jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group)))(keys)

    def draw(step, hidden, out):
        step_keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, step)))(keys)
        token, logp = _draw(step_keys, hidden, unembed, sampling, banned)
        live = ~out.ended & (out.length == step)
        token, logp = jnp.where(live, token, 0), jnp.where(live, logp, 0.0)
        ends = live & jnp.isin(token, jnp.asarray(stop, jnp.int32))
        return token, Rollouts(
            jax.lax.dynamic_update_index_in_dim(out.tokens, token, step, 2),
            jax.lax.dynamic_update_index_in_dim(out.logp, logp, step, 2),
            out.length + live,
            out.ended | ends,
        )

    def body(loop: _Loop) -> _Loop:
        positions = jnp.broadcast_to(start[:, None] + loop.step, loop.token.shape)
        hidden, cache = model.decode(loop.token, positions, prompt, length, loop.cache, loop.step)
        token, out = draw(loop.step + 1, hidden, loop.out)
        return _Loop(loop.step + 1, token, cache, out)

    def unfinished(loop: _Loop):
        return (loop.step + 1 < limit) & ~(loop.out.ended | padding[:, None]).all()

    rows, padding = tokens.tokens.shape[0], length == 0
    blank = Rollouts(
        jnp.zeros((rows, group, limit), jnp.int32),
        jnp.zeros((rows, group, limit), jnp.float32),
        # -1 never equals a step: a row of padding draws nothing. Put back to 0 at the end.
        jnp.broadcast_to(jnp.where(padding, -1, 0)[:, None], (rows, group)).astype(jnp.int32),
        jnp.zeros((rows, group), bool),
    )
    hidden = jnp.broadcast_to(hidden[:, None], (rows, group, hidden.shape[-1]))
    token, out = draw(jnp.int32(0), hidden, blank)

    def empty(cache):  # [L, B, P, K, H] of the prompt -> [L, B, G, R, K, H] of its branches
        layers, _, _, kv, head = cache.shape
        return jnp.zeros((layers, rows, group, limit, kv, head), cache.dtype)

    first = _Loop(jnp.int32(0), token, jax.tree.map(empty, prompt), out)
    out = jax.lax.while_loop(unfinished, body, first).out
    return out._replace(length=jnp.maximum(out.length, 0))


def _draw(keys, hidden, unembed, sampling, banned):
    """Token and log-prob of each branch, from hidden [B, G, D]. float32, as `ops.logprob` is."""
    unembed = unembed.astype(hidden.dtype)
    logits = jnp.einsum("BGD,VD->BGV", hidden, unembed, preferred_element_type=jnp.float32)
    logits = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    allowed = logits
    if banned:
        allowed = logits.at[..., jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        allowed = truncate(allowed, top_k=sampling.top_k, top_p=sampling.top_p)
        token = jax.vmap(jax.vmap(jax.random.categorical))(keys, allowed)
    logp = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return token.astype(jnp.int32), logp - jax.nn.logsumexp(logits, axis=-1)


def truncate(
    logits: Float[Array, "*n V"], *, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "*n V"]:
    """-inf on all but the top_k largest, and on all outside the smallest set that holds top_p.

    Ties with the last one kept are kept; the largest is always kept.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        chance = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chance, axis=-1) - chance  # mass of those ahead of each
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits

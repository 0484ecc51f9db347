"""The sampler: replies and log-probs are those of the model read in one piece."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxvid import score
from jaxvid.batch import TokenBatch
from jaxvid.data import layout, media
from jaxvid.models import decoder, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.rollout import drawing, sampler
from jaxvid.rollout.sampler import Sampling

VOCAB, PAD_ID, STOPS, BANNED = 40, 39, (30, 31, 32, 33, 34, 38), (35, 36, 37, 39)
GROUP = 4
VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
CONFIG = qwen25vl.Config(
    text=decoder.Config(
        layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=VOCAB, rope_sections=(1, 1, 2)
    ),
    vision=vision.Config(
        layers=2, width=16, ffn=24, heads=2, out=32, full=(1,), patch=4, temporal=2, window=16
    ),
    video_token_id=PAD_ID,
    compute=Compute(remat="none"),
)


@functools.cache
def real_model(window=0):
    cfg = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, window=window))
    model = qwen25vl.Qwen25VL(cfg, rngs=nnx.Rngs(0))
    # A fresh table gives nearly equal logits; a larger one makes choices worth comparing.
    model.head[...] = model.head[...] * 10
    return model


def prompt_tree(seed: int, text: int = 5, video: bool = True) -> layout.Tree:
    rng = np.random.default_rng(seed)
    words, grid = rng.integers(0, 30, text), (2, 4, 4)
    if not video:
        return layout.tree("text", words, np.tile(np.arange(text), (3, 1)), VISION)
    tokens = np.concatenate([[1], np.full(8, PAD_ID), words])
    return layout.tree(
        f"clip {seed}",
        tokens,
        qwen25vl.positions(tokens, [grid], [1.0], CONFIG),
        VISION,
        clips=[layout.Clip(rng.integers(0, 256, (2, 16, 3 * 2 * 16), np.uint8), grid)],
        seen=layout.in_order(tokens == PAD_ID),
    )


def keys(rows: int, seed: int = 0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))


def rollouts(trees, sampling, *, row_keys=None, window=0):
    room = dict(rows=4, tokens=24, scored=0, branches=0, frames=2, patches=16)
    out = sampler.generate(
        real_model(window),
        *layout.prompts(trees, layout.Budget(**room)),
        group=GROUP,
        sampling=sampling,
        stop_ids=STOPS,
        banned_ids=BANNED,
        keys=keys(4) if row_keys is None else row_keys,
    )
    return jax.tree.map(np.asarray, out)


@functools.cache
def full_pass(temperature, window):
    return jax.jit(functools.partial(score.score, real_model(window), temperature=temperature))


def scored(trees, out, temperature, window):
    """The trees with the sampled branches, scored in packed rows: {(row, g): log-probs}."""
    grown = []
    for b, t in enumerate(trees):
        branches = []
        for g in range(out.tokens.shape[1]):
            ids = out.tokens[b, g, : out.length[b, g]]
            branches.append(layout.Branch(ids, np.ones(len(ids), bool), record=b, branch=g))
        grown.append(t._replace(branches=tuple(branches)))
    budget = layout.Budget(rows=1, tokens=160, scored=96, branches=16, frames=8, patches=16)
    (batch,) = layout.pack([grown], budget)
    logp = full_pass(temperature, window)(batch.tokens, batch.vision).logp[0]
    table, slot = batch.branches, batch.tokens.slot[0]
    return {
        (int(table.record[0, m]), int(table.branch[0, m])): np.asarray(logp)[slot == m + 1]
        for m in range(16)
        if table.record[0, m] >= 0
    }


@pytest.mark.parametrize("temperature, window", [(1.0, 0), (0.7, 6)])
def test_log_probs_are_those_of_the_packed_rows(temperature, window):
    """Prefill and cached decoding against one forward pass of the tree, four branches a prompt. A
    window of 6 leaves the prompt behind within a branch."""
    trees = [prompt_tree(0), prompt_tree(1, text=9), prompt_tree(2, video=False)]
    out = rollouts(trees, Sampling(max_tokens=8, temperature=temperature), window=window)
    assert len(np.unique(out.length)) > 1, "one length only: the test would not see raggedness"
    for (b, g), logp in scored(trees, out, temperature, window).items():
        np.testing.assert_allclose(out.logp[b, g, : out.length[b, g]], logp, atol=1e-4)
        assert (out.logp[b, g, out.length[b, g] :] == 0).all()
        assert (out.tokens[b, g, out.length[b, g] :] == 0).all()


def test_replies_go_on_from_the_steps_of_another():
    """A prompt that a reply's first tokens extend: its branches' log-probs are those they have in
    one tree, below a branch of those tokens."""
    t, said = prompt_tree(0), np.array([7, 21, 3], np.int32)
    prefix = layout.extend(t, said)
    assert len(prefix.prompt) == len(t.prompt) + 3 and layout.size(prefix).frames == 2
    out = rollouts([prefix], Sampling(max_tokens=8))
    branches = [layout.Branch(said, np.zeros(3, bool))]
    for g in range(GROUP):
        ids = out.tokens[0, g, : out.length[0, g]]
        ones = np.ones(len(ids), bool)
        branches.append(layout.Branch(ids, ones, record=0, branch=g, parent=1))
    budget = layout.Budget(rows=1, tokens=160, scored=96, branches=16, frames=8, patches=16)
    (batch,) = layout.pack([[t._replace(branches=tuple(branches))]], budget)
    logp = np.asarray(full_pass(1.0, 0)(batch.tokens, batch.vision).logp[0])
    for g in range(GROUP):
        mine = logp[batch.tokens.slot[0] == g + 2]
        np.testing.assert_allclose(out.logp[0, g, : len(mine)], mine, atol=1e-4)


def test_greedy_takes_the_most_likely_allowed_token():
    trees = [prompt_tree(0), prompt_tree(3, text=7)]
    out = rollouts(trees, Sampling(max_tokens=8, temperature=0.0))
    np.testing.assert_array_equal(out.tokens[:, 0], out.tokens[:, 1])
    unembed = np.asarray(real_model().unembedding())
    for b, t in enumerate(trees):
        n, p = int(out.length[b, 0]), len(t.prompt)
        branch = layout.Branch(out.tokens[b, 0, :n], np.ones(n, bool))
        budget = layout.Budget(rows=1, tokens=40, scored=8, branches=1, frames=2, patches=16)
        (batch,) = layout.pack([[t._replace(branches=(branch,))]], budget)
        hidden = np.asarray(jax.jit(real_model().hidden)(batch.tokens, batch.vision))[0]
        logits = hidden[p - 1 : p + n - 1] @ unembed.T
        logits[:, list(BANNED)] = -np.inf
        np.testing.assert_array_equal(logits.argmax(-1), branch.tokens)


def test_a_prompt_draws_the_same_alone_and_in_company():
    """Neither the row, its neighbours nor padding rows change a reply."""
    trees, sampling = [prompt_tree(0), prompt_tree(1), prompt_tree(2)], Sampling(max_tokens=8)
    every, row_keys = rollouts(trees, sampling), keys(4)
    alone = rollouts([trees[1]], sampling, row_keys=row_keys[jnp.array([1, 0, 2, 3])])
    np.testing.assert_array_equal(every.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(every.logp[1], alone.logp[0], atol=1e-5)
    assert not np.array_equal(every.tokens[1, 0], every.tokens[1, 1])


def test_padding_rows_draw_nothing():
    out = rollouts([prompt_tree(0)], Sampling(max_tokens=8))
    assert (out.length[0] > 0).all()
    for leaf in out:
        assert not leaf[1:].any()


def test_stop_limit_and_banned():
    out = rollouts([prompt_tree(s) for s in range(4)], Sampling(max_tokens=8))
    assert not np.isin(out.tokens, BANNED).any()
    assert out.ended.any() and not out.ended.all()
    for ended, n, ids in zip(out.ended.ravel(), out.length.ravel(), out.tokens.reshape(-1, 8)):
        assert (ids[n - 1] in STOPS) == ended and not np.isin(ids[: n - 1], STOPS).any()
        assert ended or n == 8


class Cache(NamedTuple):
    k: jax.Array
    v: jax.Array


class Chain(nnx.Module):
    """A Markov chain in the model's place: the next token depends on the last one alone."""

    def __init__(self, chances):
        self.table = nnx.Param(jnp.log(jnp.asarray(chances)))  # [V, V]

    def unembedding(self):
        return jnp.eye(self.table.shape[1])

    def prefill(self, tokens: TokenBatch, vision, audio):
        last = jnp.maximum((tokens.end > 0).sum(1) - 1, 0)
        token = jnp.take_along_axis(tokens.tokens, last[:, None], 1)[:, 0]
        cache = jnp.zeros((1, *tokens.tokens.shape, 1, 1))
        return self.table[...][token], Cache(cache, cache)

    def decode(self, token, positions, prompt, length, branch, step, at):
        return self.table[...][token], branch


CHANCES = [[0.5, 0.3, 0.15, 0.05], [0.0, 0.0, 1.0, 0.0], [0.25] * 4, [0.25] * 4]


def chain(group, sampling, *, banned=()):
    t = layout.tree("chain", np.array([2, 0]), np.tile(np.arange(2), (3, 1)), VISION)
    room = dict(rows=1, tokens=2, scored=0, branches=0, frames=0, patches=0)
    model = Chain(np.asarray(CHANCES) + 1e-9)
    return sampler.generate(
        model,
        *layout.prompts([t], layout.Budget(**room)),
        group=group,
        sampling=sampling,
        stop_ids=(3,),
        banned_ids=banned,
        keys=keys(1),
    )


@pytest.mark.parametrize(
    "sampling, banned, wanted",
    [
        (Sampling(max_tokens=1), (), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(max_tokens=1, temperature=0.5), (), np.array([25, 9, 2.25, 0.25]) / 36.5),
        (Sampling(max_tokens=1, top_k=2), (), [0.625, 0.375, 0, 0]),
        (Sampling(max_tokens=1, top_p=0.81), (), np.array([50, 30, 15, 0]) / 95),
        (Sampling(max_tokens=1, top_p=0.5), (), [1, 0, 0, 0]),
        (Sampling(max_tokens=1, min_p=0.29), (), np.array([50, 30, 15, 0]) / 95),
        (Sampling(max_tokens=1, temperature=0.5, min_p=0.29), (), np.array([25, 9, 0, 0]) / 34),
        (Sampling(max_tokens=1), (0,), [0, 0.6, 0.3, 0.1]),
    ],
)
def test_frequencies(sampling, banned, wanted):
    """4,000 draws of the first token; five standard errors of the rarest is 0.04."""
    out = chain(4000, sampling, banned=banned)
    found = np.bincount(np.asarray(out.tokens).ravel(), minlength=4) / 4000
    np.testing.assert_allclose(found, wanted, atol=0.04)
    assert (found[np.asarray(wanted) == 0] == 0).all()
    # The log-prob is the model's at the temperature, whatever was cut off or banned.
    warm = np.asarray(CHANCES[0]) ** (1 / sampling.temperature)
    full = np.log(warm / warm.sum())
    np.testing.assert_allclose(out.logp.ravel(), full[np.asarray(out.tokens).ravel()], atol=1e-4)


def test_tokens_follow_each_other():
    out = chain(500, Sampling(max_tokens=6))
    for ids, n in zip(np.asarray(out.tokens)[0], np.asarray(out.length)[0]):
        for a, b in zip(ids[: n - 1], ids[1:n]):
            assert CHANCES[a][b] > 0 and a != 3


def test_truncate_by_hand():
    logits = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]))
    kept = lambda **kw: np.isfinite(sampler.truncate(logits, **kw)).astype(int).tolist()
    assert kept(top_k=2) == [[1, 0, 1, 0], [1, 1, 1, 1]]  # ties stay
    assert kept(top_p=0.7) == [[1, 0, 1, 0], [1, 0, 0, 0]]
    assert kept(top_p=0.71) == [[1, 0, 1, 1], [1, 0, 0, 0]]
    assert kept(top_p=1e-6) == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert kept(min_p=0.5) == [[1, 0, 1, 1], [1, 0, 0, 0]]
    assert kept(top_k=2, min_p=0.8) == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert kept() == kept(top_k=4) == [[1] * 4] * 2


CUTS = [
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1),
    dict(top_k=20, top_p=0.6),
    dict(top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_truncate_is_that_of_transformers(cuts, temperature):
    torch, hub = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = 3 * np.random.default_rng(0).standard_normal((64, 50)).astype(np.float32)
    warpers = {
        "top_k": hub.TopKLogitsWarper,
        "top_p": hub.TopPLogitsWarper,
        "min_p": hub.MinPLogitsWarper,
    }
    want = hub.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    for name, value in cuts.items():
        want = warpers[name](value)(None, want)
    got = sampler.truncate(jnp.asarray(logits) / temperature, **cuts)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy()))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("cuts", [{}, *CUTS], ids=str)
def test_banned_ids_are_never_drawn(cuts, temperature):
    """They are the most likely ones; 400 draws."""
    hidden, unembed = jnp.ones((2, 200, 1)), jnp.arange(30.0)[:, None] / 10
    banned, sampling = (26, 27, 28, 29), Sampling(temperature=temperature, **cuts)
    row_keys = jax.random.split(jax.random.key(0), (2, 200))
    tokens, logp = drawing.draw(row_keys, hidden, unembed, sampling, banned)
    assert not np.isin(tokens, banned).any() and np.isfinite(logp).all()
    assert len(np.unique(tokens)) == 1 if temperature == 0 else len(np.unique(tokens)) > 2


def test_wrong_settings_say_what_was_wanted():
    with pytest.raises(ValueError, match=r"max_tokens = 0, wanted at least 1; .*top_p = 0"):
        Sampling(max_tokens=0, top_p=0.0)
    for wrong, wanted in (
        (dict(temperature=-1.0), r"temperature = -1.0, wanted 0 \(greedy\) or more"),
        (dict(top_k=-1), r"top_k = -1, wanted 0 \(all\) or more"),
        (dict(top_p=1.5), r"top_p = 1.5, wanted in \(0, 1\]; 1 cuts nothing"),
        (dict(min_p=2.0), r"min_p = 2.0, wanted in \[0, 1\]; 0 cuts nothing"),
        (dict(stop=("a", "")), "stop = .*wanted texts of at least one character"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="no tokenizer here .*use generate_all"):
        chain(1, Sampling(max_tokens=1, stop=("a",)))
    with pytest.raises(ValueError, match="both stop and banned"):
        chain(1, Sampling(max_tokens=1), banned=(3,))
    assert dataclasses.replace(Sampling(), temperature=0.0).temperature == 0

"""The sampler's log-probs are those of a full pass, for prompts with media in other families."""

import jax
import numpy as np
import omni
import prompts
import pytest
import qwen3
from flax import nnx

from jaxvid import score
from jaxvid.data import layout
from jaxvid.rollout import sampler
from jaxvid.rollout.sampler import Sampling

GROUP, R = 2, 5
CASES = {  # what sees video, deep features of it among the layers; what hears it beside the frames
    "qwen3_vl": (qwen3.fresh, lambda: [qwen3.prompt((qwen3.FILM,)).tree]),
    "omni": (omni.fresh, lambda: [prompts.tree(omni.CFG, omni.FILM)]),
}


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_those_of_a_full_pass(name):
    make, trees = CASES[name]
    loaded, (tree,) = make(), trees()
    model, how = nnx.merge(loaded.graph, loaded.params), Sampling(max_tokens=R, temperature=0.7)
    need = layout.size(tree)
    most = layout.most_patches(tree)
    fits = {"rows": 1, "frames": need.frames, "patches": most, "chunks": need.chunks}
    budget = layout.Budget(tokens=need.tokens, scored=0, branches=0, **fits)
    inputs = layout.prompts([tree], budget)
    keys = jax.random.split(jax.random.key(0), 1)
    out = sampler.generate(
        model, *inputs, group=GROUP, sampling=how, stop_ids=(1,), banned_ids=(2, 3), keys=keys
    )
    ones = lambda g: np.ones(int(out.length[0, g]), bool)
    replies = [np.asarray(out.tokens[0, g, : out.length[0, g]]) for g in range(GROUP)]
    assert max(map(len, replies)) > 2
    branches = tuple(layout.Branch(ids, ones(g)) for g, ids in enumerate(replies))
    room = GROUP * R
    wide = layout.Budget(tokens=need.tokens + room, scored=room, branches=GROUP, **fits)
    (batch,) = layout.pack([[tree._replace(branches=branches)]], wide)
    whole = lambda p, *x: score.score(nnx.merge(loaded.graph, p), *x, temperature=0.7).logp
    logp = np.asarray(jax.jit(whole)(loaded.params, *batch[:3])[0])
    slot = batch.tokens.slot[0]
    gap = [np.abs(out.logp[0, g, : len(r)] - logp[slot == g + 1]) for g, r in enumerate(replies)]
    assert np.concatenate(gap).max() < 1e-4

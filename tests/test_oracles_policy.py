"""Policy losses, advantages, KL and importance weights against TRL 1.16.0 and verl 0.9.1.

The numbers in tests/oracles come from the peers' own functions (README.md there). Every case runs
in float64 (1e-6) and float32 (1e-5), in value and in gradient. Where the peers disagree, the name
of a test says whom we follow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import DTYPES, agree, answers, inputs, load, rows

from jaxvid.objectives.advantages import GRPO, DrGRPO, Duality
from jaxvid.objectives.policy import Policy, importance, kl
from jaxvid.ops.policy_loss import policy_loss
from jaxvid.rewards import Overlong

GROUP = 4
PLAIN = Policy(dual_clip=None)
DUAL = Policy(dual_clip=3.0)
SEQUENCE = Policy(dual_clip=None, aggregation="sequence")
GSPO = dict(ratio="sequence", clip_low=0.1, clip_high=0.15, dual_clip=None)
CISPO_UPPER = Policy(clip="weight", clip_low=1.0, clip_high=4.0, dual_clip=None)

TRL = {
    "grpo": SEQUENCE,
    "bnpo": PLAIN,
    "dr_grpo": Policy(dual_clip=None, aggregation="fixed", fixed_length=12),
    "dapo": PLAIN,
    "dapo_delta": DUAL,
    "cispo": CISPO_UPPER,
    "gspo": Policy(aggregation="sequence", **GSPO),
    "gspo_dapo": Policy(**GSPO),
    "grpo_kl": Policy(dual_clip=None, aggregation="sequence", kl_coef=0.3),
    "dapo_kl": Policy(dual_clip=None, kl_coef=0.3),
    "dapo_tis": Policy(dual_clip=None, importance_cap=2.0),
    "dapo_tis_kl": Policy(dual_clip=None, importance_cap=2.0, kl_coef=0.3),
    "dapo_entropy": Policy(dual_clip=None, entropy_coef=0.05),
}
VERL = {
    "vanilla": PLAIN,
    "vanilla_dual": DUAL,
    "vanilla_sequence": Policy(aggregation="sequence"),
    "vanilla_sum": Policy(aggregation="fixed", fixed_length=1),
    "vanilla_norm": Policy(aggregation="fixed", fixed_length=12),
    "vanilla_groups": Policy(aggregation="group_token"),
    "vanilla_weights": Policy(importance_cap=2.0),
    "vanilla_entropy": Policy(aggregation="sequence", entropy_coef=0.05),
    "gspo": Policy(aggregation="sequence", **GSPO),
    "gspo_tokens": Policy(**GSPO),
    "cispo": Policy(clip="weight", clip_low=0.3, clip_high=0.5, dual_clip=None),
    "cispo_upper": CISPO_UPPER,
    "kl_k1": Policy(kl_kind="k1", kl_coef=0.3),
    "kl_k2": Policy(kl_kind="k2", kl_coef=0.3),
    "kl_k3": Policy(kl_kind="k3", kl_coef=0.3),
    "kl_k3_sequence": Policy(aggregation="sequence", kl_coef=0.3),
}
PEERS = {"trl_grpo": TRL, "verl_policy": VERL}


@functools.cache
def drawn(dtype):
    """The draws in our rows: a group of four branches to a row, two rows to a draw."""
    of = inputs("trl_grpo")
    draws, branches, tokens = of["logp"].shape
    wide = lambda x: x.reshape(draws, branches // GROUP, GROUP * tokens)
    slot = np.arange(branches)[None, :, None] % GROUP + 1
    table = lambda x: np.broadcast_to(x, (draws, branches)).reshape(draws, -1, GROUP)
    group = np.arange(branches)[None] // GROUP
    weight = np.arange(branches)[None] < of["rows"][:, None]
    leaves = dict(weight=table(weight), advantage=table(of["adv"]), pair=table(group))
    floats = ("logp", "old", "ref", "sampled", "entropy")
    return rows({k: wide(of[k]) for k in floats}, wide(slot * of["mask"]), dtype, **leaves)


@functools.cache
def ours(objective, dtype):
    return answers(objective, *drawn(dtype))


def responses(peer):
    """(responses of each draw that has any, those of them without a token)."""
    of = inputs(peer)
    total = of["rows"]
    return total, total - of["mask"].any(-1).sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer,case", [(p, c) for p, of in PEERS.items() for c in of])
def test_policy_is_the_peers(peer, case, dtype):
    """KL is added after the importance weight and is not weighted by it: TRL and verl, not
    ms-swift. The entropy bonus is averaged as the loss is: verl; TRL has a token mean always.
    A response without tokens leaves the mean over responses: verl; in TRL it stays, and TRL's
    numbers are scaled by the count here to be compared."""
    found, objective = load(peer)[0], PEERS[peer][case]
    (value, grads), (n, empty) = ours(objective, dtype), responses(peer)
    stays = peer == "trl_grpo" and objective.aggregation in ("sequence", "fixed")
    scale = n / (n - empty) if stays else np.ones(len(n))
    agree(value, found[f"{case}/value"] * scale, dtype)
    back = lambda x: x.reshape(found[f"{case}/grad"].shape)
    agree(back(grads.logp), found[f"{case}/grad"] * scale[:, None, None], dtype)
    if objective.entropy_coef:
        agree(back(grads.entropy), found[f"{case}/entropy_grad"], dtype)


def test_every_case_of_the_fixtures_is_read():
    """A case that nobody compares is a claim that nobody checks."""
    policies = {p: {c for c in of if c in load(p)[1]["settings"]} for p, of in PEERS.items()}
    assert policies == {p: set(of) for p, of in PEERS.items()}
    rest = {p: set(load(p)[1]["settings"]) - set(of) for p, of in PEERS.items()}
    names = ("", "_none", "_no_std", "_alone", "_nan", "_group", "_batch")
    advantages = {f"advantages{name}" for name in names}
    assert rest["trl_grpo"] - advantages == {"importance", "dapo_far"}
    far = {"vanilla_far", "overlong", "kl_far_k1", "kl_far_k2", "kl_far_k3"}
    assert rest["verl_policy"] - advantages == far


def test_draws_are_the_hard_ones():
    """Both fixtures ask the same, in two sizes; clips, empty rows and NaN do occur."""
    a, b = (inputs(peer) for peer in PEERS)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)
    assert len(a["rows"]) >= 20 and len(set(zip(a["rows"], a["tokens"]))) > 8
    ratio = np.exp(a["logp"] - a["old"])[a["mask"]]
    assert (ratio > 3).any() and (ratio < 0.8).any() and np.isnan(a["sampled"][a["mask"]]).any()
    assert responses("trl_grpo")[1].sum() == 4


def test_a_row_without_tokens_leaves_the_mean_as_in_verl_and_not_as_in_trl():
    trl, verl, empty = load("trl_grpo")[0], load("verl_policy")[0], responses("trl_grpo")[1] > 0
    assert TRL["gspo"] == VERL["gspo"]
    value, _ = ours(TRL["gspo"], "float64")
    agree(value[empty], verl["gspo/value"][empty], "float64")
    assert (np.abs(trl["gspo/value"] / value - 1)[empty] > 0.1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_is_the_truncated_weight_of_trl(dtype):
    """NaN of the sampler gives 1."""
    of, want = inputs("trl_grpo"), load("trl_grpo")[0]["importance/value"]
    with jax.enable_x64(dtype == "float64"):
        got = importance(*(jnp.asarray(of[k], dtype) for k in ("old", "sampled")), 2.0)
    agree(np.asarray(got)[of["mask"]], want[of["mask"]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_past_every_clamp_is_verls(kind, dtype):
    """k3 is held within 10 and its log-ratio within 20, gradient and all: verl. TRL clamps nothing.
    The gradients are those of the estimates themselves, not verl's "k3+"."""
    found, far = load("verl_policy")[0], np.linspace(-30, 30, 41)
    with jax.enable_x64(dtype == "float64"):
        one = lambda x: kl(x[None], jnp.zeros_like(x)[None], kind)[0]
        value, grad = jax.vmap(jax.value_and_grad(one))(jnp.asarray(far, dtype))
    agree(value[:, None], found[f"kl_far_{kind}/value"][:, None], dtype)
    agree(grad[:, None], found[f"kl_far_{kind}/grad"][:, None], dtype)


def test_ratio_past_the_clamp_is_verls_and_not_trls():
    """Log-ratios are held within +-20, with no gradient beyond. TRL does not hold them."""
    trl = load("trl_grpo")[0]["dapo_far/grad"]
    far = np.linspace(-30, 30, 41)
    with jax.enable_x64(True):
        adv = jnp.broadcast_to(jnp.array([[1.0], [-1.0]]), (2, 41))
        logp = jnp.broadcast_to(jnp.asarray(far)[None], (2, 41))
        loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, clip_low=0.2, clip_high=0.28).mean()
        value, grad = jax.value_and_grad(loss)(logp)
    agree(value[None], load("verl_policy")[0]["vanilla_far/value"][None], "float64")
    agree(grad, load("verl_policy")[0]["vanilla_far/grad"], "float64")
    inside = np.abs(far) < 20
    agree(grad[:, inside], trl[:, inside], "float64")
    assert trl[1, -1] > 0 and not grad[:, ~inside].any()


# --- advantages ---


def groups(peer, reward=None):
    """(rewards, valid) [draw, 2, G]: the two groups of a draw are the sides of a pair."""
    of = inputs(peer)
    reward = of["reward"] if reward is None else reward
    valid = np.arange(reward.shape[1])[None] < of["rows"][:, None]
    return reward.reshape(-1, 2, GROUP), valid.reshape(-1, 2, GROUP)


def advantages(objective, dtype, reward, valid):
    """Of each draw alone: a draw is a batch of one pair."""
    with jax.enable_x64(dtype == "float64"):
        each = jax.vmap(lambda r, v: objective(r[None], v[None]))
        found = each(jnp.asarray(reward, dtype), jnp.asarray(valid))
        found = jax.tree.map(lambda x: x[:, 0], found)
        assert found.advantage.dtype == dtype
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "peer,case,objective",
    [
        ("trl_grpo", "advantages_group", GRPO(eps=1e-4)),
        ("trl_grpo", "advantages_none", DrGRPO()),
        ("trl_grpo", "advantages_batch", GRPO(std="batch", eps=1e-4)),
        ("verl_policy", "advantages", GRPO(eps=1e-6)),
        ("verl_policy", "advantages_no_std", DrGRPO()),
    ],
)
def test_advantages_are_the_peers(peer, case, objective, dtype):
    """The std is the sample's (n - 1); epsilon is 1e-4 in TRL and 1e-6, our default, in verl.
    Draws 3 and 4 hold groups of equal rewards."""
    reward, valid = groups(peer)
    got = advantages(objective, dtype, reward, valid)
    want = load(peer)[0][f"{case}/value"].reshape(got.advantage.shape)
    agree(got.advantage, want, dtype)
    assert got.dead[3:5].all() and not got.advantage[3:5].any()


def test_a_group_of_one_has_no_advantage_as_in_trl_and_not_as_in_verl():
    """verl gives a lone reply its raw score as advantage."""
    of = inputs("verl_policy")
    valid = np.arange(of["reward"].shape[1])[None] < of["rows"][:, None]
    lone = lambda x: x.reshape(-1, 2, 1)
    got = advantages(GRPO(), "float64", lone(of["reward"]), lone(valid))
    assert got.dead.all() and not got.advantage.any()
    assert not load("trl_grpo")[0]["advantages_alone/value"].any()
    verl = load("verl_policy")[0]["advantages_alone/value"]
    agree(verl[valid][None], (of["reward"][valid] / (1 + 1e-6))[None], "float64")


def test_a_reward_of_nan_leaves_its_group_as_in_trl_and_not_as_in_verl():
    """Its branch has no advantage and the others are compared among themselves; in verl the whole
    group becomes NaN. The other side of its pair, and the batch, are untouched."""
    of = inputs("trl_grpo")
    reward = np.where(np.arange(of["reward"].shape[1])[None] % 5 == 1, np.nan, of["reward"])
    reward, valid = groups("trl_grpo", reward)
    got = advantages(GRPO(eps=1e-4), "float64", reward, valid)
    want = load("trl_grpo")[0]["advantages_nan/value"].reshape(got.advantage.shape)
    agree(got.advantage, want, "float64")
    assert np.isnan(reward).any() and not got.advantage[np.isnan(reward)].any()
    verl = load("verl_policy")[0]["advantages_nan/value"]
    assert np.isnan(verl[:, :GROUP]).all() and not np.isnan(verl[:, GROUP:]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "objective", [Duality(), Duality(scope="batch"), GRPO(), DrGRPO()], ids=str
)
def test_a_reward_that_is_not_finite_is_not_a_reward(objective, bad):
    """Exactly what the same branch gives when it is not valid."""
    reward, valid = groups("trl_grpo")
    reward, without = reward.astype(np.float32).copy(), valid.copy()
    reward[5, 0, 2], without[5, 0, 2] = bad, False
    got = jax.tree.map(np.asarray, objective(reward, valid))
    want = jax.tree.map(np.asarray, objective(np.nan_to_num(reward), without))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(got.advantage).all() and got.advantage[5, 0, 2] == 0


def test_overlong_punishment_is_verls_dapo():
    found = load("verl_policy")[0]
    got = Overlong(buffer=10, factor=0.7)(found["overlong/lengths"], 40)
    agree(got[None], found["overlong/value"][None], "float32")
    assert (got < 0).any() and (got == 0).any()

"""Objectives against numbers worked by hand, on rows of branches laid out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from branches import COLUMNS, LOGP, SLOT, call, make, near, value, with_gradient

from jaxvid.objectives import preference
from jaxvid.objectives.advantages import DAPO, GRPO, DrGRPO, Duality
from jaxvid.objectives.policy import Policy, importance, kl
from jaxvid.objectives.preference import DPO, PDPO
from jaxvid.objectives.sft import SFT
from jaxvid.objectives.slots import at_slot, by_slot, lengths
from jaxvid.score import score

# --- slots ---


def test_slots_there_and_back():
    near(
        by_slot(jnp.asarray(LOGP), jnp.asarray(SLOT), COLUMNS),
        [[-0.3, -1.2, -0.6], [-1.9, -1.1, 0]],
    )
    near(lengths(jnp.asarray(SLOT), COLUMNS), [[2, 3, 1], [2, 1, 0]])
    back = at_slot(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.asarray(SLOT))
    near(back, [[1, 1, 2, 2, 2, 3, 0, 0], [4, 4, 5, 0, 0, 0, 0, 0]])


OBJECTIVES = [
    SFT(),
    SFT("branch"),
    DPO(),
    DPO(kind="ipo", ce_weight=0.1),
    PDPO(labels="soft", ce_weight=0.1),
    Policy(kl_coef=0.1, entropy_coef=0.01, importance_cap=2.0),
    Policy(aggregation="group_token"),
    Policy(aggregation="sequence"),
    Policy(aggregation="fixed", fixed_length=4),
]


VALUE = [[0.5, 0.25, 0.75], [1, 0, 0]]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_may_hold_anything(objective):
    mate = [[0, 1, 1], [0, 1, 0]]
    advantage = [[1, -1, 1], [1, -1, 0]]
    pad = SLOT == 0

    def run(fill):
        put = lambda x: np.where(pad, np.float32(fill), np.float32(x))
        scores, batch = make(
            logp=put(LOGP),
            old=put(LOGP - 0.1),
            ref=put(-0.7),
            sampled=put(LOGP),
            entropy=put(0.5),
            mate=mate,
            advantage=advantage,
            value=VALUE,
        )
        return with_gradient(objective, scores, batch)

    (clean, clean_grad), (dirty, dirty_grad) = run(0.0), run(1e30)
    jax.tree.map(near, dirty, clean)
    near(dirty_grad, clean_grad)
    assert not np.asarray(dirty_grad)[pad].any() and np.asarray(dirty_grad).any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_rows_apart_sum_to_rows_together(objective):
    """Accumulation over micro-batches is exact: numerators and denominators add."""
    scores, batch = make(
        old=LOGP - 0.1,
        ref=-0.7,
        sampled=LOGP,
        mate=[[0, 1, 1], [0, 1, 0]],
        advantage=[[1, -1, 1], [1, -1, 0]],
        pair=[[0, 0, 1], [2, 2, -1]],
        value=VALUE,
    )
    whole, _ = with_gradient(objective, scores, batch)
    rows = [
        call(objective, *jax.tree.map(lambda x, i=i: x[i : i + 1], (scores, batch))) for i in (0, 1)
    ]
    near(sum(r.numerator for r in rows), whole.numerator)
    near(sum(r.denominator for r in rows), whole.denominator)


# --- SFT ---


def test_sft_by_hand():
    scores, batch = make(weight=[[1, 0, 2], [1, 1, 0]])
    got, metrics = value(SFT(), scores, batch)
    near(got, (0.1 + 0.2 + 2 * 0.6 + 0.9 + 1.0 + 1.1) / (1 + 1 + 2 + 1 + 1 + 1))
    near(metrics["nll"], (0.1 + 0.2 + 0.6 + 0.9 + 1.0 + 1.1) / 6)
    near(metrics["entropy"], 0.5)
    got, _ = value(SFT("branch"), scores, batch)
    near(got, (0.15 + 2 * 0.6 + 0.95 + 1.1) / (1 + 2 + 1 + 1))


# --- preference ---

MATE = [[0, 1, 1], [0, 1, 0]]  # branch 1 is chosen, the others rejected
# Sums of logp by branch are -.3 -1.2 -.6 | -1.9 -1.1; ref is -.2 a token: -.4 -.6 -.2 | -.4 -.2
RATIO = np.array([0.1, -0.6, -0.4, -1.5, -0.9])
MARGIN = np.array([0.7, 0.5, -0.6])
PER_TOKEN = np.array([0.05 + 0.2, 0.05 + 0.4, -0.75 + 0.9])


def softplus(x):
    return np.log1p(np.exp(-np.asarray(x)))


def dpo(objective, **kwargs):
    return value(objective, *make(ref=-0.2, mate=MATE, **kwargs))


@pytest.mark.parametrize(
    "objective,want",
    [
        (DPO(beta=0.5), softplus(0.5 * MARGIN)),
        (
            DPO(beta=0.5, kind="conservative", label_smoothing=0.1),
            0.9 * softplus(0.5 * MARGIN) + 0.1 * softplus(-0.5 * MARGIN),
        ),
        (
            DPO(beta=0.5, kind="robust", label_smoothing=0.1),
            (0.9 * softplus(0.5 * MARGIN) - 0.1 * softplus(-0.5 * MARGIN)) / 0.8,
        ),
        (DPO(beta=0.5, kind="hinge"), np.maximum(1 - 0.5 * MARGIN, 0)),
        (DPO(beta=0.5, kind="ipo"), (PER_TOKEN - 1) ** 2),
        (DPO(beta=0.5, kind="sigmoid_norm"), softplus(0.5 * PER_TOKEN)),
        (DPO(beta=0.5, ce_weight=2.0), softplus(0.5 * MARGIN) + 2 * np.array([0.15, 0.15, 0.95])),
    ],
    ids=lambda x: str(x) if isinstance(x, DPO) else "",
)
def test_dpo_by_hand(objective, want):
    near(dpo(objective)[0], want.mean())


def test_dpo_at_the_reference_is_log_two_and_nothing_is_right_yet():
    got, metrics = value(DPO(), *make(ref=LOGP, mate=MATE))
    near((got, metrics["rewards/accuracies"]), (np.log(2), 0))


def test_dpo_axes_and_weights():
    weight, axis = [[0, 1, 1], [0, 2, 0]], [[0, 1, 3], [0, 3, 0]]
    got, metrics = dpo(DPO(beta=0.5, axis_weights=(2.0, 1.0, 3.0)), weight=weight, axis=axis)
    near(got, (softplus(0.5 * MARGIN) * [2, 3, 6]).sum() / 4)
    near(metrics["rewards/accuracies"], 2 / 3)
    near(metrics["rewards/accuracies/spatial"], 1)
    near(metrics["rewards/accuracies/crossframe"], 1 / 2)
    near(metrics["rewards/chosen"], 0.5 * (0.1 + 0.1 - 1.5) / 3)
    near(metrics["rewards/rejected"], 0.5 * (-0.6 - 0.4 - 0.9) / 3)
    near(metrics["rewards/margins"], 0.5 * MARGIN.mean())
    near((metrics["logps/chosen"], metrics["logps/rejected"]), (-2.5 / 3, -2.9 / 3))


def test_dpo_gradient_pushes_the_pair_apart():
    scores, batch = make(ref=-0.2, mate=MATE)
    _, grad = with_gradient(DPO(beta=0.5), scores, batch)
    push = 0.5 / (1 + np.exp(0.5 * MARGIN))  # beta sigmoid(-beta margin)
    want = [
        [-push[0] - push[1]] * 2 + [push[0]] * 3 + [push[1], 0, 0],
        [-push[2]] * 2 + [push[2]] + [0] * 5,
    ]
    near(grad, want)


def test_dpo_refuses_settings_that_would_do_nothing():
    with pytest.raises(ValueError, match="means nothing to kind='sigmoid'"):
        DPO(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"not in \[0, 0.5\)"):
        DPO(kind="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="above 0"):
        DPO(beta=0.0)


def test_robust_is_unbiased_under_flipped_labels():
    """Mean over labels flipped with probability e is the loss of the clean label."""
    m, e = jnp.array([0.3, -2.0]), 0.2
    loss = lambda m: preference.robust(m, 0.5, e)
    near((1 - e) * loss(m) + e * loss(-m), preference.sigmoid(m, 0.5))


# --- policy ---

ADV = [[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]]
ADV_TOKENS = np.array([[1, 1, -2, -2, -2, 0.5], [0, 0, 3, 0, 0, 0]])
N = np.array([2, 3, 1, 2, 1])


def policy(objective, ratio=1.0, **kwargs):
    return value(objective, *make(old=LOGP - np.log(ratio), advantage=ADV, **kwargs))


def test_policy_means_by_hand():
    """On policy every token loss is -A."""
    sums = -np.array([2 * 1, 3 * -2, 0.5, 0, 3])
    near(policy(Policy())[0], sums.sum() / 9)
    near(policy(Policy(aggregation="sequence"))[0], (sums / N).mean())
    near(policy(Policy(aggregation="fixed", fixed_length=10))[0], (sums / 10).mean())
    groups = dict(pair=[[0, 0, 0], [1, 1, -1]], side=[[0, 0, 1], [0, 0, 0]])
    got, _ = policy(Policy(aggregation="group_token"), **groups)
    near(got, np.mean([sums[:2].sum() / 5, sums[2] / 1, sums[3:].sum() / 3]))


def test_policy_clips_and_counts():
    ratio = np.array([[1.5, 1.1, 1.5, 0.5, 4.0, 1.0, 9, 9], [0.1, 9.0, 0.5, 9, 9, 9, 9, 9]])
    got, metrics = policy(Policy(), ratio=ratio)
    loss = [1.28, 1.1, -2 * 1.5, -2 * 0.8, -2 * 3.0, 0.5, 0, 0, 3 * 0.5]
    near(got, -np.sum(loss) / 9)
    near(metrics["clip_ratio/high_mean"], 1 / 9)
    near(metrics["clip_ratio/low_mean"], 1 / 9)
    near(metrics["clip_ratio/region_mean"], 2 / 9)
    near(metrics["clip_ratio/dual_mean"], 1 / 9)
    near(metrics["ppo_kl"], -np.log(ratio[SLOT > 0]).mean())


def test_policy_on_policy_gradient_is_reinforce():
    scores, batch = make(old=LOGP, advantage=ADV)
    _, grad = with_gradient(Policy(), scores, batch)
    near(grad[:, :6], -ADV_TOKENS)


def test_policy_takes_the_present_log_prob_where_the_old_one_is_nan():
    sampled = (LOGP + 0.1).astype(np.float32)
    settings = dict(advantage=ADV, sampled=sampled, ref=LOGP - 1)
    for objective in (Policy(kl_coef=0.5, importance_cap=2.0), Policy(ratio="sequence")):
        known, unknown = (
            with_gradient(objective, *make(old=old, **settings)) for old in (LOGP, np.nan)
        )
        jax.tree.map(near, unknown, known)


def test_policy_kl_entropy_and_importance():
    got, metrics = policy(Policy(kl_coef=0.5, entropy_coef=0.1), ref=LOGP - 1)
    near(got, -(2 - 6 + 0.5 + 3) / 9 + 0.5 * np.exp(-1) - 0.05)
    near((metrics["kl"], metrics["entropy"]), (np.exp(-1), 0.5))
    sampled = np.where(SLOT == 1, LOGP - np.log(4), LOGP).astype(np.float32)
    sampled[0, 5] = np.nan  # counts as 1
    got, metrics = policy(Policy(importance_cap=2.0), sampled=sampled)
    near(got, -(2 * 2 - 6 + 0.5 + 3) / 9)
    near(metrics["sampling/importance_sampling_ratio/mean"], (4 * 2 + 5) / 9)
    near(metrics["sampling/sampling_logp_difference/mean"], 4 * np.log(4) / 9)
    near(metrics["sampling/sampling_logp_difference/max"], np.log(4))


def _branch_means(values):
    """Of [2, 8] values, each token's mean over its branch; by hand, from SLOT."""
    out = np.zeros(SLOT.shape)
    for row in range(2):
        for slot in set(SLOT[row]) - {0}:
            out[row, SLOT[row] == slot] = values[row, SLOT[row] == slot].mean()
    return out


def test_gspo_has_one_ratio_a_branch():
    """Value: the branch's geometric mean ratio, clipped. Gradient: that ratio at every token that
    is not clipped, the token's own log-prob (GSPO-token, eq. 13 of arXiv 2507.18071)."""
    rng = np.random.default_rng(0)
    old = (LOGP + rng.normal(0, 0.4, LOGP.shape)).astype(np.float32)
    scores, batch = make(old=old, advantage=ADV)
    objective = Policy(ratio="sequence", clip_low=0.1, clip_high=0.1, dual_clip=None)
    ratio = np.exp(_branch_means(LOGP - old))
    clipped = np.clip(ratio, 0.9, 1.1)
    adv = np.pad(ADV_TOKENS, ((0, 0), (0, 2)))
    want = np.where(SLOT > 0, -np.minimum(ratio * adv, clipped * adv), 0)
    loss, grad = with_gradient(objective, scores, batch)
    near(loss.numerator / loss.denominator, want.sum() / 9)
    free = (ratio * adv <= clipped * adv) & (SLOT > 0)
    assert 0 < free.sum() < 9
    near(grad, np.where(free, -ratio * adv, 0))


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    """-sg(clip(ratio)) A logp (eq. 4 of arXiv 2506.13585); TRL's cap of 5 is clip_high 4."""
    ratio = np.where(SLOT == 2, 9.0, 0.5)
    old = (LOGP - np.log(ratio)).astype(np.float32)
    scores, batch = make(old=old, advantage=ADV)
    objective = Policy(clip="weight", clip_low=1.0, clip_high=4.0, dual_clip=None)
    adv = np.pad(ADV_TOKENS, ((0, 0), (0, 2)))
    weight = np.where(SLOT > 0, np.minimum(ratio, 5.0) * adv, 0)
    loss, grad = with_gradient(objective, scores, batch)
    near(loss.numerator, -(weight * LOGP).sum())
    near(grad, -weight)
    with pytest.raises(ValueError, match="set dual_clip to None"):
        Policy(clip="weight")


def test_policy_branch_of_weight_zero_is_left_out():
    weight = [[1, 0, 1], [0, 1, 0]]
    near(policy(Policy(), weight=weight)[0], -(2 + 0.5 + 3) / 4)
    near(policy(Policy(aggregation="sequence"), weight=weight)[0], -(1 + 0.5 + 3) / 3)


def test_kl_and_importance_by_hand():
    logp, ref = jnp.array([0.0, 0.0]), jnp.array([0.0, np.log(2)])
    near(kl(logp, ref), [0, 2 - np.log(2) - 1])
    near(kl(logp, ref, "k1"), [0, -np.log(2)])
    near(kl(logp, ref, "k2"), [0, np.log(2) ** 2 / 2])
    near(importance(jnp.zeros(3), jnp.array([np.log(2), -9.0, np.nan]), 3.0), [0.5, 3, 1])


def test_policy_refuses_a_length_that_nobody_reads():
    for kwargs in (dict(fixed_length=5), dict(aggregation="fixed")):
        with pytest.raises(ValueError, match="fixed_length"):
            Policy(**kwargs)


# --- advantages ---


def test_advantages_are_those_of_their_papers():
    rewards = np.array([[[1, 1, 1, 0], [2, 0, 0, 0]]], np.float32)
    valid = np.ones(rewards.shape, bool)
    std = rewards.std(-1, ddof=1, keepdims=True)
    centred = rewards - rewards.mean(-1, keepdims=True)
    near(DrGRPO()(rewards, valid).advantage, centred)
    near(GRPO()(rewards, valid).advantage, centred / std)
    near(DAPO(std="population")(rewards, valid).advantage, centred / rewards.std(-1, keepdims=True))
    plain, even = GRPO()(rewards, valid), Duality()(rewards, valid)
    near(
        jnp.abs(even.advantage).sum(-1),
        np.asarray(plain.signal).mean(-1, keepdims=True).repeat(2, 1),
    )


def test_a_pair_s_reward_over_the_std_of_the_batch():
    """Replies 0 are right on both sides and earn 0.5 each; so are replies 3, but one has no reward,
    and its mate earns nothing together with it."""
    rewards = np.array([[[1, 0, 0, 1], [1, 1, 0, np.nan]]], np.float32)
    right = np.array([[[1, 0, 0, 1], [1, 1, 0, 1]]], bool)
    got = GRPO(std="batch", eps=0.0)(rewards, np.ones(right.shape, bool), right, 0.5).advantage
    paid = [np.array([1.5, 0, 0, 1]), np.array([1.5, 1, 0])]
    std = np.concatenate(paid).std(ddof=1)
    near(got[0, 0], (paid[0] - paid[0].mean()) / std)
    near(got[0, 1], [*((paid[1] - paid[1].mean()) / std), 0])
    with pytest.raises(ValueError, match="give `correct`"):
        GRPO(std="batch")(rewards, right, pair_reward=0.5)


# --- score ---


class Toy:
    """Hidden states are a table's rows, so the log-probs are known."""

    table = jnp.asarray(np.random.default_rng(0).normal(size=(11, 4)), jnp.float32)

    def hidden(self, tokens, vision, audio):
        return self.table[tokens.tokens]

    def unembedding(self):
        return self.table


def test_score_reads_the_state_before_each_token():
    _, batch = make()
    ids = jnp.asarray([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    sources, targets = jnp.asarray([[1, 1, 3], [0, 4, 0]]), jnp.asarray([[3, 9, 5], [7, 1, 0]])
    tokens = batch.tokens._replace(tokens=ids, sources=sources, targets=targets)
    got = score(Toy(), tokens, batch.vision, temperature=0.5)
    every = jax.nn.log_softmax(2 * Toy.table @ Toy.table.T)
    near(got.logp, every[jnp.take_along_axis(ids, sources, 1), targets])
    near(got.entropy, -(jnp.exp(every) * every).sum(-1)[jnp.take_along_axis(ids, sources, 1)])

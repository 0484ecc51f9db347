"""Step-level DPO against numbers by hand: labels, ties, pairs named once or twice, the tree."""

import numpy as np
import pytest
from branches import LOGP, SLOT, call, make, near, value, with_gradient

from jaxvid.batch import Scores
from jaxvid.data import layout, media
from jaxvid.objectives.preference import DPO, PDPO

# Row 0: branches 1 and 2 are alternatives of a step and name each other, 3 stands alone. Row 1: a
# pair of whole replies, right and wrong, named by the wrong one.
MATE = [[2, 1, 0], [0, 1, 0]]
VALUE = np.array([[1 / 6, 0.5, 0.9], [1, 0, 0]])
STEP, WHOLE = (0, 1, 2), (1, 1, 2)  # row, slot, slot
REF = -0.2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(pairs, *, beta, mu=None, ce_weight=0.0, table=VALUE):
    """(loss, gradient) of pairs (row, s, s'), each once: the paper's equations, pair by pair."""
    total, count, grad = 0.0, 0, np.zeros(SLOT.shape)
    for row, one, other in pairs:
        s, t = SLOT[row] == one, SLOT[row] == other
        gap = table[row][one - 1] - table[row][other - 1]
        if mu is None and gap == 0:
            continue
        count += 1
        a = float(gap > 0) if mu is None else sigmoid(gap / mu)
        ratio = LOGP[row] - REF
        p = sigmoid(beta * (ratio[s].sum() - ratio[t].sum()))
        total -= a * np.log(p) + (1 - a) * np.log(1 - p)
        grad[row] += beta * (p - a) * s - beta * (p - a) * t
        if gap:
            preferred = s if gap > 0 else t
            total -= ce_weight * LOGP[row][preferred].mean()
            grad[row] -= ce_weight * preferred / preferred.sum()
    return total / count, grad / count


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("mu", [None, 0.1, 0.5])
def test_pdpo_by_hand(mu, ce_weight):
    """The first branch of the step is the worse one: the label turns the pair around."""
    soft = {} if mu is None else dict(labels="soft", mu=mu)
    objective = PDPO(beta=0.5, ce_weight=ce_weight, **soft)
    scores, batch = make(ref=REF, mate=MATE, value=VALUE)
    loss, grad = with_gradient(objective, scores, batch)
    want, want_grad = by_hand((STEP, WHOLE), beta=0.5, mu=mu, ce_weight=ce_weight)
    near(loss.numerator / loss.denominator, want)
    near(grad / loss.denominator, want_grad)


def test_pdpo_a_label_is_not_a_weight():
    """At margin 0 the loss is log 2 whatever the gap; the gradient alone knows the label."""
    for gap in (0.1, 0.9):
        scores, batch = make(ref=LOGP, mate=MATE, value=[[gap, 0, 0], [1, 0, 0]])
        near(value(PDPO(labels="soft"), scores, batch)[0], np.log(2))


@pytest.mark.parametrize("mate", [[2, 0, 0], [0, 1, 0], [2, 1, 0]])
def test_pdpo_counts_a_pair_once_whoever_names_it(mate):
    for objective in (PDPO(beta=0.5, ce_weight=0.2), PDPO(beta=0.5, labels="soft", ce_weight=0.2)):
        scores, batch = make(ref=REF, mate=[mate, MATE[1]], value=VALUE)
        loss, grad = with_gradient(objective, scores, batch)
        mu = 0.1 if objective.labels == "soft" else None
        want, want_grad = by_hand((STEP, WHOLE), beta=0.5, mu=mu, ce_weight=0.2)
        near((loss.denominator, loss.numerator), (2, 2 * want))
        near(grad, 2 * want_grad)


def test_pdpo_ties_are_dropped_under_hard_labels_and_kept_at_a_half_under_soft():
    tied = np.array([[0.5, 0.5, 0], [1, 0, 0]])
    scores, batch = make(ref=REF, mate=MATE, value=tied)
    loss, grad = with_gradient(PDPO(beta=0.5, ce_weight=0.3), scores, batch)
    want, want_grad = by_hand((WHOLE,), beta=0.5, ce_weight=0.3, table=tied)
    near((loss.denominator, loss.numerator), (1, want))
    near(grad, want_grad)
    soft = PDPO(beta=0.5, labels="soft", ce_weight=0.3)
    loss, grad = with_gradient(soft, scores, batch)
    want, want_grad = by_hand((STEP, WHOLE), beta=0.5, mu=0.1, ce_weight=0.3, table=tied)
    near((loss.denominator, loss.numerator), (2, 2 * want))
    near(grad, 2 * want_grad)


def test_pdpo_a_batch_of_ties_has_no_loss_and_no_gradient():
    loss, grad = with_gradient(PDPO(ce_weight=0.3), *make(ref=REF, mate=MATE))
    near((loss.numerator, loss.denominator), (0, 0))
    assert not np.asarray(grad).any()


def test_pdpo_weights():
    """A pair's weight is that of the branch that names it; of two, their mean."""
    weight = [[1, 3, 1], [0, 5, 0]]
    loss = call(PDPO(beta=0.5), *make(ref=REF, mate=MATE, value=VALUE, weight=weight))
    step, whole = (by_hand((pair,), beta=0.5)[0] for pair in (STEP, WHOLE))
    near((loss.numerator, loss.denominator), (2 * step + 5 * whole, 7))


def test_pdpo_of_an_empty_step_is_no_pair():
    """Branch 3 of row 1 has no tokens."""
    mate, weight = [[0, 0, 0], [3, 0, 1]], np.ones((2, 3))
    scores, batch = make(ref=REF, mate=mate, value=[[0, 0, 0], [1, 0, 0]], weight=weight)
    assert call(PDPO(), scores, batch).denominator == 0


def test_pdpo_metrics():
    scores, batch = make(ref=REF, mate=MATE, value=VALUE)
    _, metrics = value(PDPO(beta=0.5), scores, batch)
    step, whole = np.array([-0.6, 0.1]), np.array([-1.5, -0.9])  # log-ratios, (better, worse)
    near(metrics["rewards/chosen"], 0.5 * (step[0] + whole[0]) / 2)
    near(metrics["rewards/rejected"], 0.5 * (step[1] + whole[1]) / 2)
    near(metrics["rewards/margins"], 0.5 * (-0.7 - 0.6) / 2)
    near((metrics["rewards/accuracies"], metrics["pairs/tied"]), (0, 0))
    near((metrics["logps/chosen"], metrics["logps/rejected"]), (-3.1 / 2, -1.4 / 2))
    near(metrics["entropy"], 0.5)
    tied = make(ref=LOGP - 0.1 * (SLOT == 1), mate=MATE, value=[[0.5, 0.5, 0], [1, 0, 0]])
    _, metrics = value(PDPO(labels="soft"), *tied)
    near((metrics["rewards/accuracies"], metrics["pairs/tied"]), (1, 0.5))


def test_pdpo_of_whole_replies_is_dpo():
    """Hard labels, chosen named by rejected: DPO to the letter, several rejected ones included."""
    mate, right = [[0, 1, 1], [0, 1, 0]], [[1, 0, 0], [1, 0, 0]]
    scores, batch = make(ref=REF, mate=mate, value=right)
    for ce_weight in (0.0, 0.4):
        got, grad = with_gradient(PDPO(beta=0.5, ce_weight=ce_weight), scores, batch)
        want, want_grad = with_gradient(DPO(beta=0.5, ce_weight=ce_weight), scores, batch)
        near((got.numerator, got.denominator), (want.numerator, want.denominator))
        near(grad, want_grad)
        near(got.metrics["rewards/margins"], want.metrics["rewards/margins"])


@pytest.mark.parametrize("mu", [None, 0.2])
def test_pdpo_on_a_laid_out_tree(mu):
    """One prompt: a prefix, not scored, with two alternatives that continue it, beside a pair of
    whole replies; value and gradient by hand."""
    ids = lambda *x: np.array(x, np.int32)
    on = lambda n: np.ones(n, bool)
    branches = (
        layout.Branch(ids(4, 5), ~on(2), weight=0.0),
        layout.Branch(ids(6, 7), on(2), parent=1, mate=3, value=2 / 3),
        layout.Branch(ids(8), on(1), parent=1, mate=2, value=1 / 3),
        layout.Branch(ids(9), on(1), value=1.0),
        layout.Branch(ids(10, 11), on(2), mate=4, value=0.0),
    )
    vision = media.Vision(patch=4, temporal=2, merge=2, window=16)
    tree = layout.tree("r", ids(1, 2), np.tile(np.arange(2), (3, 1)), vision, branches=branches)
    budget = layout.Budget(rows=1, tokens=12, scored=8, branches=6, frames=0, patches=0)
    (batch,) = layout.pack([[tree]], budget)
    near(batch.branches.value, [[0, 2 / 3, 1 / 3, 1, 0, 0]])
    # scored in the order of `branches`: 6 7 | 8 | 9 | 10 11
    ratio = np.array([[0.3, 0.1, 0.5, -0.2, 0.4, 0.1, 9, 9]], np.float32)
    np.testing.assert_array_equal(batch.tokens.targets, [[6, 7, 8, 9, 10, 11, 0, 0]])
    soft = {} if mu is None else dict(labels="soft", mu=mu)
    scores = Scores(ratio, np.zeros_like(ratio))
    loss, grad = with_gradient(PDPO(beta=2.0, **soft), scores, batch)
    want, want_grad = 0.0, np.zeros(8)
    step = ([1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], 2 / 3 - 1 / 3)
    whole = ([0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], 1.0)
    for one, other, gap in (step, whole):
        side = np.array(one) - np.array(other)
        margin = 2.0 * (side * ratio[0]).sum()
        a = 1.0 if mu is None else sigmoid(gap / mu)
        want -= a * np.log(sigmoid(margin)) + (1 - a) * np.log(1 - sigmoid(margin))
        want_grad += 2.0 * (sigmoid(margin) - a) * side
    near((loss.denominator, loss.numerator), (2, want))
    near(grad, want_grad[None])


def test_pdpo_refuses_settings_that_would_do_nothing():
    with pytest.raises(ValueError, match="means nothing to labels='hard'"):
        PDPO(mu=0.2)
    for wrong in (dict(beta=0.0), dict(labels="soft", mu=0.0)):
        with pytest.raises(ValueError, match="above 0"):
            PDPO(**wrong)

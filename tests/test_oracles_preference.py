"""Preference losses against TRL 1.16.0 and, for conservative DPO, TRL 0.24.0.

The numbers in tests/oracles come from the peers' own functions (README.md there). Every case runs
in float64 (1e-6) and float32 (1e-5), in value and in gradient.
"""

import functools

import numpy as np
import pytest
from peers import DTYPES, agree, answers, inputs, load, rows

from jaxvid.objectives.preference import DPO, PDPO

TRL = {
    "sigmoid": DPO(beta=0.1),
    "sigmoid_strong": DPO(beta=0.5),
    "sigmoid_smoothed": DPO(beta=0.5),
    "hinge": DPO(kind="hinge", beta=0.3),
    "ipo": DPO(kind="ipo", beta=0.4),
    "sigmoid_norm": DPO(kind="sigmoid_norm", beta=2.0),
    "robust": DPO(kind="robust", beta=0.3, label_smoothing=0.15),
    "sigmoid_sft": DPO(beta=0.1, ce_weight=0.7),
}
CONSERVATIVE = {
    "sigmoid": DPO(beta=0.1),
    "conservative": DPO(kind="conservative", beta=0.1, label_smoothing=0.1),
    "conservative_strong": DPO(kind="conservative", beta=0.6, label_smoothing=0.3),
    "robust": DPO(kind="robust", beta=0.3, label_smoothing=0.15),
    "hinge": DPO(kind="hinge", beta=0.3),
    "ipo": DPO(kind="ipo", beta=0.4),
}
PEERS = {"trl_dpo": TRL, "trl_cdpo": CONSERVATIVE}


def drawn(dtype, gap=1.0):
    """A pair to a row: the chosen response is branch 1, the rejected one branch 2. `gap` is the
    difference of their expected correctness, which pDPO reads."""
    of = inputs("trl_dpo")
    draws, pairs, _, tokens = of["logp"].shape
    wide = lambda x: x.reshape(draws, pairs, 2 * tokens)
    slot = wide(of["mask"] * np.array([1, 2])[:, None])
    there = np.arange(pairs)[None] < of["pairs"][:, None]
    table = lambda chosen, rejected: np.stack([chosen * there, rejected * there], -1)
    leaves = dict(weight=table(1, 1), mate=table(0, 1), value=table(gap, 0.0))
    return rows({k: wide(of[k]) for k in ("logp", "ref")}, slot, dtype, **leaves)


@functools.cache
def ours(objective, dtype, gap=1.0):
    return answers(objective, *drawn(dtype, gap))


def check(peer, case, found, dtype):
    value, grads = found
    want = load(peer)[0]
    agree(value, want[f"{case}/value"], dtype)
    agree(grads.logp.reshape(want[f"{case}/grad"].shape), want[f"{case}/grad"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer,case", [(p, c) for p, of in PEERS.items() for c in of])
def test_preference_is_trls(peer, case, dtype):
    """ipo and sigmoid_norm take log-ratios per token; all others sums. The cross-entropy term is a
    mean over each chosen reply, then over pairs; TRL's, a mean over the tokens of a batch, was
    taken pair by pair."""
    check(peer, case, ours(PEERS[peer][case], dtype), dtype)


def test_every_case_of_the_fixtures_is_read_and_both_ask_the_same():
    assert all(set(load(peer)[1]["settings"]) == set(of) for peer, of in PEERS.items())
    a, b = map(inputs, PEERS)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert len(a["pairs"]) >= 20 and set(a["pairs"]) == {1, 2, 3, 4}


def test_label_smoothing_that_would_do_nothing_is_refused_and_trl_ignores_it():
    """TRL 1.x has no conservative DPO: with "sigmoid", 0.3 and 0 give the same numbers."""
    trl, meta = load("trl_dpo")
    assert meta["settings"]["sigmoid_smoothed"]["label_smoothing"] == 0.3
    assert np.array_equal(trl["sigmoid_smoothed/value"], trl["sigmoid_strong/value"])
    with pytest.raises(ValueError, match="means nothing"):
        DPO(beta=0.5, label_smoothing=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pdpo_of_whole_replies_with_hard_labels_is_dpo(dtype):
    """p of 1 and 0; the cross-entropy term is DPO's too."""
    check("trl_dpo", "sigmoid_strong", ours(PDPO(beta=0.5), dtype), dtype)
    check("trl_dpo", "sigmoid_sft", ours(PDPO(beta=0.1, ce_weight=0.7), dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pdpo_of_one_gap_with_soft_labels_is_conservative_dpo(dtype):
    """sigmoid(gap / mu) = 1 - smoothing: a soft label is the probability that it is right."""
    for case in ("conservative", "conservative_strong"):
        settings = load("trl_cdpo")[1]["settings"][case]
        e, mu = settings["label_smoothing"], 0.25
        gap = float(mu * np.log((1 - e) / e))
        soft = PDPO(beta=settings["beta"], labels="soft", mu=mu)
        check("trl_cdpo", case, ours(soft, dtype, gap), dtype)

"""What a set of graded answers amounts to, with intervals.

A pair is one question asked of a real and of a counterfactual clip. "Both" counts the pairs whose
two answers are right, over all pairs (METHODS: DualityVidQA-Test, arXiv 2512.24271). An unparsed
answer is wrong and counted as unparsed; nothing leaves the denominator.

Intervals are percentile bootstraps that draw whole pairs, so that the two sides of a pair stay
together; they speak of the pairs asked, not of the seeds a model was trained with.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SIDES = ("real", "counterfactual")
RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class PairMetrics(NamedTuple):
    """Shares of 1. `same` is how often both clips got the same answer: a model that ignores the
    video has 1."""

    pairs: int
    real: Interval
    counterfactual: Interval
    both: Interval
    unparsed: float  # of all answers, two a pair
    same: float


def bootstrap(
    values: Float[np.ndarray, "n k"], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """The mean of each column with its interval over rows drawn with replacement."""
    n, columns = values.shape
    if n == 0:
        raise ValueError("no pairs to average; check the split and the filter of the evaluation")
    rng, tail = np.random.default_rng(seed), 100 * (1 - LEVEL) / 2
    # A block of resamples at a time bounds the memory.
    means = [
        values[rng.integers(n, size=(min(50, resamples - at), n))].mean(axis=1)
        for at in range(0, resamples, 50)
    ]
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    mean = values.mean(axis=0)
    return [Interval(float(mean[c]), float(low[c]), float(high[c])) for c in range(columns)]


def clustered(
    values: Float[np.ndarray, "n k"], groups: list[str], *, seed: int = 0
) -> list[Interval]:
    """The mean of each column over all rows, with its interval over whole groups drawn with
    replacement: what shares a clip stays together."""
    if not len(values) or len(values) != len(groups):
        raise ValueError(
            f"{len(values)} rows in {len(groups)} groups; give at least one row, each in a group"
        )
    names, at = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1] + 1))
    np.add.at(sums, at, np.concatenate([values, np.ones((len(values), 1))], axis=1))
    rng, tail, count = np.random.default_rng(seed), 100 * (1 - LEVEL) / 2, len(names)
    drawn = np.stack([sums[rng.integers(count, size=count)].sum(axis=0) for _ in range(RESAMPLES)])
    low, high = np.percentile(drawn[:, :-1] / drawn[:, -1:], [tail, 100 - tail], axis=0)
    return [Interval(*map(float, column)) for column in zip(values.mean(axis=0), low, high)]


def _columns(correct: Bool[np.ndarray, "pairs 2"]) -> Float[np.ndarray, "pairs 3"]:
    """real, counterfactual, both."""
    return np.stack([correct[:, 0], correct[:, 1], correct.all(axis=1)], axis=1).astype(np.float64)


def pair_metrics(
    correct: Bool[np.ndarray, "pairs 2"],
    answers: list[tuple[str | None, str | None]],
    *,
    seed: int = 0,
) -> PairMetrics:
    """Accuracy on each side and of whole pairs. `answers` are as read; None is unparsed."""
    if len(answers) != len(correct):
        raise ValueError(f"{len(correct)} graded pairs but {len(answers)} pairs of answers")
    read = [a for pair in answers for a in pair]
    return PairMetrics(
        len(correct),
        *bootstrap(_columns(correct), seed=seed),
        unparsed=sum(a is None for a in read) / len(read),
        same=sum(a == b and a is not None for a, b in answers) / len(answers),
    )


def by_category(
    correct: Bool[np.ndarray, "pairs 2"],
    answers: list[tuple[str | None, str | None]],
    categories: list[str],
    *,
    seed: int = 0,
) -> dict[str, PairMetrics]:
    """`pair_metrics` of each category, in alphabetical order."""
    if len(categories) != len(correct):
        raise ValueError(f"{len(correct)} graded pairs but {len(categories)} categories")
    found = {}
    for name in sorted(set(categories)):
        rows = [i for i, c in enumerate(categories) if c == name]
        found[name] = pair_metrics(correct[rows], [answers[i] for i in rows], seed=seed)
    return found


def difference(
    after: Bool[np.ndarray, "n 2"], before: Bool[np.ndarray, "m 2"], *, seed: int = 0
) -> dict[str, Interval]:
    """after - before on the same pairs, in the same order: real, counterfactual and both.

    What is drawn is the difference of each pair, so what makes a pair hard for both cancels.
    """
    if after.shape != before.shape:
        raise ValueError(
            f"{len(after)} pairs after but {len(before)} before; a paired difference needs the "
            f"same pairs. Evaluate both on one split."
        )
    names = (*SIDES, "both")
    return dict(zip(names, bootstrap(_columns(after) - _columns(before), seed=seed)))

"""Several replies to each question, and what becomes of them: Major@N, best of N, pass@N.

    major   the answer that most of the N samples state; of tied answers the one drawn first, which
            the seed of the samples decides; samples that state no answer do not vote
    best    the answer of the sample with the highest mean log-prob per token; of equals the first
    pass    right if any of the N is: what a perfect choice among them would reach

The first two are an evaluator's own choices (Major@20 and, with the model itself in the place of a
reward model, RM@20 of video-SALMONN-o1, https://arxiv.org/abs/2502.11775); the third is an oracle.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxvid import answers
from jaxvid.data.chat import Chat
from jaxvid.data.layout import Tree
from jaxvid.data.records import Example
from jaxvid.eval import metrics
from jaxvid.rollout import sampler
from jaxvid.rollout.sampler import Sampling

Choice = Literal["major", "best", "pass"]
CHOICES: tuple[Choice, ...] = ("major", "best", "pass")


class Sample(NamedTuple):
    """One of a question's N replies."""

    reply: str
    read: str | None
    correct: bool
    logp: float  # mean per token, at the sampling temperature
    tokens: int


def draw(
    model: nnx.Module,
    asked: Sequence[tuple[str, Example]],  # (name, which seeds its samples; the question)
    trees: Sequence[Tree],
    chat: Chat,
    sampling: Sampling,
    *,
    count: int,
    seed: int,
    rows: int,
    mesh: Mesh | None = None,
) -> list[tuple[Sample, ...]]:
    """`count` replies to each question. A question draws the same whatever stands beside it."""
    keys = sampler.named_keys(jax.random.key(seed), [name for name, _ in asked])
    out = sampler.generate_all(
        model, trees, chat, sampling, group=count, keys=keys, rows=rows, mesh=mesh
    )
    found = []
    for i, (_, e) in enumerate(asked):
        samples = []
        for tokens, logp, n in zip(out.tokens[i], out.logp[i], out.length[i]):
            reply = chat.decode(tokens[:n])
            samples.append(
                Sample(
                    reply,
                    answers.read(reply, len(e.options)),
                    answers.is_right(reply, e.answer, len(e.options)),
                    float(logp[:n].mean()),
                    int(n),
                )
            )
        found.append(tuple(samples))
    return found


def choose(samples: Sequence[Sample], how: Choice) -> tuple[str | None, bool]:
    """(answer, whether it is right) that becomes of a question's samples; None is no answer."""
    match how:
        case "major":
            votes = Counter(s.read for s in samples if s.read is not None)
            if not votes:
                return None, False
            most = max(votes.values())
            picked = next(s for s in samples if votes.get(s.read, 0) == most)
        case "best":
            picked = max(samples, key=lambda s: s.logp)  # the first of equals
        case "pass":
            picked = next((s for s in samples if s.correct), samples[0])
        case _:
            raise ValueError(f"choice {how!r}; choose from {CHOICES}")
    return picked.read, picked.correct


def score(samples: Sequence[Sequence[Sample]], *, seed: int = 0) -> dict[str, metrics.PairMetrics]:
    """The metrics of each choice, of samples in pairs: real, counterfactual, real, ..."""
    found = {}
    for how in CHOICES:
        chosen = [choose(s, how) for s in samples]
        right = np.array([correct for _, correct in chosen], bool).reshape(-1, 2)
        read = [answer for answer, _ in chosen]
        found[how] = metrics.pair_metrics(right, list(zip(read[::2], read[1::2])), seed=seed)
    return found


def chosen(predictions: Sequence[Any], how: Choice) -> list[Any]:
    """The predictions of `run` as if each question had been answered so; for `run.compare`.

    Raises ValueError for predictions without samples.
    """
    if not all(p.samples for p in predictions):
        raise ValueError("these predictions have no samples; evaluate with ask.samples above 0")
    found = []
    for p in predictions:
        read, correct = choose(p.samples, how)
        found.append(p._replace(read=read, correct=correct))
    return found

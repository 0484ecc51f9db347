"""Evaluate a model on probes: policy questions, each asked alone on its own clip.

A probe's kind is its example's name up to the first "/" ("shift/3" is of kind "shift"). Replies are
greedy and graded by a reward; writes `predictions.jsonl` and `results.json` as `run` does. Where a
question is asked of both sides of a pair and both must be right, `run` is the one to use.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxvid import answers, hosts, rewards
from jaxvid.data import pipeline
from jaxvid.eval import asking, metrics
from jaxvid.eval.asking import Settings

Reward = Callable[[rewards.Case, str], rewards.Reward]


class Prediction(NamedTuple):
    """One reply, a line of predictions.jsonl."""

    record: str
    name: str  # of the example; unique in its record
    kind: str
    media: int
    prompt: str
    options: tuple[str, ...]
    answer: str
    reply: str
    read: str | None  # what stands in the answer tag, as the answer's form is read; None: unparsed
    correct: float  # 0 or 1, as the reward has it
    grade: float  # the reward's total
    tokens: int
    ended: bool  # by a stop token, not by max_tokens


class Score(NamedTuple):
    """Intervals are over records. `unparsed` is a share of all questions."""

    n: int
    records: int
    accuracy: metrics.Interval
    grade: metrics.Interval
    unparsed: float


class Results(NamedTuple):
    overall: Score
    kinds: dict[str, Score]
    predictions: list[Prediction]


def evaluate(
    model: nnx.Module,
    builder: pipeline.Builder,
    settings: Settings,
    reward: Reward,
    *,
    out: pathlib.Path | None = None,
    about: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Results:
    """Ask every policy question of `builder.data`'s split, once.

    With `out`, writes predictions.jsonl and results.json into that folder; `about` (which model,
    which config) goes into the results. Raises ValueError for a split without such a question.
    """
    builder = asking.controlled(builder, settings)
    numbered = pipeline.probes(builder.data, builder, **hosts.share())
    ask = lambda asked: _ask(model, asked, builder, settings, reward, mesh)
    predictions = asking.collect(numbered, settings, settings.rows, ask, _parsed)
    if not predictions:
        raise ValueError(
            f"split {builder.data.split!r} of {builder.data.shards} has no example of task "
            "'policy'; a probe is made of these"
        )
    results = grade(predictions, seed=settings.seed)
    if out is not None:
        write(out, results, builder, settings, about or {})
    return results


def _ask(
    model: nnx.Module,
    asked: list[pipeline.Prompts],
    builder: pipeline.Builder,
    settings: Settings,
    reward: Reward,
    mesh: Mesh | None,
) -> list[list[Prediction]]:
    trees = [tree for q in asked for tree in q.trees]
    replies = asking.greedy(model, trees, builder.chat, settings, mesh)
    found = []
    for question, reply in zip(asked, replies, strict=True):
        (e,) = question.examples
        graded = rewards.judged(reward(rewards.case(question.record, e), reply.text))
        found.append(
            [
                Prediction(
                    record=question.record.id,
                    name=e.name,
                    kind=e.name.partition("/")[0],
                    media=e.media,
                    prompt=e.prompt,
                    options=e.options,
                    answer=e.answer,
                    reply=reply.text,
                    read=read(e, reply.text),
                    correct=graded.correct,
                    grade=graded.total,
                    tokens=reply.tokens,
                    ended=reply.ended,
                )
            ]
        )
    return found


def read(question: rewards.Question, reply: str) -> str | None:
    """What the reply's answer tag states, read as the right answer is: an option's letter, yes or
    no, a time or number, a stretch of time, tracks, or else words. None is unparsed."""
    if question.options:
        return answers.choice(reply, len(question.options), tagged=True)
    bodies = answers.stated(reply, tagged=True)
    for reader in (answers.yes_no, answers.seconds, answers.interval, answers.tracks):
        if reader(question.answer) is not None:
            found = reader(bodies[0]) if len(set(bodies)) == 1 else None
            return None if found is None else str(found)
    return answers.words(reply, tagged=True)


def grade(predictions: list[Prediction], *, seed: int = 0) -> Results:
    """The scores of predictions, of all and of each kind in alphabetical order."""
    kinds = sorted({p.kind for p in predictions})
    of = lambda kind: [p for p in predictions if p.kind == kind]
    return Results(
        _score(predictions, seed), {kind: _score(of(kind), seed) for kind in kinds}, predictions
    )


def _score(predictions: list[Prediction], seed: int) -> Score:
    values = np.array([[p.correct, p.grade] for p in predictions], np.float64).reshape(-1, 2)
    groups = [p.record for p in predictions]
    intervals = metrics.clustered(values, groups, seed=seed)
    unparsed = sum(p.read is None for p in predictions) / len(predictions)
    return Score(len(predictions), len(set(groups)), *intervals, unparsed)


# Files ------------------------------------------------------------------------------------------


def write(
    folder: pathlib.Path,
    results: Results,
    builder: pipeline.Builder,
    settings: Settings,
    about: dict[str, Any],
) -> None:
    """predictions.jsonl and results.json; a kill in between leaves the old or the new, whole."""
    scores = {
        "overall": asking.plain(results.overall),
        "kinds": {kind: asking.plain(s) for kind, s in results.kinds.items()},
        "interval": f"{metrics.LEVEL:.0%}, bootstrap over records, {metrics.RESAMPLES} draws",
    }
    asking.write(folder, results.predictions, scores, builder, settings, about)


def load(folder: pathlib.Path) -> list[Prediction]:
    """The predictions that `write` left in a folder."""
    text = (folder / "predictions.jsonl").read_text()
    return [_parsed(json.loads(line)) for line in text.splitlines()]


def _parsed(row: dict[str, Any]) -> Prediction:
    return Prediction(**row | {"options": tuple(row["options"])})


def compare(
    after: list[Prediction], before: list[Prediction], *, seed: int = 0
) -> dict[str, metrics.Interval]:
    """Accuracy after - before, of all ("overall") and of each kind, on the same questions.

    Raises ValueError if they are not the same.
    """
    names = [[(p.record, p.name, p.prompt, p.answer) for p in side] for side in (after, before)]
    if not after or names[0] != names[1]:
        differ = sorted({n[:2] for n in set(names[0]) ^ set(names[1])})
        raise ValueError(
            f"the two probes asked different questions ({len(differ)} differ, e.g. {differ[:3]}); "
            "evaluate both on one split, with one limit"
        )
    gain = np.array([[a.correct - b.correct] for a, b in zip(after, before)])
    found = {}
    for kind in ("overall", *sorted({p.kind for p in after})):
        rows = [i for i, p in enumerate(after) if kind in ("overall", p.kind)]
        groups = [after[i].record for i in rows]
        (found[kind],) = metrics.clustered(gain[rows], groups, seed=seed)
    return found

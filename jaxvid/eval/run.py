"""Evaluate a model on pairs: one greedy reply to each side, graded by the strict reader, and, where
asked for, several sampled ones of which `votes` makes one answer.

Writes `predictions.jsonl` (a line per reply) and `results.json` (metrics with intervals, and every
setting that could move them). The controls are those of `asking`.

Left out: judging by another model, and benchmarks with formats of their own.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool

from jaxvid import answers, hosts
from jaxvid.data import pipeline
from jaxvid.eval import asking, metrics, votes
from jaxvid.rollout import sampler

SIDES = ("real", "counterfactual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(asking.Settings):
    """How to ask pairs; `limit` counts these. The main reply is greedy; `samples` further ones are
    drawn if above 0, by `seed` and the question's name."""

    category: str = "category"  # key of a record's `meta` to report by
    samples: int = 0  # N of Major@N and best of N
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.rows < 2:
            raise ValueError(f"rows {self.rows}; want at least 2, for both sides of a pair")
        if self.samples < 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"samples {self.samples}, temperature {self.temperature}, top_p {self.top_p}; want "
                "at least 0, above 0, and in (0, 1]. The main reply is greedy whatever they are"
            )


class Prediction(NamedTuple):
    """One reply, a line of predictions.jsonl."""

    record: str
    question: int  # which of the record's questions
    side: str
    category: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    reply: str
    read: str | None  # as the strict reader has it; None is unparsed
    correct: bool
    formatted: bool
    tokens: int
    ended: bool  # by a stop token, not by max_tokens
    samples: tuple[votes.Sample, ...] = ()  # further replies, drawn; in the file only if there


class Results(NamedTuple):
    overall: metrics.PairMetrics
    categories: dict[str, metrics.PairMetrics]
    formatted: float  # shares of all replies
    ended: float
    mean_tokens: float
    predictions: list[Prediction]  # real, counterfactual, real, ...
    votes: dict[str, metrics.PairMetrics]  # by `votes.CHOICES`; empty without samples


def evaluate(
    model: nnx.Module,
    builder: pipeline.Builder,
    settings: Settings,
    *,
    out: pathlib.Path | None = None,
    about: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Results:
    """Ask every pair of `builder.data`'s split, once.

    With `out`, writes predictions.jsonl and results.json into that folder; `about` (which model,
    which config) goes into the results.
    """
    builder = asking.controlled(builder, settings)
    numbered = _indexed(pipeline.questions(builder.data, builder, **hosts.share()))
    ask = lambda pairs: _ask(model, pairs, builder, settings, mesh)
    predictions = asking.collect(numbered, settings, settings.rows // 2, ask, _parsed)
    results = grade(predictions, seed=settings.seed)
    if out is not None:
        write(out, results, builder, settings, about or {})
    return results


def _indexed(
    numbered: Iterator[tuple[int, pipeline.Prompts]],
) -> Iterator[tuple[int, tuple[int, pipeline.Prompts]]]:
    """Each question of a pair with its index in its record. ValueError for other questions."""
    last, index = "", 0
    for n, question in numbered:
        media = tuple(e.media for e in question.examples)
        if media != (0, 1):
            raise ValueError(
                f"record {question.record.id!r} asks its question of media {media}; a pair has 0 "
                f"(real) and 1 (counterfactual). Leave records without both out of this split."
            )
        index = index + 1 if question.record.id == last else 0
        last = question.record.id
        yield n, (index, question)


def _ask(
    model: nnx.Module,
    pairs: list[tuple[int, pipeline.Prompts]],
    builder: pipeline.Builder,
    settings: Settings,
    mesh: Mesh | None,
) -> list[list[Prediction]]:
    """The two predictions of each pair."""
    trees = [t for _, q in pairs for t in q.trees]
    replies = asking.greedy(model, trees, builder.chat, settings, mesh)
    asked = [(i, q.record, e) for i, q in pairs for e in q.examples]
    drawn: list[tuple[votes.Sample, ...]] = [()] * len(asked)
    if settings.samples:
        sampling = sampler.Sampling(settings.max_tokens, settings.temperature, settings.top_p)
        drawn = votes.draw(
            model,
            [(f"{record.id}\0{e.name}\0{e.media}", e) for _, record, e in asked],
            trees,
            builder.chat,
            sampling,
            count=settings.samples,
            seed=settings.seed,
            rows=settings.rows,
            mesh=mesh,
        )
    found = []
    for (index, record, e), reply, samples in zip(asked, replies, drawn, strict=True):
        found.append(
            Prediction(
                record=record.id,
                question=index,
                side=SIDES[e.media],
                category=str(record.meta.get(settings.category, "uncategorised")),
                prompt=e.prompt,
                options=e.options,
                answer=e.answer,
                reply=reply.text,
                read=answers.read(reply.text, len(e.options)),
                correct=answers.is_right(reply.text, e.answer, len(e.options)),
                formatted=answers.formatted(reply.text),
                tokens=reply.tokens,
                ended=reply.ended,
                samples=samples,
            )
        )
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def grade(predictions: list[Prediction], *, seed: int = 0) -> Results:
    """The metrics of predictions in pairs: real, counterfactual, real, ..."""
    correct, read = outcomes(predictions)
    categories = [p.category for p in predictions[::2]]
    n = max(len(predictions), 1)
    return Results(
        metrics.pair_metrics(correct, read, seed=seed),
        metrics.by_category(correct, read, categories, seed=seed),
        sum(p.formatted for p in predictions) / n,
        sum(p.ended for p in predictions) / n,
        sum(p.tokens for p in predictions) / n,
        predictions,
        votes.score([p.samples for p in predictions], seed=seed)
        if any(p.samples for p in predictions)
        else {},
    )


def outcomes(
    predictions: list[Prediction],
) -> tuple[Bool[np.ndarray, "pairs 2"], list[tuple[str | None, str | None]]]:
    """(what was right, what was read) by pair; ValueError if the lines are not pairs."""
    real, other = predictions[::2], predictions[1::2]
    broken = [
        a.record
        for a, b in zip(real, other)
        if (a.record, a.question, a.side, b.side) != (b.record, b.question, *SIDES)
    ]
    if len(real) != len(other) or broken:
        raise ValueError(
            f"{len(predictions)} predictions are not pairs of a real and a counterfactual reply "
            f"{f'(first at record {broken[0]!r})' if broken else ''}; evaluate the split again"
        )
    correct = np.array([[a.correct, b.correct] for a, b in zip(real, other)], bool)
    return correct.reshape(-1, 2), [(a.read, b.read) for a, b in zip(real, other)]


def scores(results: Results, prefix: str = "eval_") -> dict[str, float]:
    """The numbers a training run logs while it validates."""
    o = results.overall
    return {
        f"{prefix}both": o.both.value,
        f"{prefix}real": o.real.value,
        f"{prefix}counterfactual": o.counterfactual.value,
        f"{prefix}unparsed": o.unparsed,
        f"{prefix}same": o.same,
        f"{prefix}formatted": results.formatted,
        f"{prefix}mean_tokens": results.mean_tokens,
    }


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
        "categories": {name: asking.plain(m) for name, m in results.categories.items()},
        "formatted": results.formatted,
        "ended": results.ended,
        "mean_tokens": results.mean_tokens,
        "interval": f"{metrics.LEVEL:.0%}, bootstrap over pairs, {metrics.RESAMPLES} draws",
    }
    if results.votes:
        scores["votes"] = {name: asking.plain(m) for name, m in results.votes.items()}
    asking.write(folder, results.predictions, scores, builder, settings, about)


def load(folder: pathlib.Path) -> list[Prediction]:
    """The predictions that `write` left in a folder."""
    text = (folder / "predictions.jsonl").read_text()
    return [_parsed(json.loads(line)) for line in text.splitlines()]


def _parsed(row: dict[str, Any]) -> Prediction:
    samples = tuple(votes.Sample(**s) for s in row.get("samples", ()))
    return Prediction(**row | {"options": tuple(row["options"]), "samples": samples})


def compare(
    after: list[Prediction], before: list[Prediction], *, seed: int = 0
) -> dict[str, metrics.Interval]:
    """after - before with intervals, on the same pairs; ValueError if they are not the same."""
    names = [[(p.record, p.question, p.answer) for p in side] for side in (after, before)]
    if names[0] != names[1]:
        differ = sorted({n[0] for n in set(names[0]) ^ set(names[1])})
        raise ValueError(
            f"the two evaluations asked different questions ({len(differ)} records differ, e.g. "
            f"{differ[:3]}); evaluate both on one split, with one limit"
        )
    return metrics.difference(outcomes(after)[0], outcomes(before)[0], seed=seed)

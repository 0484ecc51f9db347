"""Evaluate a model on pairs: one greedy reply to each side, graded by the strict reader, and, where
asked for, several sampled ones of which `votes` makes one answer.

Writes `predictions.jsonl` (a line per reply) and `results.json` (metrics with intervals, and every
setting that could move them). Controls tell what a score is made of:

    none      the clips as they are
    blank     every frame mid-grey: what the question and its options alone give away
    shuffled  frames in a drawn order: what remains without the order of events

Left out: judging by another model, and benchmarks with formats of their own.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, UInt8

from jaxvid import answers
from jaxvid.data import pipeline
from jaxvid.eval import metrics, votes
from jaxvid.rollout import sampler

SIDES = ("real", "counterfactual")
VERSIONS = ("jaxvid", "jax", "flax", "av", "pillow", "tokenizers")
READER = "jaxvid.answers, strict"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to ask. The main reply is greedy; `samples` further ones are drawn if above 0."""

    control: Literal["none", "blank", "shuffled"] = "none"
    max_tokens: int = 64
    rows: int = 64  # prompts at a time
    seed: int = 0  # of the shuffled control and of the intervals
    limit: int = 0  # only the first so many pairs; 0 is all
    category: str = "category"  # key of a record's `meta` to report by
    samples: int = 0  # N of Major@N and best of N
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0

    def __post_init__(self):
        if self.control not in ("none", "blank", "shuffled"):
            raise ValueError(f"control {self.control!r}; choose none, blank or shuffled")
        if self.rows < 2 or self.limit < 0:
            raise ValueError(f"rows {self.rows}, limit {self.limit}; want at least 2 and 0")
        if self.samples < 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"samples {self.samples}, temperature {self.temperature}, top_p {self.top_p}; want "
                "at least 0, above 0, and in (0, 1]. The main reply is greedy whatever they are"
            )


@dataclasses.dataclass(frozen=True)
class Blank:
    """Every pixel mid-grey. A hook of `pipeline.Builder.frames`."""

    grey: int = pipeline.GREY

    def __call__(
        self, frames: UInt8[np.ndarray, "F h w 3"], record: str
    ) -> UInt8[np.ndarray, "F h w 3"]:
        return np.full_like(frames, self.grey)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Frames in an order drawn from the seed and the record's id, never the true order.

    Both sides of a pair get the same order.
    """

    seed: int = 0

    def __call__(
        self, frames: UInt8[np.ndarray, "F h w 3"], record: str
    ) -> UInt8[np.ndarray, "F h w 3"]:
        n = len(frames)
        rng = np.random.default_rng((self.seed, zlib.crc32(record.encode())))
        order = rng.permutation(n)
        while n > 1 and (order == np.arange(n)).all():
            order = rng.permutation(n)
        return frames[order]


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
    hook = {"none": builder.frames, "blank": Blank(), "shuffled": Shuffled(settings.seed)}
    builder = dataclasses.replace(builder, frames=hook[settings.control])
    predictions: list[Prediction] = []
    for pairs in _chunks(pipeline.questions(builder.data, builder), settings):
        predictions += _ask(model, pairs, builder, settings, mesh)
    results = grade(predictions, seed=settings.seed)
    if out is not None:
        write(out, results, builder, settings, about or {})
    return results


def _chunks(
    questions: Iterator[pipeline.Prompts], settings: Settings
) -> Iterator[list[tuple[int, pipeline.Prompts]]]:
    """(index in its record, question) of so many pairs as fill the sampler's rows."""
    chunk, last, index = [], "", 0
    for n, question in enumerate(questions):
        if settings.limit and n == settings.limit:
            break
        media = tuple(e.media for e in question.examples)
        if media != (0, 1):
            raise ValueError(
                f"record {question.record.id!r} asks its question of media {media}; a pair has 0 "
                f"(real) and 1 (counterfactual). Leave records without both out of this split."
            )
        index = index + 1 if question.record.id == last else 0
        last = question.record.id
        chunk.append((index, question))
        if len(chunk) == settings.rows // 2:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ask(
    model: nnx.Module,
    pairs: list[tuple[int, pipeline.Prompts]],
    builder: pipeline.Builder,
    settings: Settings,
    mesh: Mesh | None,
) -> list[Prediction]:
    trees = [t for _, q in pairs for t in q.trees]
    out = sampler.generate_all(
        model,
        trees,
        builder.chat,
        sampler.Sampling(max_tokens=settings.max_tokens, temperature=0.0),
        group=1,
        keys=jax.random.split(jax.random.key(0), len(trees)),  # greedy: never looked at
        rows=settings.rows,
        mesh=mesh,
    )
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
    for row, (index, record, e) in enumerate(asked):
        tokens = int(out.length[row, 0])
        reply = builder.chat.decode(out.tokens[row, 0, :tokens])
        found.append(
            Prediction(
                record=record.id,
                question=index,
                side=SIDES[e.media],
                category=str(record.meta.get(settings.category, "uncategorised")),
                prompt=e.prompt,
                options=e.options,
                answer=e.answer,
                reply=reply,
                read=answers.read(reply, len(e.options)),
                correct=answers.is_right(reply, e.answer, len(e.options)),
                formatted=answers.formatted(reply),
                tokens=tokens,
                ended=bool(out.ended[row, 0]),
                samples=drawn[row],
            )
        )
    return found


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
        "overall": plain(results.overall),
        "categories": {name: plain(m) for name, m in results.categories.items()},
        "formatted": results.formatted,
        "ended": results.ended,
        "mean_tokens": results.mean_tokens,
        "interval": f"{metrics.LEVEL:.0%}, bootstrap over pairs, {metrics.RESAMPLES} draws",
    }
    if results.votes:
        scores["votes"] = {name: plain(m) for name, m in results.votes.items()}
    write_files(folder, results.predictions, scores, builder, settings, about)


def write_files(
    folder: pathlib.Path,
    predictions: Sequence[Any],  # NamedTuples
    scores: dict[str, Any],
    builder: pipeline.Builder,
    settings: Any,
    about: dict[str, Any],
) -> None:
    """What every kind of evaluation writes: a line per reply, its scores, and how it was made."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_line(p), ensure_ascii=False) for p in predictions]
    _replace(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    content = scores | {
        "reader": READER,
        "decoding": "greedy",
        "settings": dataclasses.asdict(settings),
        "data": dataclasses.asdict(builder.data),
        "vision": dataclasses.asdict(builder.prompting.vision),
        "device": jax.devices()[0].device_kind,
        "versions": {name: _version(name) for name in VERSIONS},
        "about": about,
    }
    _replace(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _line(prediction: Any) -> dict[str, Any]:
    """A prediction as JSON; samples are there only where some were drawn."""
    line = prediction._asdict()
    samples = line.pop("samples", ())
    return line | ({"samples": [s._asdict() for s in samples]} if samples else {})


def load(folder: pathlib.Path) -> list[Prediction]:
    """The predictions that `write` left in a folder."""
    text = (folder / "predictions.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    kept = lambda row: {
        "options": tuple(row["options"]),
        "samples": tuple(votes.Sample(**s) for s in row.get("samples", ())),
    }
    return [Prediction(**row | kept(row)) for row in rows]


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


def plain(m: Any) -> dict[str, Any]:
    """A NamedTuple of scores as JSON, its intervals too."""
    fields = m._asdict().items()
    return {k: v._asdict() if isinstance(v, metrics.Interval) else v for k, v in fields}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)

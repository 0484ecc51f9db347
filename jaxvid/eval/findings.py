"""What an evaluation of several stages amounts to: plain data, and its sentences.

`report.collect` makes a `Report` from a folder; `page` shows it.
"""

import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxvid.eval.charts import percent
from jaxvid.eval.metrics import Interval, PairMetrics
from jaxvid.eval.sampled import Sampled

SIDES = ("Real", "Counterfactual")
NAMES = {"base": "Base", "sft": "SFT", "dpo": "DPO", "dna": "DNA"}  # others as they are
ABOUT = {
    "base": "before any pairs",
    "sft": "taught answers on both videos of pairs",
    "dpo": "taught to prefer true descriptions to false ones",
    "dna": "reinforcement learning with the duality norm",
}
CONTROLS = {"none": "as filmed", "blank": "grey frames", "shuffled": "shuffled frames"}
Row = dict[str, float | int | None]  # a line of metrics.jsonl; has "step"


class Evaluation(NamedTuple):
    """`groups`: seen against held-out combinations; empty where the records do not say."""

    overall: PairMetrics
    categories: dict[str, PairMetrics]
    groups: dict[str, PairMetrics] = {}


class Stage(NamedTuple):
    name: str
    results: Evaluation | None = None  # None: not evaluated
    controls: dict[str, Evaluation] = {}  # by name: blank, shuffled
    curve: tuple[Row, ...] = ()
    sampled: tuple[Sampled, ...] = ()  # of a policy run


class Reply(NamedTuple):
    text: str
    read: str | None  # an option's letter; None is unparsed
    correct: bool


class Item(NamedTuple):
    """One pair of the gallery. Pairs of values are (real, counterfactual)."""

    pair: str
    edit: str
    category: str
    level: str
    premise: str
    question: str
    options: tuple[str, ...]
    answers: tuple[str, str]
    frames: tuple[UInt8[np.ndarray, "F h w 3"], UInt8[np.ndarray, "F h w 3"]]
    replies: dict[str, tuple[Reply, Reply]]  # by stage


class Gain(NamedTuple):
    """Accuracy after - before on the same pairs."""

    before: str
    after: str
    real: Interval
    counterfactual: Interval
    both: Interval


class Report(NamedTuple):
    title: str
    settings: dict[str, str]
    stages: tuple[Stage, ...]
    gallery: tuple[Item, ...] = ()
    gains: tuple[Gain, ...] = ()  # of neighbouring stages, and last of the last over the first
    chance: tuple[float, float] | None = None  # guessing: one side, and both
    missing: tuple[str, ...] = ()  # what was looked for and not there


def name(stage: str) -> str:
    return NAMES.get(stage, stage)


def headline(evaluated: Sequence[Stage]) -> str:
    """The finding in a sentence."""
    if not evaluated:
        return "No evaluation yet."
    first, last = evaluated[0], evaluated[-1]
    told = f"{name(last.name)} answers both videos right in {_both(last)} % of pairs"
    if first is last:
        return told + "."
    return told + f"; {name(first.name)} did in {_both(first)} %."


def _both(stage: Stage) -> str:
    return percent(stage.results.overall.both.value)


def evidence(report: Report, evaluated: Sequence[Stage]) -> str:
    """What stands beside the headline: the difference's interval, the blind control, chance."""
    told = []
    ends = (evaluated[0].name, evaluated[-1].name) if evaluated else ("", "")
    for gain in report.gains:
        if (gain.before, gain.after) == ends:
            g, n = gain.both, evaluated[-1].results.overall.pairs
            interval = f"95 % interval {points(g.low)} to {points(g.high)}"
            told.append(f"On the same {n} pairs the difference is {points(g.value)} points")
            told[-1] += f" ({interval})"
            told[-1] += ", which may be chance." if g.low <= 0 <= g.high else "."
    blank = evaluated[-1].controls.get("blank") if evaluated else None
    if blank is not None:
        told.append(
            f"Shown grey frames instead, {name(evaluated[-1].name)} gets "
            f"{percent(blank.overall.both.value)} %."
        )
    if report.chance is not None:
        told.append(f"Guessing would get {percent(report.chance[1])} %.")
    return " ".join(told)


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def mended(report: Report, evaluated: Sequence[Stage]) -> Item | None:
    """A pair that the last stage answers and the first did not; else the first of the gallery."""
    if not report.gallery:
        return None
    if len(evaluated) > 1:
        first, last = evaluated[0].name, evaluated[-1].name
        for item in report.gallery:
            if {first, last} <= set(item.replies):
                right = {s: all(r.correct for r in item.replies[s]) for s in (first, last)}
                if right[last] and not right[first]:
                    return item
    return report.gallery[0]


def option(item: Item, answer: str) -> str:
    """The letter with its option's text; a free answer as it is."""
    place = string.ascii_uppercase.find(answer) if len(answer) == 1 else -1
    return f"{answer} {item.options[place]}" if 0 <= place < len(item.options) else answer

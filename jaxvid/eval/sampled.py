"""Replies that a policy run sampled, for the report: read from its last table of rollouts.

WORKDIR/<stage>/rollouts/step-000020.parquet    a row for every reply (train/table.py)
"""

import pathlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow.parquet as pq

from jaxvid.eval.markup import Markup, el, join

COLUMNS = ("step", "record", "side", "branch", "prompt", "answer", "reply", "reward", "advantage")
LABELS = {"real": "Real", "counterfactual": "Counterfactual"}


class Sample(NamedTuple):
    """One reply; `advantage` None: its pair was not learned from."""

    text: str
    reward: float
    advantage: float | None


class Group(NamedTuple):
    """All replies to one prompt."""

    side: str
    answer: str
    samples: tuple[Sample, ...]


class Sampled(NamedTuple):
    """The groups of one pair."""

    step: int
    record: str
    question: str
    groups: tuple[Group, ...]


def read(folder: pathlib.Path, pairs: int) -> tuple[Sampled, ...]:
    """Some pairs of the last table in `folder`, drawn by their names and not by result."""
    tables = sorted(folder.glob("step-*.parquet"))
    if not tables:
        return ()
    rows = pq.read_table(tables[-1], columns=list(COLUMNS)).to_pylist()
    names = sorted({r["record"] for r in rows}, key=lambda n: (zlib.crc32(n.encode()), n))
    return tuple(_pair(name, [r for r in rows if r["record"] == name]) for name in names[:pairs])


def _pair(name: str, rows: list[dict]) -> Sampled:
    groups = []
    for side in dict.fromkeys(r["side"] for r in rows):
        mine = sorted((r for r in rows if r["side"] == side), key=lambda r: r["branch"])
        told = tuple(Sample(r["reply"], r["reward"], r["advantage"]) for r in mine)
        groups.append(Group(side, mine[0]["answer"], told))
    return Sampled(rows[0]["step"], name, rows[0]["prompt"], tuple(groups))


def cards(found: Sequence[Sampled]) -> list[Markup]:
    """A card a pair: the question, and a table of replies with what each earned."""
    return [_card(pair) for pair in found]


def _card(pair: Sampled) -> Markup:
    tables = [_table(group) for group in pair.groups]
    return el(
        "article",
        {"class": "card"},
        el("p", {"class": "tags"}, f"{pair.record}, update {pair.step}"),
        el("h3", {}, pair.question.partition("\nA. ")[0]),
        *tables,
    )


def _table(group: Group) -> Markup:
    heads = ("Reply", "Reward", "Advantage")
    rows = [
        el(
            "tr",
            {},
            el("td", {}, s.text or "(an empty reply)"),
            el("td", {}, f"{s.reward:.2f}"),
            el("td", {}, "not used" if s.advantage is None else _signed(s.advantage)),
        )
        for s in group.samples
    ]
    head = el("tr", {}, *(el("th", {"scope": "col"}, h) for h in heads))
    caption = el("caption", {}, f"{LABELS[group.side]} video, truth: {group.answer}")
    body = el("tbody", {}, join(rows))
    return el("table", {"class": "sampled"}, caption, el("thead", {}, head), body)


def _signed(x: float) -> str:
    return f"{x:+.2f}".replace("-", "\N{MINUS SIGN}")

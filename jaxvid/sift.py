"""A folder of shards filtered by temporal perplexity: what stays, and a listing of what does not.

By record by default: its mean over all answers decides, so that a pair stays whole. By example,
each goes by its own.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxvid.data import shards
from jaxvid.data.records import Record
from jaxvid.perplexity import Row, line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """Which samples stay. Of the two limits one is given."""

    above: float | None = None  # a TPL of at least this
    top: float | None = None  # this share, those of the largest TPL; ties go by their order
    by: Literal["record", "example"] = "record"  # what stays or goes; a pair is one record

    def __post_init__(self):
        if (self.above is None) == (self.top is None):
            raise ValueError("give one of --keep-above X and --keep-top SHARE")
        if self.top is not None and not 0 < self.top <= 1:
            raise ValueError(f"--keep-top {self.top}; give a share above 0 and at most 1")
        if self.by not in ("record", "example"):
            raise ValueError(f"by {self.by!r}; choose record or example")


class Left(NamedTuple):
    """What a filter left out, a line of left_out.jsonl. `tpl` None was not scored."""

    record: str
    example: str  # "" is the whole record
    tpl: float | None
    reason: str


def judged(rows: list[Row], by: str) -> dict[tuple[str, str], float]:
    """TPL of each sample, (record, example or ""): the mean over its answers."""
    values: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        values.setdefault((r.record, r.example if by == "example" else ""), []).append(r.tpl)
    return {key: float(np.mean(each)) for key, each in values.items()}


def keep(values: dict[tuple[str, str], float], how: Filter) -> set[tuple[str, str]]:
    """The samples that stay. Raises ValueError if none does."""
    if how.top is None:
        kept = {key for key, value in values.items() if value >= how.above}
    else:
        order = sorted(values, key=lambda key: -values[key])  # stable
        kept = set(order[: round(how.top * len(order))])
    if not kept:
        limit = f"at least {how.above}" if how.top is None else f"in the top {how.top}"
        raise ValueError(
            f"no {how.by} of {len(values)} is {limit}; the largest TPL is "
            f"{max(values.values()):.4g}"
        )
    return kept


def filtered(
    source: shards.Source, rows: list[Row], how: Filter, left: list[Left], about: dict[str, Any]
) -> Iterator[Record]:
    """The records that stay, `about` in their provenance; `left` gets what does not.

    By example, those of other tasks stay with their record, as long as one scored example does.
    Raises ValueError for an id that several folders have.
    """
    values, seen = judged(rows, how.by), set()
    kept = keep(values, how)
    note = {**about, "filter": dataclasses.asdict(how)}
    for i in range(len(source)):
        record = source[i]
        if record.id in seen:
            raise ValueError(f"record id {record.id!r} is there twice; filter each folder alone")
        seen.add(record.id)
        if how.by == "record":
            here, examples = [(record.id, "")], record.examples
            stays = here[0] in kept
        else:
            here = [(record.id, e.name) for e in record.examples if (record.id, e.name) in values]
            gone = set(here) - kept
            examples = tuple(e for e in record.examples if (record.id, e.name) not in gone)
            stays = len(gone) < len(here)
        for key in here:
            if key not in kept:
                reason = "below the limit" if key in values else "not scored"
                left.append(Left(*key, values.get(key), reason))
        if not here:
            left.append(Left(record.id, "", None, "not scored"))
        if stays:
            provenance = record.provenance | {"tpl": note}
            yield dataclasses.replace(record, examples=examples, provenance=provenance)


def write(
    source: shards.Source,
    rows: list[Row],
    how: Filter,
    out: pathlib.Path,
    about: dict[str, Any],
) -> tuple[shards.Written, list[Left]]:
    """A new folder of shards with what stays, and left_out.jsonl with what does not and its TPL."""
    left: list[Left] = []
    keep(judged(rows, how.by), how)  # said before the folder is made
    written = shards.write(out, filtered(source, rows, how, left, about), split=source.split)
    (out / "left_out.jsonl").write_text("".join(line(row) for row in left))
    return written, left

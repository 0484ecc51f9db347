"""What probes of shifted, muted and swapped sound amount to (THUD, arXiv 2605.16403).

Reads the predictions of `probe`: kinds "shift", "mute" and "swap" have options, "offset" is a time
in seconds, below 0 where the sound is early. Media 0 of a record is the original, whose right
answer says what a model blind to the intervention says; any other is intervened on.

Every measure is a share with its interval over records; unparsed replies are wrong, count as none
of the confusions, and have a share of their own. What a split has no question for is left out.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxvid import answers
from jaxvid.eval import metrics
from jaxvid.eval.probe import Prediction

KINDS = ("shift", "mute", "swap")


class _Count(NamedTuple):
    """One reply's part of a measure: it adds `value` to the numerator and 1 to the denominator."""

    record: str
    measure: str
    value: float


def measures(predictions: list[Prediction], *, seed: int = 0) -> dict[str, metrics.Interval]:
    """The measures by name. With "in sync" for the original's answer of the shift probe:

    KIND original, KIND intervened   accuracy on either
    average gap           mean over kinds of original - intervened
    combined              mean of original and intervened, over kinds
    three classes         mean accuracy on in sync, delayed and early: each counts a third
    offset blindness      says in sync, of the shifted
    direction confusion   says the other direction, of the shifted said to be out of sync
    false sync alarm      says out of sync, of the originals
    mute hallucination    says that something is heard, of the muted
    swap false match      says what is right of the original, of the swapped
    offset error          mean |said - true| seconds, of the shifted that are not said to be 0
    KIND unparsed         of all

    Raises ValueError for an intervened clip whose original was not asked.
    """
    names, records, sums = _sums(predictions)
    found = _derived(names, sums.sum(axis=0))
    drawn = [_derived(names, sums[d].sum(axis=0)) for d in _draws(len(records), seed)]
    return {n: _interval(value, [d[n] for d in drawn]) for n, value in found.items()}


def difference(
    after: list[Prediction], before: list[Prediction], *, seed: int = 0
) -> dict[str, metrics.Interval]:
    """after - before of each measure that both have, over the same records drawn for both.

    What makes a record hard for both cancels. Raises ValueError unless both were asked the same.
    """
    asked = [sorted((p.record, p.name, p.answer) for p in side) for side in (after, before)]
    if asked[0] != asked[1]:
        raise ValueError(
            f"{len(after)} replies after and {len(before)} before are not to the same questions; "
            "a paired difference needs one split, asked of both"
        )
    sides = [_sums(side) for side in (after, before)]
    draws = _draws(len(sides[0][1]), seed)
    found, drawn = [], []
    for names, _, sums in sides:
        found.append(_derived(names, sums.sum(axis=0)))
        drawn.append([_derived(names, sums[d].sum(axis=0)) for d in draws])
    return {
        n: _interval(found[0][n] - found[1][n], [a[n] - b[n] for a, b in zip(*drawn)])
        for n in found[0]
        if n in found[1]
    }


def _sums(
    predictions: list[Prediction],
) -> tuple[list[str], list[str], Float[np.ndarray, "records 2 n"]]:
    """Names of the counts, records, and each record's (numerator, denominator) of each count."""
    plain = _in_sync(predictions)
    counts = [c for p in predictions for c in _counts(p, plain)]
    names = sorted({c.measure for c in counts})
    records = sorted({c.record for c in counts})
    sums = np.zeros((len(records), 2, len(names)))
    row, column = ({n: i for i, n in enumerate(x)} for x in (records, names))
    for c in counts:
        sums[row[c.record], :, column[c.measure]] += (c.value, 1.0)
    return names, records, sums


def _draws(count: int, seed: int) -> list[Int[np.ndarray, " count"]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(count, size=count) for _ in range(metrics.RESAMPLES)]


def _interval(value: float, drawn: list[float]) -> metrics.Interval:
    tail = 100 * (1 - metrics.LEVEL) / 2
    low, high = (float(np.nanpercentile(drawn, at)) for at in (tail, 100 - tail))
    return metrics.Interval(value, low, high)


def _in_sync(predictions: list[Prediction]) -> dict[tuple[str, str], str]:
    """(record, kind) -> the right answer's words on the original."""
    return {(p.record, p.kind): _words(p, p.answer) for p in predictions if p.media == 0}


def _words(p: Prediction, letter: str | None) -> str:
    """What a letter stands for; an open answer or an unparsed one as it is."""
    if letter is None:
        return ""
    return p.options[answers.letters(len(p.options)).index(letter)] if p.options else letter


def _counts(p: Prediction, originals: dict[tuple[str, str], str]) -> list[_Count]:
    if p.kind not in (*KINDS, "offset"):
        return []
    if (p.record, p.kind) not in originals:
        raise ValueError(
            f"record {p.record!r}: {p.name!r} is of an intervened clip, and the original was not "
            "asked; ask both, with a limit that parts none"
        )
    said, true, plain = _words(p, p.read), _words(p, p.answer), originals[p.record, p.kind]
    changed, parsed = p.media != 0, p.read is not None
    out = {f"{p.kind} unparsed": not parsed}
    if p.kind == "offset":
        now, right = (answers.seconds(x) if x else None for x in (said, true))
        if changed and now:
            out["offset error"] = abs(now - right)
        return [_Count(p.record, k, float(v)) for k, v in out.items()]
    out[f"{p.kind} {'intervened' if changed else 'original'}"] = said == true
    if p.kind == "shift":
        out[f"class {true}"] = said == true
        if changed:
            out["offset blindness"] = said == plain
            if parsed and said != plain:
                out["direction confusion"] = said != true
        else:
            out["false sync alarm"] = parsed and said != plain
    elif changed:
        name = "mute hallucination" if p.kind == "mute" else "swap false match"
        out[name] = parsed and (said != true if p.kind == "mute" else said == plain)
    return [_Count(p.record, k, float(v)) for k, v in out.items()]


def _derived(names: list[str], sums: Float[np.ndarray, "2 n"]) -> dict[str, float]:
    """Shares, and what is made of them. A share of nothing is not a number."""
    share = {n: a / b if b else np.nan for n, a, b in zip(names, *sums)}
    out = {n: float(v) for n, v in share.items() if not n.startswith("class ")}
    classes = [v for n, v in share.items() if n.startswith("class ")]
    sides = [
        (share[f"{k} original"], share[f"{k} intervened"])
        for k in KINDS
        if f"{k} original" in share and f"{k} intervened" in share
    ]
    if len(classes) == 3:
        out["three classes"] = float(np.mean(classes))
    if sides:
        out["average gap"] = float(np.mean([a - b for a, b in sides]))
        out["combined"] = float(np.mean(sides))
    return out

"""A run of several stages as one HTML file that needs nothing but itself.

    WORKDIR/shards                                      the records, for clips and held-out marks
    WORKDIR/<stage>/metrics.jsonl, config.json          the training log, and its settings
    WORKDIR/<stage>/rollouts/                           tables of what a policy run sampled
    WORKDIR/<stage>/eval/{none,blank,shuffled}/         results.json and predictions.jsonl

for the stages base, sft, dpo and dna. What is not there is left out of the page, which says so.
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxvid.data import media, shards
from jaxvid.data.records import Record
from jaxvid.eval import metrics, page, run, sampled
from jaxvid.eval.findings import Evaluation, Gain, Item, Reply, Report, Row, Stage, name
from jaxvid.eval.metrics import Interval, PairMetrics
from jaxvid.eval.run import Prediction

STAGES = ("base", "sft", "dpo", "dna")
STARTS = {"sft": "base", "dpo": "sft", "dna": "sft"}
CONTROLS = ("blank", "shuffled")
SAMPLED = 3  # pairs of a table of rollouts
FRAMES, PIXELS = 8, 96 * 96  # of a gallery clip: enough to see, and 12 pairs stay under 1 MB


def write(out: pathlib.Path, report: Report) -> pathlib.Path:
    """The page as a file at `out`; a kill leaves the old file or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    # A reply may hold half a surrogate pair, which UTF-8 cannot.
    partial.write_bytes(page.page(report).encode("utf-8", "replace"))
    os.replace(partial, out)
    return out


def collect(
    workdir: pathlib.Path, *, title: str = "", pairs: int = 12, stages: Sequence[str] = STAGES
) -> Report:
    """What a work folder holds, with `pairs` of its evaluated pairs shown.

    Raises FileNotFoundError if none of the stages is there, ValueError for files that do not hold
    what they should.
    """
    runs = [_Run(workdir / stage) for stage in stages]
    there = [r for r in runs if r.results or r.curve]
    if not there:
        raise FileNotFoundError(
            f"{workdir} has none of the stages {', '.join(stages)} with a metrics.jsonl or an "
            f"eval/none/results.json. Name the folder that holds the stages' folders."
        )
    missing = [lack for r in runs for lack in r.missing()]
    asked = {r.stage: r.predictions for r in there if r.predictions}
    records: dict[str, Record] = {}
    held_out: dict[str, bool] = {}
    if not (workdir / "shards" / "manifest.json").exists():
        missing.append("shards, and so the clips and the held-out combinations")
    elif asked:
        chosen = choose(next(iter(asked.values())), pairs)
        split = next(r.results["none"]["data"]["split"] for r in there if "none" in r.results)
        records, held_out = _read(workdir / "shards", split, chosen)
    gains, lacks = _gains(asked)
    return Report(
        title=title or f"Report of {workdir.resolve().name}",
        settings=_settings(there, records),
        stages=tuple(r.as_stage(held_out) for r in there),
        gallery=tuple(_item(record, asked) for record in records.values()),
        gains=gains,
        chance=_chance(next(iter(asked.values()), [])),
        missing=(*missing, *lacks),
    )


class _Run:
    """The files of a stage, as far as they are there."""

    def __init__(self, folder: pathlib.Path):
        self.stage, self.curve = folder.name, _lines(folder / "metrics.jsonl")
        self.sampled = sampled.read(folder / "rollouts", SAMPLED)
        self.results: dict[str, dict[str, Any]] = {}
        for control in ("none", *CONTROLS):
            path = folder / "eval" / control / "results.json"
            if path.exists():
                self.results[control] = json.loads(path.read_text(encoding="utf-8"))
        saved = folder / "config.json"
        self.config = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
        replied = (folder / "eval" / "none" / "predictions.jsonl").exists()
        self.predictions = run.load(folder / "eval" / "none") if replied else []

    def missing(self) -> list[str]:
        """What is not there, in words."""
        if not self.results and not self.curve:
            return [f"stage {name(self.stage)}"]
        lacks = []
        if "none" not in self.results:
            lacks.append(f"evaluation of {name(self.stage)}")
        else:
            absent = [c for c in CONTROLS if c not in self.results]
            lacks += [f"control {c} of {name(self.stage)}" for c in absent]
            if not self.predictions:
                lacks.append(f"replies of {name(self.stage)}")
        if not self.curve:
            lacks.append(f"training log of {name(self.stage)}")
        return lacks

    def training(self) -> str:
        """How it was trained, by its log and, where there is one, its saved config."""
        told = f"{max(row['step'] for row in self.curve)} updates"
        if not self.config:
            return told
        by = self.config["optimizer"]
        return (
            f"{told} of {self.config['data']['pairs']} records, {by['class']} at {by['lr']:g}, "
            f"seed {self.config['seed']}"
        )

    def as_stage(self, held_out: dict[str, bool]) -> Stage:
        found = {c: _evaluation(r) for c, r in self.results.items()}
        own = found.pop("none", None)
        if own is not None and held_out and self.predictions:
            own = own._replace(groups=_groups(self.predictions, held_out))
        return Stage(self.stage, own, found, tuple(self.curve), self.sampled)


def _lines(path: pathlib.Path) -> list[Row]:
    """The log's lines. One cut off by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def _evaluation(results: dict[str, Any]) -> Evaluation:
    categories = {k: _metrics(m) for k, m in results["categories"].items()}
    return Evaluation(_metrics(results["overall"]), categories)


def _metrics(plain: dict[str, Any]) -> PairMetrics:
    of = {k: Interval(**v) if isinstance(v, dict) else v for k, v in plain.items()}
    return PairMetrics(**of)


def _groups(predictions: list[Prediction], held_out: dict[str, bool]) -> dict[str, PairMetrics]:
    """Metrics of seen and of held-out combinations, where the records tell them apart."""
    correct, read = run.outcomes(predictions)
    if not {p.record for p in predictions} <= set(held_out):
        return {}
    told = {True: "held-out combinations", False: "seen combinations"}
    labels = [told[held_out[p.record]] for p in predictions[::2]]
    found = metrics.by_category(correct, read, labels)
    return dict(sorted(found.items(), reverse=True))  # seen first


def _gains(asked: dict[str, list[Prediction]]) -> tuple[tuple[Gain, ...], list[str]]:
    """Each stage against the one it starts from (the one before it, where that was not asked), then
    the last against the first; and which differences could not be made."""
    start = lambda before, after: STARTS[after] if STARTS.get(after) in asked else before
    steps = [(start(before, after), after) for before, after in itertools.pairwise(asked)]
    if len(asked) > 2:
        steps.append((next(iter(asked)), next(reversed(asked))))
    gains, lacks = [], []
    for before, after in steps:
        try:
            found = run.compare(asked[after], asked[before])
        except ValueError:
            lacks.append(
                f"difference of {name(after)} from {name(before)}, which were asked different "
                f"questions"
            )
            continue
        gains.append(Gain(before, after, found["real"], found["counterfactual"], found["both"]))
    return tuple(gains), lacks


def _chance(predictions: list[Prediction]) -> tuple[float, float] | None:
    """Expected accuracy of guessing an option, on one side and on both."""
    counts = [len(p.options) for p in predictions[::2]]
    if not counts or not all(counts):
        return None
    n = len(counts)
    return sum(1 / c for c in counts) / n, sum(1 / c**2 for c in counts) / n


# Gallery ----------------------------------------------------------------------------------------


def choose(predictions: list[Prediction], count: int) -> list[str]:
    """Record ids in turn from every category, in an order drawn from the ids alone."""
    categories: dict[str, list[str]] = {}
    for p in sorted(predictions, key=lambda p: hashlib.sha256(p.record.encode()).digest()):
        ids = categories.setdefault(p.category, [])
        if p.record not in ids:
            ids.append(p.record)
    turns = itertools.zip_longest(*(categories[c] for c in sorted(categories)))
    return [i for turn in turns for i in turn if i is not None][:count]


def _read(
    folder: pathlib.Path, split: str, chosen: list[str]
) -> tuple[dict[str, Record], dict[str, bool]]:
    """(the chosen records in order, whether each record of the split is a held-out one)."""
    found, held_out = {}, {}
    for record in shards.Source(folder, split):
        if record.id in chosen:
            found[record.id] = record
        if "held_out" in record.meta:
            held_out[record.id] = bool(record.meta["held_out"])
    return {i: found[i] for i in chosen if i in found}, held_out


def _item(record: Record, asked: dict[str, list[Prediction]]) -> Item:
    """A record's first question, and what every stage replied to it."""
    both = {
        stage: [p for p in predictions if p.record == record.id and p.question == 0]
        for stage, predictions in asked.items()
    }
    both = {stage: lines for stage, lines in both.items() if lines}
    real, other = next(iter(both.values()))
    sampling = media.Sampling(FRAMES, 0, 0, max_pixels=PIXELS, multiple=2)
    meta = record.meta
    return Item(
        pair=record.id,
        edit=str(meta.get("edit", "")),
        category=real.category,
        level=str(meta.get("level", "")),
        premise=str(meta.get("premise", "")),
        question=real.prompt.partition("\nA. ")[0] if real.options else real.prompt,
        options=real.options,
        answers=(real.answer, other.answer),
        frames=tuple(media.decode(m.data, sampling).frames for m in record.media[:2]),
        replies={
            stage: tuple(Reply(p.reply, p.read, p.correct) for p in lines)
            for stage, lines in both.items()
        },
    )


def _settings(runs: Sequence[_Run], records: dict[str, Record]) -> dict[str, str]:
    """What moves the numbers, for the foot of the page."""
    told = {}
    found = next((r.results["none"] for r in runs if "none" in r.results), None)
    if found is not None:
        data, asked = found["data"], found["settings"]
        sampling = data["sampling"]
        told["Pairs"] = f"{found['overall']['pairs']} of the {data['split']} split"
        size = f"{sampling['width']} \N{MULTIPLICATION SIGN} {sampling['height']} pixels"
        size = size if sampling["height"] else f"up to {sampling['max_pixels']} pixels"
        told["Frames seen"] = f"{sampling['frames']} of {size}"
        told["Decoding"] = f"{found['decoding']}, at most {asked['max_tokens']} tokens"
        told["Reader"] = found["reader"]
        told["Intervals"] = found["interval"]
        told["Device"] = found["device"]
        told["Versions"] = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    for r in runs:
        if r.curve:
            told[f"Training of {name(r.stage)}"] = r.training()
    for record in itertools.islice(records.values(), 1):
        made = record.provenance
        parts = [
            str(made[k]) if k == "tool" else f"{k} {made[k]}" for k in ("tool", "seed") if k in made
        ]
        told["Clips"] = ", ".join([*parts, record.licence])
    return told

"""Step pairs from a model's own replies, as shards for PreferenceRun with PDPO: `jaxvid steps`.

    WORKDIR/journal.jsonl   a line per record: its preferences and counts; what a kill leaves
    WORKDIR/shards          the records with their media, once all are made
    WORKDIR/summary.json    counts, shares, and why questions, steps and alternatives were left out

A run that was stopped goes on after the last whole group of `steps.records`, and makes the same
bytes as one that was not. So does one with another `steps.limit`: what is made is kept.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from tqdm import tqdm

from jaxvid import config, files, rewards, sharding
from jaxvid.config import StepsRun
from jaxvid.data import records, shards
from jaxvid.data.records import Example, Record
from jaxvid.rollout import contrast, steps


def run(run: StepsRun, workdir: pathlib.Path) -> dict[str, Any]:
    """Make the pairs of every policy question of the split; returns the summary.

    Raises ValueError for settings that are not those of what
    WORKDIR holds, for questions that cannot be used, and if no pair was found.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"pairs are made in one process and there are {jax.process_count()}; start it on one "
            "host, with as many devices as that has"
        )
    rewards.check(run.reward)
    source = _source(run)
    saved = json.loads(json.dumps(config.plain(run)))
    _same_settings(workdir, saved)
    lines = _journal(workdir, run.steps.records, len(source))
    if len(lines) < len(source):
        _make(run, source, workdir, len(lines))
        lines = _journal(workdir, run.steps.records, len(source))
    summary = summarise([line["tally"] for line in lines])
    if not any(line["examples"] for line in lines):
        raise ValueError(
            f"no pair came of {summary['questions']} questions: {summary['left out']}. Ask more "
            "questions, sample more paths, or set steps.keep any_wrong"
        )
    found = (
        _record(record, line, saved)
        for record, line in zip(source, lines, strict=True)
        if line["examples"]
    )
    written = shards.write(workdir / "shards", found, split=run.data.split, replace=True)
    summary["records written"] = written.records
    files.write(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


class _Records:
    """The records of some folders one after the other, at most `limit` of them."""

    def __init__(self, sources: list[shards.Source], limit: int):
        self.sources, whole = sources, sum(map(len, sources))
        self.count = min(whole, limit) if limit else whole

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Record]:
        return self.starting(0)

    def starting(self, first: int) -> Iterator[Record]:
        """From record number `first` on; the ones before it are not read."""
        places = ((s, i) for s in self.sources for i in range(len(s)))
        return (s[i] for s, i in itertools.islice(places, first, self.count))


def _source(run: StepsRun) -> _Records:
    if run.data.tasks != ("policy",):
        raise ValueError(f"data.tasks is {run.data.tasks}; step pairs are made of ('policy',)")
    return _Records([shards.Source(f, run.data.split) for f in run.data.shards], run.steps.limit)


def _same_settings(workdir: pathlib.Path, saved: dict[str, Any]) -> None:
    """Write config.json; raise ValueError where a run with other settings, but for its limit, is
    there."""
    path = workdir / "config.json"
    if path.is_file():
        before = json.loads(path.read_text())
        before["steps"]["limit"] = saved["steps"]["limit"]
        changed = config.differences(before, saved)
        if changed:
            raise ValueError(
                f"{workdir} holds pairs made with other settings ({'; '.join(changed)}); give "
                "another --workdir, or the settings of before"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n")


def _journal(workdir: pathlib.Path, group: int, count: int) -> list[dict[str, Any]]:
    """The journal's lines of the first `count` records; fewer, in whole groups, where a kill left
    it unfinished: what is half-written is cut off."""
    path = workdir / "journal.jsonl"
    if not path.is_file():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if len(whole) < count:
        whole = whole[: len(whole) - len(whole) % group]
        files.write(path, "".join(whole))
    return [json.loads(line) for line in whole[:count]]


def _make(run: StepsRun, source: _Records, workdir: pathlib.Path, done: int) -> None:
    """Append the records from number `done` on to the journal, a group at a time."""

    def right(record: Record, e: Example, text: str) -> bool:
        return rewards.judged(run.reward(rewards.case(record, e), text)).correct > 0

    size, rest = run.steps.records, source.starting(done)
    group = list(itertools.islice(rest, size))
    steps.check(group, right)  # before a model is read
    mesh = sharding.make_mesh(run.replica, run.fsdp, run.tensor, run.context)
    with jax.set_mesh(mesh), tqdm(total=len(source), initial=done, unit="record") as bar:
        loaded = config.load_model(run, mesh)
        builder = config.make_builder(run.model, loaded.cfg, run.data)
        seen = loaded.cfg.vision
        parts = steps.Parts(
            model=nnx.merge(loaded.graph, loaded.params),
            builder=builder,
            perturb=contrast.Noised(run.steps.noise, seen.image_mean, seen.image_std, run.seed),
            right=right,
            settings=run.steps,
            seed=run.seed,
            mesh=mesh,
        )
        while group:
            steps.check(group, right)
            _append(workdir / "journal.jsonl", steps.make(parts, group))
            bar.update(len(group))
            group = list(itertools.islice(rest, size))


def _append(path: pathlib.Path, made: list[steps.Made]) -> None:
    rows = [
        {
            "record": m.record,
            "examples": [dataclasses.asdict(e) for e in m.examples],
            "notes": m.notes,
            "tally": m.tally,
        }
        for m in made
    ]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _record(record: Record, line: dict[str, Any], saved: dict[str, Any]) -> Record:
    """The record with its preferences in place of its examples, and where they came from."""
    if record.id != line["record"]:
        raise ValueError(
            f"the journal has {line['record']!r} where the shards have {record.id!r}: they have "
            "changed since the run began. Give another --workdir"
        )
    return dataclasses.replace(
        record,
        examples=tuple(records.example(e) for e in line["examples"]),
        schema=records.SCHEMA,
        provenance={
            "tool": "jaxvid steps",
            "model": saved["model"],
            "seed": saved["seed"],
            "settings": saved["steps"],
            "reward": saved["reward"],
            "examples": line["notes"],
            "source": record.provenance,
        },
    )


def summarise(tallies: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all records, shares of them, and the reasons for leaving out."""
    total: Counter = Counter()
    for tally in tallies:
        total.update(tally)
    names = ("questions", "kept", "paths", "paths right", "steps", "steps compared")
    counts = {name: total[name] for name in (*names, "rolled out", "step pairs", "path pairs")}
    left_out = {name: n for name, n in sorted(total.items()) if n and "left out: " in name}
    rolled = total["rolled out"]
    return {
        "records": len(tallies),
        **counts,
        "mean p": total["p"] / rolled if rolled else None,
        "left out": left_out,
    }


def told(summary: dict[str, Any]) -> str:
    """The summary as lines of text."""
    mean, left = summary["mean p"], summary["left out"]
    plain = {k: v for k, v in summary.items() if k not in ("mean p", "left out")}
    lines = [f"{name}: {count}" for name, count in plain.items()]
    lines.append(f"mean p of alternatives: {'none rolled out' if mean is None else f'{mean:.3f}'}")
    return "\n".join([*lines, *(f"  {name}: {count}" for name, count in left.items())])

"""Adversarial preferences of the laptop world: VideoPASTA (https://arxiv.org/abs/2504.14096).

The same clips as the world's shards, told again. A general question has one chosen description and
three rejected ones, each wrong on one axis; on each axis one question of choice has an adversary
that believes what it is told. What is asked here no other recipe asks:

    none     three wrong options and "none of the above"; its control `listed` has the right one too
    premise  a false statement, its correction among the options; in its control `so` it is true

The paper's adversaries are written by a frozen video model that sees too few frames. Here a false
sentence is made by construction, so it is known to be false, and on which axis.

    swap     what is true, on that axis, of another clip, with the same outcome where there is one:
             over a split the chosen and the rejected sentences are the same, so that texts alone
             tell nothing
    bend     the clip's own truth, mirrored, in another order or all at once, or cut in two: as the
             paper's prompts ask for; some of these can be told by their words
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from data_gen.procedural import tell
from data_gen.procedural.motion import plan
from data_gen.procedural.scene import Scene, Thing, generator
from jaxvid.data.records import Example, Record, Response
from jaxvid.data.shards import Source

AXES = ("spatial", "temporal", "crossframe")
DESCRIBE = "Describe the clip."
SAID = {
    "spatial": "It starts at the {}.",
    "temporal": "Its path is {}.",
    "crossframe": "The small shape goes from {}.",
}
ASKED = {
    "spatial": ("start", "Where does it start?"),
    "temporal": ("path", "Which way does it move?"),
    "crossframe": ("crossing", "Which way does the small shape go?"),
}
CROSSINGS = ("left to right", "right to left", "top to bottom", "bottom to top")
# What stands in for values that a handful of clips does not have.
MORE = {
    "spatial": tuple(f"{row} {column}" for row in tell.ROWS for column in tell.COLUMNS),
    "temporal": ("still", "left", "right", "up", "down"),
    "crossframe": CROSSINGS,
}
TWO_SHAPES = "The small shape at the start and at the end are two shapes."
NONE, SO = "none of the above", "it is so"


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is true of one clip, and what is not: a value per axis."""

    record: str
    side: int
    look: str
    outcome: str
    true: dict[str, str]
    false: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def head(self) -> str:
        return f"A {self.look}: {self.outcome}."

    def caption(self, changed: dict[str, str] | None = None) -> str:
        """What the world says of the clip, with some sentences changed."""
        told = {a: SAID[a].format(v) for a, v in self.true.items()} | (changed or {})
        return " ".join([self.head, *(told[a] for a in AXES)])


def scene_of(record: Record) -> Scene:
    """The scene that a record of the laptop world was rendered from.

    Raises ValueError for a record of another source: only of the world everything is known.
    """
    if "scene" not in record.meta or "settings" not in record.provenance:
        raise ValueError(
            f"record {record.id!r} has no scene; adversaries are made of shards that "
            "`jaxvid-forge procedural` wrote"
        )
    told = dict(record.meta["scene"])
    for name in ("ordinary", "odd", "background", "effect_box"):
        told[name] = tuple(told[name])
    for name in ("subject", "other"):
        told[name] = Thing(**told[name])
    told["clutter"] = tuple((Thing(**thing), y, way) for thing, y, way in told["clutter"])
    return Scene(**told)


def clips_of(record: Record) -> list[Clip]:
    """What each of the record's clips shows; without false values yet."""
    scene = scene_of(record)
    frames = round(scene.seconds * record.provenance["settings"]["fps"])
    found = []
    for side, outcome in enumerate(record.meta["outcomes"]):
        known = {name: text for name, _, text in tell.small_questions(plan(scene, outcome, frames))}
        true = {axis: known[ASKED[axis][0]] for axis in AXES}
        found.append(Clip(record.id, side, scene.look, outcome, true))
    return found


def against(clips: list[Clip], seed: int) -> list[Clip]:
    """The clips with a false value on every axis: two clips that differ swap theirs.

    Partners have the same outcome where they can, so that the rest of a description does not give
    the lie away. A clip that is left over borrows from any other that differs.
    """
    false: list[dict[str, str]] = [{} for _ in clips]
    for axis in AXES:
        rng = generator(seed, f"pasta/{axis}")
        order, waiting = [int(i) for i in rng.permutation(len(clips))], []
        for same in (True, False):
            waiting = []
            for i in order:
                mate = next((j for j in waiting if _fits(clips[i], clips[j], axis, same)), None)
                if mate is None:
                    waiting.append(i)
                    continue
                waiting.remove(mate)
                false[i][axis], false[mate][axis] = clips[mate].true[axis], clips[i].true[axis]
            order = waiting
        for i in waiting:
            known = [c.true[axis] for c in clips if c.true[axis] != clips[i].true[axis]]
            others = known or [v for v in MORE[axis][:2] if v != clips[i].true[axis]]
            false[i][axis] = str(rng.choice(others))
    return [dataclasses.replace(c, false=f) for c, f in zip(clips, false)]


def _fits(one: Clip, other: Clip, axis: str, same: bool) -> bool:
    return one.true[axis] != other.true[axis] and (not same or one.outcome == other.outcome)


def bent(axis: str, truth: str, rng: np.random.Generator) -> str:
    """A false sentence made of the truth itself: `bend` of the module's head."""
    if axis == "spatial":
        if truth == "gone":
            return SAID[axis].format("centre middle")
        row, column = truth.split()
        other = lambda word, words: str(rng.choice([w for w in words if w != word]))
        row, column = (
            (other(row, tell.ROWS), column)
            if rng.random() < 0.5
            else (row, other(column, tell.COLUMNS))
        )
        return SAID[axis].format(f"{row} {column}")
    if axis == "temporal":
        parts = truth.split(", then ")
        if len(parts) == 1:  # a change that never comes
            more = rng.choice([w for w in ("still", "left", "right", "up", "down") if w != truth])
            return SAID[axis].format(f"{truth}, then {more}")
        if parts[::-1] != parts and rng.random() < 0.5:
            return SAID[axis].format(", then ".join(parts[::-1]))
        return SAID[axis].format(" and ".join(dict.fromkeys(parts)) + " at once")
    if rng.random() < 0.5:
        return TWO_SHAPES
    return SAID[axis].format(CROSSINGS[1 - CROSSINGS.index(truth)])


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question of choice, its reply, and the reply of one who believes the false value."""

    kind: str  # none, listed, premise or so
    axis: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    chosen: str
    rejected: str


def questions(clip: Clip, pool: dict[str, list[str]], rng: np.random.Generator) -> list[Asked]:
    """Two questions on every axis; half of them are controls."""
    found = []
    for axis in AXES:
        truth, lie = clip.true[axis], clip.false[axis]
        others = _others(axis, pool[axis], (truth, lie), rng)
        absent = rng.random() < 0.5
        three = [lie if absent else truth, *others]
        listed = (*(three[i] for i in rng.permutation(3)), NONE)
        asked, kind = ASKED[axis][1], "none" if absent else "listed"
        right, wrong = ((truth, NONE), (lie, lie)) if absent else ((truth, truth), (lie, NONE))
        found.append(_asked(kind, axis, asked, listed, right, wrong))
        false = rng.random() < 0.5
        four = [SO, truth if false else lie, *others]
        listed = tuple(four[i] for i in rng.permutation(4))
        asked = f"Is it so? {SAID[axis].format(lie if false else truth)}"
        right, wrong = ((truth, truth), (lie, SO)) if false else ((truth, SO), (lie, lie))
        found.append(_asked("premise" if false else "so", axis, asked, listed, right, wrong))
    return found


def _asked(kind, axis, question, options, right, wrong) -> Asked:
    """`right` and `wrong` are (what is thought, the option that follows from it)."""
    letter = lambda option: tell.LETTERS[options.index(option)]
    reply = lambda thought, option: tell.reasoned(thought, letter(option))
    prompt = tell.choice_prompt(question, options)
    return Asked(kind, axis, prompt, options, letter(right[1]), reply(*right), reply(*wrong))


def _others(
    axis: str, pool: list[str], taken: tuple[str, str], rng: np.random.Generator
) -> list[str]:
    """Two more values, as often each as they are true."""
    drawn = dict.fromkeys([*(pool[i] for i in rng.permutation(len(pool))), *MORE[axis]])
    return list(itertools.islice((v for v in drawn if v not in taken), 2))


@dataclasses.dataclass(frozen=True)
class How:
    """What is made of a clip."""

    seed: int
    adversaries: Literal["swap", "bend"] = "swap"  # of the general question
    specific: bool = True  # also a preference on each axis, between two replies
    across: bool = False  # also the chosen words about the pair's other clip, as a rejected reply


def told(record: Record, clips: list[Clip], pool: dict[str, list[str]], how: How) -> Record:
    """The record with its own clips and these examples alone."""
    examples = []
    for clip in clips:
        rng = generator(how.seed, f"pasta/{record.id}/{clip.side}")
        examples += [_general(clip, clips, how, rng), *_specific(clip, pool, how, rng)]
    made = {"tool": "data_gen.pasta", "of": record.provenance} | dataclasses.asdict(how)
    return dataclasses.replace(
        record, id=f"pasta/{record.id}", examples=tuple(examples), provenance=made
    )


def _general(clip: Clip, clips: list[Clip], how: How, rng: np.random.Generator) -> Example:
    said = [Response(clip.caption(), "chosen")]
    for axis in AXES:
        false = SAID[axis].format(clip.false[axis])
        if how.adversaries == "bend":
            false = bent(axis, clip.true[axis], rng)
        said.append(Response(clip.caption({axis: false}), "rejected", axis))
    for other in clips if how.across else ():
        if other.caption() != clip.caption():
            said.append(Response(clip.caption(), "rejected", media=other.side))
    name = f"general {clip.side}"
    return Example(name, "preference", clip.side, DESCRIBE, (), clip.caption(), tuple(said))


def _specific(
    clip: Clip, pool: dict[str, list[str]], how: How, rng: np.random.Generator
) -> Iterator[Example]:
    """Each question as one to answer (policy) and to imitate (choice), half as a preference."""
    compared = {axis: int(rng.integers(2)) for axis in AXES}
    for i, q in enumerate(questions(clip, pool, rng)):
        named = f"{q.kind}-{q.axis}"
        asked = clip.side, q.prompt, q.options, q.answer
        yield Example(f"{named}/{clip.side}", "policy", *asked)
        reply = (Response(q.chosen),)
        yield Example(f"choice {named} {clip.side}", "choice", *asked, reply)
        if how.specific and compared[q.axis] == i % 2:
            pair = Response(q.chosen, "chosen", q.axis), Response(q.rejected, "rejected", q.axis)
            yield Example(f"prefer {named} {clip.side}", "preference", *asked, pair)


def records(source: Source | list[Record], how: How) -> Iterator[Record]:
    """The records told again. `source` is gone through twice: who swaps with whom is known after
    the first time. A function of the source and of `how` alone."""
    clips = against([c for record in source for c in clips_of(record)], how.seed)
    pool = {axis: [c.true[axis] for c in clips] for axis in AXES} | {"crossframe": list(CROSSINGS)}
    of: dict[str, list[Clip]] = {}
    for c in clips:
        of.setdefault(c.record, []).append(c)
    for record in source:
        yield told(record, of[record.id], pool, how)

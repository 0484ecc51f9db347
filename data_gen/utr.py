"""Video-UTR's dialogues (arXiv 2502.12081): what a box does over time, and where an action is.

Trajectories come from trackers, or from the laptop world, whose scenes say where everything is. A
record carries them in `meta["tracks"]`, one list a clip, in the order of its media:

    [{"name": "red car",                        what it is; unique in the clip
      "action": "turns left",                   what it does
      "seconds": [0.5, 2.0],                    when it does so; left out: as long as it is seen
      "confidence": 0.8,                        of the tracker; left out: 1
      "boxes": [[0.5, 0.1, 0.2, 0.3, 0.4]]}]    second, x0, y0, x1, y1 as shares of the frame

Texts name moments and boxes. `frame2` is the second of `moments` moments, the middles of equal
parts of the clip. A box `[x0,y0,x1,y1]` counts in whole numbers from 0 to `scale`, which is the
right or the lower edge of the frame. A track is `Name<id1>frame1:[x0,y0,x1,y1];frame2:[...]</id1>`.

    dialogues (sft)    temporal from spatial: a box at a moment -> action, track, what happens
                       spatial from temporal: an action in a stretch of time -> track
    graded (policy)    temporal/: what does the box do; spatial/: where is it at a moment (choices);
                       track/: where is it all the time (boxes). Also answered, for SFT (choice).
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_gen.procedural import draw, motion, tell
from data_gen.procedural.scene import Scene, Thing, generator, look
from jaxvid.data.records import Example, Record, Response

Box = tuple[int, int, int, int]
APART = 0.34  # most overlap of two boxes offered as different answers
FROZEN = "things freeze"  # what is seen stands still while the scene goes on


@dataclasses.dataclass(frozen=True)
class Asking:
    """How trajectories become text."""

    confidence: float = 0.5  # least that a tracker must give; below it a track is left out
    moments: int = 4  # at which boxes are named
    scale: int = 100  # what the far edges of the frame are in a box
    captions: bool = True  # ask "what happens" as well where the clip has a caption

    def __post_init__(self):
        if not 0 <= self.confidence <= 1 or self.moments < 2 or self.scale < 4:
            raise ValueError(
                f"confidence {self.confidence}, moments {self.moments}, scale {self.scale}; wanted "
                f"are 0 to 1, at least 2 and at least 4"
            )


class Track(NamedTuple):
    """A trajectory at the moments asked about."""

    name: str
    action: str
    boxes: dict[int, Box]  # by moment, from 1
    seconds: tuple[float, float]  # of the action


class Pool(NamedTuple):
    """What is true elsewhere in the data. Wrong options are right ones of other questions, so that
    no option is known by how often it is right."""

    counts: dict[str, int]  # how many tracks do this
    actions: tuple[str, ...]  # of the tracks asked about
    boxes: tuple[Box, ...]  # of these, at the moments asked about


# Tracks -------------------------------------------------------------------------------------------


def tracks(record: Record, asking: Asking) -> list[list[Track]]:
    """The tracks of each clip, seen at two moments at least, those below the confidence left out.

    Raises ValueError, which names the track and what it lacks, for a record without trajectories.
    """
    clips = record.meta.get("tracks")
    if clips is None:
        clips = world(record)
    if not isinstance(clips, list) or len(clips) != len(record.media):
        raise ValueError(
            f"record {record.id!r}: meta['tracks'] must be a list with one list of tracks for each "
            f"of its {len(record.media)} media"
        )
    found = []
    for side, (clip, item) in enumerate(zip(clips, record.media)):
        where = f"record {record.id!r}, media {side}"
        if clip and not item.seconds:
            raise ValueError(f"{where}: its length is not stated; set the medium's seconds")
        at = [f"{where}, track {i}" for i in range(len(clip))]
        read = [_track(row, item.seconds, asking, a) for row, a in zip(clip, at)]
        names = [row["name"] for row in clip]
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: two tracks have one name, of {sorted(names)}; number them")
        found.append([t for t in read if t is not None])
    return found


def _track(row: Any, seconds: float, asking: Asking, where: str) -> Track | None:
    """One row of the JSON form at the moments; None if too unsure or too short."""
    lacks = [k for k in ("name", "action", "boxes") if not (isinstance(row, dict) and row.get(k))]
    if lacks:
        raise ValueError(f"{where} has no {' and no '.join(lacks)}; it is {row!r:.80}")
    if set("<>;:\n") & set(row["name"]):
        raise ValueError(f"{where}: the name {row['name']!r} has a sign of the track text (<>;:)")
    bad = [b for b in row["boxes"] if len(b) != 5 or not all(map(math.isfinite, b))]
    bad += [b for b in row["boxes"] if not bad and (b[3] <= b[1] or b[4] <= b[2])]
    if bad:
        raise ValueError(f"{where}: box {bad[0]}; want [second, x0, y0, x1, y1] with an area")
    if row.get("confidence", 1.0) < asking.confidence:
        return None
    boxes, part = {}, seconds / asking.moments
    times = sorted(b[0] for b in row["boxes"])
    # As near as the tracker's own step, or there is a gap at that moment.
    near = min(part / 2, float(np.median(np.diff(times))) if len(times) > 1 else part)
    for k in range(1, asking.moments + 1):
        wanted = (k - 0.5) * part
        at, *box = min(row["boxes"], key=lambda b: abs(b[0] - wanted))
        inside = box[0] < 1 and box[1] < 1 and box[2] > 0 and box[3] > 0
        if abs(at - wanted) <= near + 1e-6 and inside:
            boxes[k] = whole(box, asking.scale)
    start, end = row.get("seconds", (times[0], times[-1]))
    return Track(row["name"], row["action"], boxes, (start, end)) if len(boxes) > 1 else None


def whole(box: Sequence[float], scale: int) -> Box:
    """A box in shares of the frame as whole numbers of `scale`, at least 1 wide and high."""
    low = [min(max(round(v * scale), 0), scale - 1) for v in box[:2]]
    high = [min(max(round(v * scale), a + 1), scale) for v, a in zip(box[2:], low)]
    return (*low, *high)


def world(record: Record) -> list[list[dict]]:
    """The tracks of a record of the laptop world, from its scene, at every frame.

    What is not shown or wholly behind the wall has no box; parts of a broken thing have none. A
    frozen picture shows no trajectory, so its clip has no tracks.
    """
    if "scene" not in record.meta:
        raise ValueError(
            f"record {record.id!r} has no trajectories: neither meta['tracks'] nor a scene of the "
            f"laptop world. Write a tracker's boxes into meta['tracks'] (docs/utr.md)."
        )
    scene = _scene(record.meta["scene"])
    count = round(scene.seconds * record.provenance["settings"]["fps"])
    plans = [motion.plan(scene, outcome, count) for outcome in record.meta["outcomes"]]
    return [[] if p.outcome == FROZEN else _seen(p) for p in plans]


def _scene(saved: dict) -> Scene:
    """The scene that `dataclasses.asdict` and JSON made of it."""
    thing = lambda d: Thing(**d)
    lists = {k: tuple(v) for k, v in saved.items() if isinstance(v, list) and k != "clutter"}
    clutter = tuple((thing(t), height, way) for t, height, way in saved["clutter"])
    parts = {"subject": thing(saved["subject"]), "other": thing(saved["other"]), "clutter": clutter}
    return Scene(**saved | lists | parts)


def _seen(plan: motion.Plan) -> list[dict]:
    scene, rows = plan.scene, []
    for actor in plan.actors:
        if actor.name.startswith("part"):
            continue
        boxes = []
        for f, u in enumerate(plan.u):
            box = draw.box(actor, f)
            covered = scene.family == "wall" and draw.covered(box)
            if actor.shown[f] and not covered:
                boxes.append([round(float(v), 4) for v in (u * scene.seconds, *box)])
        if boxes:
            size = "small " if actor.name.startswith("clutter") else ""
            name = size + look(actor.thing.colour, actor.thing.shape, "picture", "")
            rows.append({"name": name, "action": tell.movement(plan, [actor]), "boxes": boxes})
    return rows


# Texts --------------------------------------------------------------------------------------------


def box_text(box: Box) -> str:
    return f"[{','.join(map(str, box))}]"


def at_text(moment: int, box: Box) -> str:
    return f"frame{moment}:{box_text(box)}"


def track_text(track: Track) -> str:
    """`Name<id1>frame1:[...];frame2:[...]</id1>`, as `jaxvid.answers.tracks` reads it."""
    boxes = ";".join(at_text(k, b) for k, b in track.boxes.items())
    return f"{track.name}<id1>{boxes}</id1>"


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1)]
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    both = sides[0] * sides[1]
    return both / (area(a) + area(b) - both)


def pool(records: Iterable[Record], asking: Asking, seed: int) -> Pool:
    """What is asked about in all records that have tracks."""
    clips: list[tuple[str, int, list[Track]]] = []
    for record in records:
        try:
            found = tracks(record, asking)
        except ValueError:
            continue  # told where its own record is made
        clips += [(record.id, side, clip) for side, clip in enumerate(found) if clip]
    counts = collections.Counter(t.action for *_, clip in clips for t in clip)
    subjects = [asked_about(clip, counts, seed, name, side) for name, side, clip in clips]
    actions = tuple(track.action for track, _ in subjects)
    return Pool(dict(counts), actions, tuple(track.boxes[at] for track, at in subjects))


def asked_about(
    clip: list[Track], counts: Mapping[str, int], seed: int, name: str, side: int
) -> tuple[Track, int]:
    """The track that is asked about and at which moment; rare actions are asked about more often
    than common ones, since those are guessed without looking."""
    rng = generator(seed, f"utr/{name}/{side}")
    weights = np.array([1 / counts[t.action] for t in clip])
    track = clip[int(rng.choice(len(clip), p=weights / weights.sum()))]
    return track, int(rng.choice(list(track.boxes)))


def dialogues(
    clip: list[Track], side: int, caption: str, rng: np.random.Generator
) -> list[Example]:
    """Both directions for every track of a clip; an action of two tracks is not asked about."""
    examples = []
    for i, track in enumerate(clip):
        moment = int(rng.choice(list(track.boxes)))
        question = f"What is {at_text(moment, track.boxes[moment])} doing, and what is its whole "
        question += "trajectory?"
        answer = f"{track.action}\n{track_text(track)}"
        if caption:
            question += " By the way, what happens in this video?"
            answer += f"\n{caption}"
        examples.append(_said(f"temporal from spatial {side} {i}", side, question, answer))
        if [t.action for t in clip].count(track.action) == 1:
            first, last = min(track.boxes), max(track.boxes)
            start, end = track.seconds
            question = (
                f"Who or what does this from frame{first} to frame{last} ({start:.1f} to {end:.1f} "
                f"s): {track.action}? Where is it?"
            )
            name = f"spatial from temporal {side} {i}"
            examples.append(_said(name, side, question, track_text(track)))
    return examples


def _said(name: str, side: int, question: str, answer: str, task: str = "sft") -> Example:
    return Example(name, task, side, question, (), answer, (Response(answer),))


class Graded(NamedTuple):
    """A question whose answer is read strictly: from the answer tag, after a thought."""

    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    thought: str


def graded(track: Track, moment: int, known: Pool, rng: np.random.Generator) -> list[Graded]:
    """What can be asked of a track: `temporal`, `spatial` and `track`, the first two with options.

    Wrong places are where it is at other moments, and then those of other clips.
    """
    here, found = track.boxes[moment], []
    wrong = []
    for action in _drawn(known.actions, rng):
        if len(wrong) < 3 and action not in (track.action, *wrong):
            wrong.append(action)
    if len(wrong) == 3:
        question = f"What is {at_text(moment, here)} doing?"
        found.append(_choice("temporal", question, track.action, wrong, rng))
    wrong = []
    for box in (*track.boxes.values(), *_drawn(known.boxes, rng)):
        if len(wrong) < 3 and all(overlap(box, b) < APART for b in (here, *wrong)):
            wrong.append(box)
    if len(wrong) == 3:
        question = f"Where is the {track.name} in frame{moment}?"
        found.append(_choice("spatial", question, box_text(here), map(box_text, wrong), rng))
    first, last = min(track.boxes), max(track.boxes)
    question = f"Where is the {track.name} from frame{first} to frame{last}?"
    found.append(Graded("track", question, (), track_text(track), track.action))
    return found


def _drawn(items: Sequence, rng: np.random.Generator, most: int = 200) -> Iterator:
    """Some of a pool, in a drawn order."""
    for i in rng.integers(max(len(items), 1), size=most) if items else ():
        yield items[i]


def _choice(
    kind: str, question: str, truth: str, wrong: Iterable[str], rng: np.random.Generator
) -> Graded:
    listed = [truth, *wrong]
    options = tuple(listed[i] for i in rng.permutation(len(listed)))
    letter = tell.LETTERS[options.index(truth)]
    return Graded(kind, tell.choice_prompt(question, options), options, letter, truth)


# Records ------------------------------------------------------------------------------------------


def record(source: Record, known: Pool, asking: Asking, seed: int) -> Record:
    """The record of dialogues and graded questions on the clips of `source`.

    Each clip has graded questions of the same kinds, about one of its tracks. Raises ValueError if
    it has no trajectory to ask about.
    """
    clips = tracks(source, asking)
    rng = generator(seed, f"utr/{source.id}")
    examples, questions = [], []
    for side, clip in enumerate(clips):
        if clip:
            caption = _caption(source, side) if asking.captions else ""
            examples += dialogues(clip, side, caption, rng)
            track, moment = asked_about(clip, known.counts, seed, source.id, side)
            questions.append((side, graded(track, moment, known, rng)))
    if not examples:
        raise ValueError(
            f"record {source.id!r}: no track is seen at two of {asking.moments} moments with a "
            f"confidence of {asking.confidence}"
        )
    shared = set.intersection(*({q.kind for q in qs} for _, qs in questions))
    for side, each in questions:
        for q in each:
            if q.kind in shared:
                name = f"{q.kind}/{side}"
                examples.append(Example(name, "policy", side, q.prompt, q.options, q.answer))
                reply = Response(tell.reasoned(q.thought, q.answer))
                taught = f"{q.kind} taught {side}"
                examples.append(
                    Example(taught, "choice", side, q.prompt, q.options, q.answer, (reply,))
                )
    made = {"tool": "data_gen.utr", "seed": seed, "asking": dataclasses.asdict(asking)}
    return dataclasses.replace(
        source,
        id=f"utr/{source.id}",
        examples=tuple(examples),
        provenance=made | {"source": source.provenance},
    )


def records(
    found: Iterable[Record], known: Pool, asking: Asking, seed: int, faults: list[str]
) -> Iterator[Record]:
    """`record` of each; those that have none add a line of JSON with the reason to `faults`."""
    for source in found:
        try:
            yield record(source, known, asking, seed)
        except ValueError as error:
            faults.append(json.dumps({"record": source.id, "reason": str(error)}) + "\n")


def _caption(source: Record, side: int) -> str:
    """The clip's caption, or "" where it has none."""
    replies = [
        r.text
        for e in source.examples
        if e.task == "caption" and e.media == side
        for r in e.responses
        if r.role == "answer"
    ]
    return replies[0] if replies else ""

"""Shards to batches: shuffle, mix, decode, lay out, stack. Grain does the reading.

    record -> Builder -> trees -> (one update's records) -> layout.pack -> layout.stack -> Batch

Everything up to the batch is a function of (seed, index), so a stream's place is an index: resuming
is exact, whatever the number of workers and of processes. A record's trees (both sides of a duality
pair) are one group, so they are always in one micro-batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from jaxvid.batch import Batch
from jaxvid.data import layout, media, records, replies, shards, sound
from jaxvid.data.chat import Chat
from jaxvid.data.layout import Branch, Tree
from jaxvid.data.sidecar import Numbers, Sidecar
from jaxvid.data.stream import Items
from jaxvid.prompting import Medium, Prompting

SUPERVISED = ("sft", "choice", "caption")  # tasks whose `answer` responses are imitated
GREY = 128  # a blank clip's pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which records are read, and how they become batches."""

    shards: tuple[str, ...]  # folders, URLs or globs; each is one part of the mixture
    tasks: tuple[str, ...]  # the examples used: sft, choice, caption, preference, policy
    budget: layout.Budget  # rows are those of a micro-batch over all processes
    weights: tuple[float, ...] = ()  # of the parts; () is by their number of records
    split: str = "train"
    pairs: int = 16  # records per update, over all processes
    sampling: media.Sampling = media.Sampling()
    workers: int = 0  # processes that decode; 0 is a thread of this one
    cache: str = ""  # folder of decoded frames; "" decodes every time
    local: str = ""  # where shards of gs:// or s3:// are copied; "" is ~/.cache/jaxvid/shards
    sound: bool = False  # clips are heard as well, by a family that can
    questions: int = 0  # most supervised questions per clip, drawn anew each epoch; 0 is all
    blank: float = 0.0  # chance that a record's clips are shown as plain grey
    microbatches: int = 0  # per update; 0 is as many as needed, up to the next power of two

    def __post_init__(self):
        unknown = [t for t in self.tasks if t not in records.TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"data.tasks is {self.tasks}; choose from {records.TASKS}")
        if not self.shards:
            raise ValueError("data.shards is empty; name at least one folder of shards")
        if self.weights and (len(self.weights) != len(self.shards) or min(self.weights) <= 0):
            raise ValueError(
                f"data.weights is {self.weights} for {len(self.shards)} parts; give one number "
                f"above 0 for each, or none to mix by size"
            )
        if self.pairs < 1 or not 0 <= self.blank <= 1:
            raise ValueError(
                f"data.pairs is {self.pairs} and data.blank {self.blank}; they must be at least 1 "
                f"and between 0 and 1"
            )


@dataclasses.dataclass(frozen=True)
class Seen:
    """How a clip is taken where there is no data set: the part of `Data` that says so."""

    sampling: media.Sampling
    sound: bool = False
    cache: str = ""


class Prompts(NamedTuple):
    """One policy question: a tree per clip (real, then counterfactual) and what it asks of each."""

    record: records.Record
    trees: list[Tree]
    examples: list[records.Example]


def measured(told: media.Plan, family: Prompting, *, heard: bool, where: str) -> Medium:
    """A planned clip as the family's tokens depend on it; `heard`: a video's sound counts too.

    Raises ValueError, which names `where`, for what the family cannot take.
    """
    if told.kind not in family.markers:
        raise ValueError(
            f"{where} is {told.kind}, which this model does not take; use records with "
            f"{' or '.join(family.markers)}"
        )
    if heard and family.sound is None:
        raise ValueError(
            f"{where}: sound is asked for (data.sound, --sound), and this model does not hear; "
            "leave it out, or use a model with an audio tower"
        )
    hears = family.sound is not None and bool(told.sound) and (heard or told.kind == "audio")
    mels = sound.mel_frames(round(told.sound * family.sound.rate)) if hears else 0
    times = tuple(told.times.tolist())
    return Medium(told.kind, told.grid, told.seconds, mels, told.original, times)


@dataclasses.dataclass(frozen=True)
class Builder:
    """Makes the trees of a record. Pickled into workers with what it needs of the model."""

    chat: Chat
    prompting: Prompting
    data: Data | None  # None: clips alone are read, no records
    # What is done to a clip's frames before they are cut into patches (evaluation controls).
    frames: Callable[[UInt8[np.ndarray, "F h w 3"], str], UInt8[np.ndarray, "F h w 3"]] | None = (
        None
    )
    context: int = 0  # most tokens of a prompt that the model can take; 0 is not known
    sidecar: Sidecar | Numbers | None = None  # the reference's log-probs

    def __call__(self, record: records.Record, rng: np.random.Generator) -> list[Tree]:
        """The trees to train on: one per clip and, where supervised and preference mix, per task.

        Raises ValueError if the record has no example of the tasks asked for.
        """
        blank = bool(rng.random() < self.data.blank)
        keys = rng.random(len(record.examples))  # the same questions on both sides of a pair
        used = [e for e in record.examples if e.task in self.data.tasks]
        compared = [e for e in used if e.task == "preference"]
        asked = {
            side: self._drawn([e for e in used if e.media == side and e.task in SUPERVISED], keys)
            for side in range(-1, len(record.media))
        }
        needed = sorted({s for s, es in asked.items() if es} | {*replies.clips_of(compared)})
        clips = {side: self._clip(record, side, blank) for side in needed}
        kinds = {side: clip.kinds for side, clip in clips.items()}
        trees = []
        for side in (side for side in needed if asked[side]):
            branches = replies.supervised(asked[side], self.chat, kinds[side], max(side, 0))
            trees.append(self.tree(record.id, clips[side], None, branches))
        for side, found in replies.preferences(compared, self.chat, kinds).items():
            tree = self.tree(record.id, clips[side], found.question, found.branches)
            if self.sidecar is not None:
                tree = self.sidecar.attach(tree, record.media[side].data if side >= 0 else b"")
            trees.append(tree)
        if not trees:
            found = sorted({e.task for e in record.examples})
            raise ValueError(
                f"record {record.id!r} has no example of {self.data.tasks}, only of {found}. Set "
                f"data.tasks to what the shards hold, or leave these shards out."
            )
        return trees

    def count(self, record: records.Record) -> int:
        """How many questions `prompts` gives. Raises as it does for their number."""
        return len(self._sides(record)[0])

    def prompts(self, record: records.Record) -> list[Prompts]:
        """The policy questions of a record. The k-th question of each clip belong together."""
        sides = self._sides(record)
        clips = [self._clip(record, examples[0].media, False) for examples in sides]
        out = []
        for asked in zip(*sides):
            trees = [self.tree(record.id, clip, e.prompt, ()) for clip, e in zip(clips, asked)]
            out.append(Prompts(record, trees, list(asked)))
        return out

    def _sides(self, record: records.Record) -> list[list[records.Example]]:
        """The policy questions of each clip that has some, as many of each."""
        policy = [e for e in record.examples if e.task == "policy"]
        sides = [[e for e in policy if e.media == i] for i in sorted({e.media for e in policy})]
        if not sides:
            raise ValueError(
                f"record {record.id!r} has no policy question. Name shards that hold examples of "
                f"task 'policy'."
            )
        if len({len(examples) for examples in sides}) > 1:
            raise ValueError(
                f"record {record.id!r} has {[len(s) for s in sides]} policy questions on its "
                f"clips. Give every clip the same number: the k-th of each make a pair."
            )
        return sides

    def alone(self, record: records.Record) -> list[Prompts]:
        """The policy questions of a record, each by itself on its own clip."""
        asked = [e for e in record.examples if e.task == "policy"]
        clips = {i: self._clip(record, i, False) for i in sorted({e.media for e in asked})}
        tree = lambda e: self.tree(record.id, clips[e.media], e.prompt, ())
        return [Prompts(record, [tree(e)], [e]) for e in asked]

    def _drawn(self, examples: list[records.Example], keys: np.ndarray) -> list[records.Example]:
        most = self.data.questions
        if not most or len(examples) <= most:
            return examples
        return [examples[i] for i in sorted(np.argsort(keys[: len(examples)])[:most])]

    def _clip(self, record: records.Record, side: int, blank: bool) -> "Clip":
        """Decode a clip of the record and cut it into patches. -1 is no clip."""
        if side < 0:
            return Clip(None, None, side)
        item = record.media[side]
        how = {"kind": item.kind, "side": side, "blank": blank}
        try:
            return self.clip(item.data, record.id, self.data, **how)
        except media.MediaError as error:
            raise media.MediaError(f"record {record.id!r}, media {side}: {error}") from error

    def clip(
        self,
        data: bytes,
        name: str,
        how: Data | Seen,
        *,
        kind: str = "",
        side: int = 0,
        blank: bool = False,
    ) -> "Clip":
        """A medium from its bytes; its tokens are counted before a frame is decoded.

        `kind` is what it must be, "" anything. `name` is for errors, and seeds what is done to its
        frames. Raises ValueError where the model cannot take it, MediaError where it is broken.
        """
        family, where = self.prompting, f"record {name!r}, media {side}"
        told = media.plan(data, how.sampling, family.vision)
        if kind:
            media.require(told, kind, sound=how.sound and kind == "video")
        medium = measured(told, family, heard=how.sound, where=where)
        self._check_length(where, medium)
        patches = chunks = lengths = None
        if told.kind != "audio":
            patches = self._patches(data, name, how, blank)
        if medium.sound:
            samples = media.decode_sound(data, family.sound.rate)
            chunks, lengths = sound.chunks(samples, family.sound)
        return Clip(medium, layout.Clip(patches, told.grid, chunks, lengths), side)

    def _patches(self, data: bytes, name: str, how: Data | Seen, blank: bool):
        cache, vision = media.FrameCache(how.cache or None), self.prompting.vision
        frames = cache.decode(data, how.sampling, vision).frames
        if self.frames is not None:
            frames = self.frames(np.asarray(frames), name)
        if blank:
            frames = np.full_like(frames, GREY)
        return media.patchify(frames, vision)[0]

    def _check_length(self, where: str, medium: Medium) -> None:
        """Raise ValueError if the medium alone is longer than the model's context."""
        placed = self.prompting.expand(medium, self.chat.encode).ids
        if self.context and len(placed) >= self.context:
            raise ValueError(
                f"{where} is {len(placed)} tokens (a grid of {medium.grid} patches, {medium.sound} "
                f"log-mel frames); the model's context is {self.context}. Take fewer frames "
                "(sampling.frames, sampling.fps), smaller ones (sampling.height and width, "
                "max_pixels, total_pixels), or a shorter clip."
            )

    def tree(
        self, name: str, clip: "Clip", question: str | None, branches: tuple[Branch, ...]
    ) -> Tree:
        """A tree whose prompt ends with the clip, or with the question where there is one."""
        media_ = [clip.medium] if clip.medium else []
        kinds = clip.kinds
        placed = [self.prompting.expand(m, self.chat.encode) for m in media_]
        prompt = self.chat.prefix(kinds, [p.ids for p in placed])
        seen, heard = np.zeros_like(prompt), np.zeros_like(prompt)
        if placed:
            at = self.chat.starts(kinds, [len(p.ids) for p in placed])[0]
            here = slice(at, at + len(placed[0].ids))
            seen[here], heard[here] = placed[0].vision, placed[0].sound
        if question is not None:
            suffix = self.chat.suffix(question, kinds)
            prompt = np.concatenate([prompt, suffix])
            seen, heard = (np.pad(x, (0, len(suffix))) for x in (seen, heard))
        return layout.tree(
            name,
            prompt,
            self.prompting.positions(prompt, media_),
            self.prompting.vision,
            self.prompting.sound,
            clips=[clip.encoded] if clip.encoded else [],
            seen=seen,
            heard=heard,
            branches=branches,
        )


class Clip(NamedTuple):
    """A decoded clip, ready for a tree; without medium, none."""

    medium: Medium | None
    encoded: layout.Clip | None
    side: int

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.medium.kind,) if self.medium else ()


# Reading ----------------------------------------------------------------------------------------


def _sources(data: Data) -> list[shards.Source]:
    return [shards.Source(folder, data.split, local=data.local) for folder in data.shards]


def _identity(data: Data, seed: int, sources: list[shards.Source]) -> dict[str, Any]:
    """What the order of the records is a function of; plain JSON."""
    found = {"shards": [repr(s) for s in sources], "weights": list(data.weights)}
    return found | {"seed": seed, "pairs": data.pairs}


def _mixture(
    data: Data, seed: int, epochs: int | None, sources: list[shards.Source]
) -> grain.MapDataset:
    """(record, its own random numbers) of all parts, shuffled anew each epoch; endless if None."""
    parts = []
    for i, source in enumerate(sources):
        own = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])  # parts differ in order
        part = grain.MapDataset.source(source).seed(own).shuffle().repeat(epochs)
        parts.append(part.random_map(_with_rng))
    if len(parts) == 1:
        return parts[0]
    if epochs is not None and not data.weights:
        return grain.MapDataset.concatenate(parts)
    return grain.MapDataset.mix(parts, data.weights or [len(s) for s in sources])


def _with_rng(record: records.Record, rng: np.random.Generator):
    # Grain lends one generator to all elements; what is kept needs its own.
    return record, int(rng.integers(2**63))


@dataclasses.dataclass(frozen=True)
class _Pack:
    """One update's records -> Batch with a leading axis of micro-batches."""

    builder: Builder
    budget: layout.Budget  # of this process
    first: int  # index, in the update, of this process's first record

    def __call__(self, update: list) -> Batch:
        groups = []
        for i, (record, seed) in enumerate(update, self.first):
            trees = self.builder(record, np.random.default_rng(seed))
            groups.append([layout.numbered(t, record=i, pair=i) for t in trees])
        packed = layout.pack(groups, self.budget)
        count = self.builder.data.microbatches
        if count and len(packed) > count:
            raise ValueError(
                f"{len(update)} records need {len(packed)} micro-batches; data.microbatches is "
                f"{count}. Set it to {len(packed)} or more, or data.pairs to fewer."
            )
        return layout.stack(packed, count)


def _updates(
    data: Data,
    seed: int,
    process: int,
    processes: int,
    epochs: int | None,
    sources: list[shards.Source],
) -> grain.MapDataset:
    """Lists of (record, seed): the share of this process in each update."""
    _check_divides(data, processes)
    if processes > 1 and not data.microbatches:
        raise ValueError(
            "with several processes every one must make the same number of micro-batches: set "
            "data.microbatches"
        )
    records_ = _mixture(data, seed, epochs, sources).slice(slice(process, None, processes))
    return records_.batch(data.pairs // processes, drop_remainder=epochs is None, batch_fn=list)


def _check_divides(data: Data, processes: int) -> None:
    if data.pairs % processes or data.budget.rows % processes:
        raise ValueError(
            f"data.pairs {data.pairs} and budget.rows {data.budget.rows} must both divide over "
            f"{processes} processes"
        )


def batches(
    data: Data,
    builder: Builder,
    seed: int,
    *,
    process: int = 0,
    processes: int = 1,
    epochs: int | None = None,
) -> Items:
    """Batches, one an update, with a leading axis of micro-batches. `epochs` None never ends.

    The iterator's `get_state` and `set_state` resume exactly, also with another number of
    processes: the place is the number of updates. Element n depends on (data, seed, n) alone, not
    on `data.workers`.
    """
    sources = _sources(data)
    updates = _updates(data, seed, process, processes, epochs, sources)
    budget = dataclasses.replace(data.budget, rows=data.budget.rows // processes)
    pack = _Pack(builder, budget, process * (data.pairs // processes))
    return Items(updates.map(pack), _identity(data, seed, sources), workers=data.workers)


def update_ids(
    data: Data, seed: int, step: int, *, process: int = 0, processes: int = 1
) -> list[str]:
    """The ids of the records in the step-th batch (from 0): `Branches.record` indexes this list.

    With several processes, of this process's share. Reads the records again; for reports.
    """
    updates = _updates(data, seed, process, processes, None, _sources(data))
    return [r.id for r, _ in updates[step]]


@dataclasses.dataclass(frozen=True)
class _Ask:
    """One of a record's policy questions, drawn at random."""

    builder: Builder

    def __call__(self, drawn) -> Prompts:
        record, seed = drawn
        found = self.builder.prompts(record)
        return found[np.random.default_rng(seed).integers(len(found))]


def prompts(
    data: Data, builder: Builder, seed: int, *, process: int = 0, processes: int = 1
) -> Items:
    """Policy questions for the sampler, without end: (record, trees, examples).

    A record met again asks one of its questions drawn anew. Of several processes each has every
    so-many-th; the place is the number of questions taken by all, which must take equally many.
    """
    _check_divides(data, processes)
    sources = _sources(data)
    drawn = _mixture(data, seed, None, sources).slice(slice(process, None, processes))
    asked = drawn.map(_Ask(builder))
    of = _identity(data, seed, sources)
    return Items(asked, of, unit=processes, workers=data.workers, ahead=data.pairs)


def questions(
    data: Data, builder: Builder, *, process: int = 0, processes: int = 1
) -> Iterator[tuple[int, Prompts]]:
    """(number, question) of every policy question of the split, once, in the order of the shards:
    what is evaluated. A process has those of every so-many-th record."""
    yield from _numbered(data, builder.prompts, builder.count, process, processes)


def probes(
    data: Data, builder: Builder, *, process: int = 0, processes: int = 1
) -> Iterator[tuple[int, Prompts]]:
    """As `questions`, each alone on its own clip; a record without one is passed over."""
    count = lambda record: sum(e.task == "policy" for e in record.examples)
    yield from _numbered(data, builder.alone, count, process, processes)


def _numbered(data, build, count, process, processes) -> Iterator[tuple[int, Prompts]]:
    number = 0
    for k, record in enumerate(s[i] for s in _sources(data) for i in range(len(s))):
        if k % processes == process:
            found = build(record)
            yield from enumerate(found, number)
            number += len(found)
        else:
            number += count(record)  # of another process: its clips are not decoded here

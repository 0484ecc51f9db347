"""Scenes of `strikes` -> records of THUD's probes, its training data, and the base's.

intervened  clips original, shift, mute, swap; probes, answers and preferences on each
general     the original alone: what is seen and where, with preferences
base        one clip a record. What is heard is told from the picture, as large models do it;
            in the dark it is told from the sound
"""

import dataclasses
from typing import Literal

import numpy as np

from data_gen import sound
from data_gen.procedural import strikes
from data_gen.procedural.scene import generator
from data_gen.procedural.strikes import KINDS, Strikes
from data_gen.procedural.tell import LETTERS, choice_prompt, reasoned
from jaxvid.data import media
from jaxvid.data.records import Example, Media, Record, Response

LICENCE = "CC0-1.0"
NAMES = ("original", "shift", "mute", "swap")
ORIGINAL, SHIFT, MUTE, SWAP = range(4)
NOTHING = "nothing"
# Questions. A reply to one of the first four is a thought and an answer.
WHEN, HEARD = "When does the sound come?", "What is heard first?"
FITS, LATE = "Which things is the sound of?", "How late is the sound?"
SEEN, AUDIO, WHERE = "Describe what is seen.", "Describe what is heard.", "Where is the {kind}?"
TIMES = {0: "with the picture", 1: "after the picture", -1: "before the picture"}  # sign of D
MATCHES = ("of the things seen", "of other things")


@dataclasses.dataclass(frozen=True)
class Mix:
    """Which records are made."""

    show: Literal["intervened", "general", "base"] = "intervened"
    offsets: tuple[float, ...] = (0.4, 0.8, 1.2)  # seconds; as often later as earlier
    seconds: float = 3.2  # of a clip
    dark: float = 0.35  # base: share of clips in the dark
    intervened: float = 0.3  # base: share of the others that are intervened on
    mislabelled: float = 0.9  # base: share of these that are told as if they were not

    def __post_init__(self):
        for name in ("dark", "intervened", "mislabelled"):
            if not 0.0 <= vars(self)[name] <= 1.0:
                raise ValueError(f"Mix.{name}={vars(self)[name]}: a share is between 0 and 1")
        if not self.offsets or min(self.offsets) <= 0:
            raise ValueError(f"Mix.offsets={self.offsets}: give seconds above 0")


@dataclasses.dataclass(frozen=True)
class Picture:
    side: int = 64  # pixels
    fps: float = 12.5


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is true of one clip: landings as they are seen, and as they are heard."""

    seen: tuple[strikes.Landing, ...]
    heard: tuple[strikes.Landing, ...]
    offset: float = 0.0
    fits: bool = True


def chunk(seed: int, split: str, start: int, stop: int, picture: Picture, mix: Mix) -> list[Record]:
    """Records start..stop of a split."""
    return [record(seed, split, i, mix, picture) for i in range(start, stop)]


def record(seed: int, split: str, index: int, mix: Mix, picture: Picture) -> Record:
    """A record: a function of its arguments alone."""
    name = f"sound-{mix.show}-{split}/{index:06d}"
    rng = generator(seed, f"{name}/mix")
    offset = float(rng.choice(mix.offsets)) * (1 if index % 2 else -1)
    scene = strikes.strikes(seed, name, mix.seconds, offset, mix.offsets)
    clips, sounds = _sides(seed, name, scene, offset, mix)
    told, shown, dark = clips, range(4), False
    if mix.show == "general":
        shown = (ORIGINAL,)
    elif mix.show == "base":
        dark = bool(rng.random() < mix.dark)
        odd = rng.random() < mix.intervened
        if dark:
            side = MUTE if rng.random() < 0.1 else ORIGINAL
            told = {side: dataclasses.replace(clips[side], seen=())}
        else:
            side = int(rng.integers(1, 4)) if odd else ORIGINAL
            told = {side: clips[ORIGINAL if rng.random() < mix.mislabelled else side]}
        shown = (side,)
    frames = strikes.frames(scene, picture.side, picture.fps, dark=dark)
    items, examples = [], []
    for i, side in enumerate(shown):
        data = media.encode(frames, picture.fps, sounds[side], sound.RATE)
        _verify(data, sounds, side, offset)
        items.append(Media(NAMES[side], "video", data, scene.seconds))
        own = generator(seed, f"{name}/{side}")
        if mix.show == "general":
            examples += _general(told[side], i, own)
        else:
            examples += _examples(told[side], clips, i, side, mix)
            if mix.show == "base" and not dark:
                examples += _general(told[side], i, own)[2:]
    return Record(
        id=name,
        split=split,
        media=tuple(items),
        examples=tuple(examples),
        meta={
            "category": mix.show,
            "offset": offset,
            "dark": dark,
            "impacts": [round(e.time, 4) for e in scene.landings],
            "seen": [dataclasses.asdict(e) for e in scene.landings],
            "swapped": [dataclasses.asdict(e) for e in _other(seed, name, mix, scene).landings],
        },
        provenance={
            "tool": "data_gen.procedural.hear",
            "seed": seed,
            "mix": dataclasses.asdict(mix),
            "picture": dataclasses.asdict(picture),
        },
        licence=LICENCE,
    )


def _other(seed: int, name: str, mix: Mix, scene: Strikes) -> Strikes:
    """Whose sound a swap takes: as many landings, of kinds in another order."""
    kinds, attempt = [e.kind for e in scene.landings], 0
    while True:
        other = strikes.strikes(seed, f"{name}/swap{attempt}", mix.seconds, 0.0, mix.offsets)
        alike = [e.kind for e in other.landings]
        if len(alike) == len(kinds) and alike[0] != kinds[0] and alike != kinds:
            return other
        attempt += 1


def _sides(seed: int, name: str, scene: Strikes, offset: float, mix: Mix):
    """What is true of the four clips, and their sounds."""
    other, seen = _other(seed, name, mix, scene), scene.landings
    later = tuple(dataclasses.replace(e, time=e.time + offset) for e in seen)
    plain = strikes.sound(scene)
    tone = strikes.room_tone(seed, f"{name}/fill", len(plain))
    clips = {
        ORIGINAL: Clip(seen, seen),
        SHIFT: Clip(seen, later, offset),
        MUTE: Clip(seen, ()),
        SWAP: Clip(seen, other.landings, fits=False),
    }
    sounds = {
        ORIGINAL: plain,
        SHIFT: sound.moved(plain, offset, tone),
        MUTE: np.zeros_like(plain),
        SWAP: strikes.sound(other),
    }
    return clips, sounds


def _verify(data: bytes, sounds: dict[int, np.ndarray], side: int, offset: float) -> None:
    """The file's own offset is the one that is stated."""
    if side in (ORIGINAL, SHIFT):
        want = offset if side == SHIFT else 0.0
        heard = media.decode_sound(data, sound.RATE)
        found = sound.measured(sounds[ORIGINAL], heard, want)
        if abs(found - want) > sound.EXACT:
            raise ValueError(f"a shift of {want:g} s measures {found:g} s in the file")


# Words ------------------------------------------------------------------------------------------


def second(time: float) -> str:
    """A time to a fifth of a second."""
    return f"{round(time * 5) / 5:.1f}"


def listed(events: tuple[strikes.Landing, ...], *, timed: bool = False) -> str:
    """ "stone, then glass", or "stone at 1.2, then glass at 2.0"; or "nothing"."""
    return ", then ".join(f"{e.kind} at {second(e.time)}" if timed else e.kind for e in events) or (
        NOTHING
    )


def _instant(events: tuple[strikes.Landing, ...]) -> str:
    return second(events[0].time) if events else NOTHING


def _first(clip: Clip) -> str:
    return clip.heard[0].kind if clip.heard else NOTHING


def _thought(question: str, clip: Clip) -> str:
    if question == HEARD:
        return _first(clip)
    if question == FITS:
        return f"seen {listed(clip.seen)}; heard {listed(clip.heard)}"
    return f"seen {_instant(clip.seen)}, heard {_instant(clip.heard)}"


def _answer(question: str, clip: Clip) -> str:
    if question == HEARD:
        return _first(clip)
    if question == FITS:
        return MATCHES[0] if clip.fits else MATCHES[1]
    return TIMES[int(np.sign(clip.offset))]


# In one order: a small model that learns to hear need not also learn to look letters up. What a
# constant answer gives is in the measures.
OPTIONS = {
    WHEN: tuple(TIMES.values()),
    FITS: MATCHES,
    HEARD: (*KINDS, NOTHING),
    LATE: (),
}


def _reply(question: str, clip: Clip, options: tuple[str, ...]) -> str:
    if question == LATE:
        late = f"{abs(clip.offset):.1f}"
        return reasoned(_thought(question, clip), f"-{late}" if clip.offset < 0 else late)
    return reasoned(_thought(question, clip), LETTERS[options.index(_answer(question, clip))])


# Examples ---------------------------------------------------------------------------------------

PROBES = {WHEN: "shift", HEARD: "mute", FITS: "swap", LATE: "offset"}
ASKED = {  # of which clips each is asked
    WHEN: (ORIGINAL, SHIFT),
    LATE: (ORIGINAL, SHIFT),
    HEARD: (ORIGINAL, MUTE),
    FITS: (ORIGINAL, SWAP),
}


def _examples(
    clip: Clip, clips: dict[int, Clip], media_: int, side: int, mix: Mix
) -> list[Example]:
    """Probes, answers and preferences about one clip, told as `clip` says."""
    found = [
        _told("seen", media_, SEEN, listed(clip.seen, timed=True)),
        _told("audio", media_, AUDIO, listed(clip.heard, timed=True)),
    ]
    for question, sides in ASKED.items():
        if side not in sides and mix.show != "base":
            continue
        if not clip.seen and question != HEARD:  # in the dark nothing can be compared
            continue
        if not clip.heard and question in (WHEN, LATE, FITS):
            continue
        options = OPTIONS[question]
        prompt = choice_prompt(question, options) if options else question
        reply, name = _reply(question, clip, options), PROBES[question]
        letter = reply.partition("<answer>")[2].removesuffix("</answer>")
        task = "choice" if options else "sft"
        right = (Response(reply),)
        found.append(Example(f"{name} told {side}", task, media_, prompt, options, letter, right))
        if mix.show == "intervened":
            found.append(Example(f"{name}/{side}", "policy", media_, prompt, options, letter))
            other = clips[next(s for s in sides if s != side)]
            wrong = _reply(question, other, options)
            found.append(_compared(name, media_, prompt, reply, wrong, options, letter))
            found.append(_verdict(name, media_, prompt, reply, wrong, options))
    return found


def _told(name: str, media_: int, question: str, answer: str) -> Example:
    return Example(f"{name} {media_}", "sft", media_, question, (), answer, (Response(answer),))


def _compared(
    name: str,
    media_: int,
    prompt: str,
    chosen: str,
    rejected: str,
    options: tuple[str, ...] = (),
    answer: str = "",
) -> Example:
    replies = (Response(chosen, "chosen", "temporal"), Response(rejected, "rejected", "temporal"))
    return Example(
        f"{name} over {media_}", "preference", media_, prompt, options, answer or chosen, replies
    )


def _verdict(
    name: str, media_: int, prompt: str, right: str, wrong: str, options: tuple[str, ...]
) -> Example:
    """What is seen and heard, rightly told, and then the right answer over another.

    Two whole replies part in their thought, and there a margin is won: the answer that follows a
    right thought gets next to none of it. Here the thought is the same and stands before both.
    """
    thought, tag, answer = right.partition("<answer>")
    others = [wrong.partition(tag)[2]]
    if options == OPTIONS[WHEN]:  # the other direction too
        others = [f"{a}</answer>" for a, _ in zip(LETTERS, options) if f"{a}</answer>" != answer]
    told = (Response(answer, "chosen", "temporal"),)
    told += tuple(Response(o, "rejected", "temporal") for o in others)
    letter = answer.removesuffix("</answer>")
    return Example(
        f"{name} verdict {media_}",
        "preference",
        media_,
        prompt,
        options,
        letter,
        told,
        prefix=thought + tag,
    )


def _general(clip: Clip, media_: int, rng: np.random.Generator) -> list[Example]:
    """Description and localisation: true of the picture, against what is true of another."""
    told = listed(clip.seen, timed=True)
    kinds = [str(k) for k in rng.permutation([k for k in KINDS])[: len(clip.seen)]]
    other = [dataclasses.replace(e, kind=k) for e, k in zip(clip.seen, kinds)]
    if (wrong := listed(tuple(other), timed=True)) == told:
        wrong = listed(tuple(reversed(clip.seen)), timed=True)
    found = [_told("seen", media_, SEEN, told), _compared("seen", media_, SEEN, told, wrong)]
    for i, event in enumerate(clip.seen):
        options = tuple(str(p) for p in rng.permutation(list(strikes.COLUMNS)))
        prompt = choice_prompt(WHERE.format(kind=event.kind), options)
        elsewhere = str(rng.choice([p for p in strikes.COLUMNS if p != event.place]))
        right, wrong = (reasoned(p, LETTERS[options.index(p)]) for p in (event.place, elsewhere))
        letter, name = LETTERS[options.index(event.place)], f"where {i}"
        told = (Response(right),)
        found += [
            Example(f"{name} told", "choice", media_, prompt, options, letter, told),
            _compared(name, media_, prompt, right, wrong, options, letter),
            Example(f"where/{i}", "policy", media_, prompt, options, letter),
        ]
    return found

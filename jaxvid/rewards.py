"""What a completion earns by itself: answer and format, and length. A pair's reward: ops.duality.

Each reward is a small frozen dataclass; what it reads of an example is named by `Question`, so a
record of the data room fits and so does anything else that has those two fields. Replies are read
by `answers` alone: evaluation and reward can never disagree about what a reply said.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from jaxvid import answers


@runtime_checkable
class Question(Protocol):
    """The part of an example that a reward reads."""

    @property
    def options(self) -> tuple[str, ...]: ...

    @property
    def answer(self) -> str: ...


class Reward(NamedTuple):
    """The total, and its parts before weighting: `format` and `correct` are 0 or 1."""

    total: float
    format: float
    correct: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """R = r_f + r_c (METHODS: DNA-Train, arXiv 2512.24271): format of the whole reply, and answer.

    The answer is read from the answer tag alone. `gated` counts it only in a well-formed reply;
    then `correct` is 0 there too, so that a filter on accuracy sees what was paid.
    """

    format_weight: float = 1.0
    correct_weight: float = 1.0
    gated: bool = False

    def __call__(self, example: Question, completion: str) -> Reward:
        well_formed = answers.formatted(completion)
        right = answers.is_right(completion, example.answer, len(example.options), tagged=True)
        right = right and (well_formed or not self.gated)
        return Reward(
            self.format_weight * well_formed + self.correct_weight * right,
            float(well_formed),
            float(right),
        )


@dataclasses.dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of long replies (arXiv 2503.14476, eq. 13); buffer 0 turns it off.

    min(-(length - (limit - buffer)) / buffer * factor, 0), with `limit` the most tokens a reply
    may have, so that a reply cut off at the limit costs `factor`.
    """

    buffer: int = 0
    factor: float = 1.0

    def __call__(self, lengths: Int[np.ndarray, "*n"], limit: int) -> Float[np.ndarray, "*n"]:
        if self.buffer == 0:
            return np.zeros(lengths.shape, np.float32)
        if not 0 < self.buffer < limit:
            raise ValueError(
                f"overlong.buffer = {self.buffer} tokens, but a reply has at most {limit}; "
                f"set 0 < buffer < {limit}, or 0 for no punishment"
            )
        over = lengths - (limit - self.buffer)
        return np.minimum(-over / self.buffer * self.factor, 0.0).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """What the rewards below share: format and answer weighed as in `Answer`.

    `grade(answer, completion)` is in [0, 1], read from the answer tag alone; a reply of grade 1
    counts as correct.
    """

    format_weight: float = 1.0
    correct_weight: float = 1.0
    gated: bool = False

    def grade(self, answer: str, completion: str) -> float:
        raise NotImplementedError

    def __call__(self, example: Question, completion: str) -> Reward:
        well_formed = answers.formatted(completion)
        grade = self.grade(example.answer, completion)
        grade = grade if well_formed or not self.gated else 0.0
        total = self.format_weight * well_formed + self.correct_weight * grade
        return Reward(total, float(well_formed), float(grade == 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class YesNo(Graded):
    """1 for the right one of yes and no."""

    def grade(self, answer: str, completion: str) -> float:
        wanted = _usable(answers.yes_no(answer), answer, "yes or no")
        return float(answers.yes_no(completion, tagged=True) == wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number(Graded):
    """1 for a number no further from the answer than `tolerance`."""

    tolerance: float = 0.0

    def grade(self, answer: str, completion: str) -> float:
        wanted = _usable(answers.number(answer), answer, "a number")
        said = answers.number(completion, tagged=True)
        return float(said is not None and abs(said - wanted) <= self.tolerance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds(Graded):
    """A time, such as the offset between sound and picture: 1 up to `tolerance` seconds from the
    answer, falling to 0 at `reach`. The other direction (a sound called late that is early) earns
    nothing, however near."""

    tolerance: float = 0.2
    reach: float = 1.0

    def __post_init__(self):
        if not 0 <= self.tolerance < self.reach:
            raise ValueError(
                f"tolerance {self.tolerance} and reach {self.reach} s; give 0 <= tolerance < reach"
            )

    def grade(self, answer: str, completion: str) -> float:
        wanted = _usable(answers.seconds(answer), answer, "a time in seconds")
        said = answers.seconds(completion, tagged=True)
        if said is None or (wanted and np.sign(said) != np.sign(wanted)):
            return 0.0
        away = max(abs(said - wanted) - self.tolerance, 0.0)
        return max(1.0 - away / (self.reach - self.tolerance), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval(Graded):
    """Overlap of two stretches of time over what they cover together; at least `enough` is 1."""

    enough: float = 1.0

    def grade(self, answer: str, completion: str) -> float:
        wanted = _usable(answers.interval(answer), answer, "a stretch of time, such as 1.5 - 3 s")
        said = answers.interval(completion, tagged=True)
        if said is None:
            return 0.0
        both = max(min(said[1], wanted[1]) - max(said[0], wanted[0]), 0.0)
        union = max(said[1], wanted[1]) - min(said[0], wanted[0])
        overlap = both / union if union else float(said == wanted)
        return 1.0 if overlap >= self.enough else overlap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracks(Graded):
    """Overlap of boxes (intersection over union), averaged over all frames of all tracks that the
    answer or the reply has (Video-UTR, arXiv 2502.12081): what is missing and what is made up count
    as 0. At least `enough` is 1."""

    enough: float = 1.0

    def grade(self, answer: str, completion: str) -> float:
        wanted = _usable(answers.tracks(answer), answer, "tracks Name<id1>frame1:[...]</id1>")
        bodies = answers.stated(completion, tagged=True)
        said = answers.tracks(bodies[0]) if len(bodies) == 1 else None
        if said is None:
            return 0.0
        at = {(name, i) for found in (wanted, said) for name, boxes in found.items() for i in boxes}
        overlap = sum(_overlap(wanted.get(n, {}).get(i), said.get(n, {}).get(i)) for n, i in at)
        return 1.0 if overlap / len(at) >= self.enough else overlap / len(at)


def _overlap(a: answers.Box | None, b: answers.Box | None) -> float:
    if a is None or b is None:
        return 0.0
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    both = sides[0] * sides[1]
    return both / (area(a) + area(b) - both)


def _usable(value, answer: str, wanted: str):
    if value is None:
        raise ValueError(f"the example's answer is {answer!r}; this reward wants {wanted}")
    return value

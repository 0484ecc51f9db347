"""What a completion earns by itself: answer and format, and length. A pair's reward: ops.duality.

Each reward is a small frozen dataclass; what it reads of an example is named by `Question`, so a
record of the data room fits and so does anything else that has those two fields. Replies are read
by `answers` alone: evaluation and reward can never disagree about what a reply said. A function of
the user's own is a reward by its import path (`Function`), and is given a `Case`.
"""

import collections
import dataclasses
import functools
import importlib
import importlib.util
import math
import numbers
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

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


class Case(NamedTuple):
    """What a reply is an answer to, as a user's function gets it. Fits `Question`."""

    id: str  # of the record
    name: str  # of the question in its record
    prompt: str
    options: tuple[str, ...]
    answer: str  # the right letter, or text
    side: int  # which clip of the record it is about; of a pair 0 is real, 1 counterfactual
    meta: dict[str, Any]  # of the record: whatever columns it came with


def case(record: Any, example: Any) -> Case:
    """What a user's function gets for an example of a record, both of the data room."""
    asked = example.name, example.prompt, example.options, example.answer, example.media
    return Case(record.id, *asked, record.meta)


class Reward(NamedTuple):
    """The total, and its parts before weighting: `format` and `correct` are 0 or 1; `correct` is
    NaN where a reward does not say. `parts` are named values for the log."""

    total: float
    format: float
    correct: float
    parts: dict[str, float] = {}


def judged(found: Reward) -> Reward:
    """The reward itself, for uses that need to know what is right. Raises ValueError if it does not
    say."""
    if math.isnan(found.correct):
        raise ValueError(
            "the reward does not say whether the reply is right; let your function return a dict "
            "with 'correct', 0 or 1, among its values"
        )
    return found


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open(Graded):
    """A short text: 1 for the answer's own words ("exact"), or the F1 of shared words ("words", as
    SQuAD has it), which is 1 from `enough` on. The answer may list alternatives: "a ball | a disc".

    Words are compared in lower case without punctuation at their ends. Letters that look alike are
    not alike.
    """

    match: Literal["exact", "words"] = "exact"
    enough: float = 1.0

    def grade(self, answer: str, completion: str) -> float:
        wanted = [_words(a) for a in answer.split("|")]
        _usable(all(wanted) or None, answer, "a short text, or some separated by |")
        stated = answers.stated(completion, tagged=True)
        said = _words(stated[0]) if len(stated) == 1 else []
        if self.match == "exact":
            return float(said in wanted)
        best = max(_f1(said, w) for w in wanted)
        return 1.0 if best >= self.enough else best


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByAnswer:
    """For records of mixed questions: the reward that fits the right answer's form.

    Options: `Answer`. "yes": `YesNo`. "3": `Number`. "1.5 s": `Seconds`. "1 - 2 s": `Interval`.
    Tracks: `Tracks`. Any other text: `Open`. The settings are those of the rewards they name.
    """

    format_weight: float = 1.0
    correct_weight: float = 1.0
    gated: bool = False
    number_tolerance: float = 0.0
    seconds_tolerance: float = 0.2
    seconds_reach: float = 1.0
    overlap_enough: float = 1.0  # of intervals and tracks

    def fitting(self, example: Question) -> Callable[[Question, str], Reward]:
        """The reward of this example."""
        names = ("format_weight", "correct_weight", "gated")
        shared = {name: getattr(self, name) for name in names}
        answer = example.answer
        if example.options:
            return Answer(**shared)
        if answers.tracks(answer):
            return Tracks(enough=self.overlap_enough, **shared)
        if answers.yes_no(answer):
            return YesNo(**shared)
        if answers.number(answer) is not None and _bare(answer):
            return Number(tolerance=self.number_tolerance, **shared)
        if answers.seconds(answer) is not None:
            reach = {"tolerance": self.seconds_tolerance, "reach": self.seconds_reach}
            return Seconds(**reach, **shared)
        if answers.interval(answer) is not None:
            return Interval(enough=self.overlap_enough, **shared)
        return Open(**shared)

    def __call__(self, example: Question, completion: str) -> Reward:
        return self.fitting(example)(example, completion)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function of your own, `(case, completion) -> float or dict`, by its import path.

    `path` is "package.module:name" or "folder/file.py:name". A dict gives named values, logged as
    rewards/NAME; the reward is their sum, each times its weight (1 unless `weights` names it). A
    value named "correct", 0 or 1, says whether the reply is right: filters on accuracy and the pair
    reward need it. What it raises or returns beside finite numbers costs the group of replies its
    place in the update (train/groups.py).
    """

    path: str
    weights: tuple[tuple[str, float], ...] = ()

    def __call__(self, example: Question, completion: str) -> Reward:
        found, weights = loaded(self.path)(example, completion), dict(self.weights)
        named = found if isinstance(found, dict) else {}
        for name, value in named.items() if named else [("its value", found)]:
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(
                    f"{self.path} returned {name} = {value!r}; a reward is a finite number, or a "
                    "dict of named ones"
                )
        if unknown := sorted(weights.keys() - named.keys()):
            raise ValueError(f"weights name {unknown}; {self.path} returned {sorted(named)}")
        values = {name: float(value) for name, value in named.items()}
        total = sum(weights.get(n, 1.0) * v for n, v in values.items()) if named else float(found)
        correct = values.pop("correct", math.nan)
        if correct not in (0.0, 1.0) and not math.isnan(correct):
            raise ValueError(f"{self.path} returned correct = {correct}; it is 0 or 1")
        return Reward(total, float(answers.formatted(completion)), correct, values)


@functools.cache
def loaded(path: str) -> Callable[[Question, str], float | dict[str, float]]:
    """The function of an import path. Raises ValueError that says what is missing."""
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(
            f"reward.path is {path!r}; give package.module:function or file.py:function"
        )
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(pathlib.Path(where).stem, where)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"reward.path {path!r}: {error}") from error
    function = vars(module).get(name)
    if not callable(function):
        there = sorted(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise ValueError(f"reward.path {path!r}: no function {name!r} there; it has {there}")
    return function


def check(reward: object) -> None:
    """Say at once, by ValueError, where a reward is a function that is not there."""
    if isinstance(reward, Function):
        loaded(reward.path)


def _words(text: str) -> list[str]:
    found = (w.strip(".,;:!?\"'()") for w in text.casefold().split())
    return [w for w in found if w]


def _f1(said: list[str], wanted: list[str]) -> float:
    shared = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _bare(answer: str) -> bool:
    """Whether a number stands without a unit."""
    return answer.strip().rstrip(".")[-1].isdigit() and " " not in answer.strip()


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

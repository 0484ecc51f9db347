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

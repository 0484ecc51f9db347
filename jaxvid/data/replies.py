"""A record's examples as the branches of its clips' trees: questions, prefixes, replies.

    supervised    clip | question answer | question answer | ...
    preference    clip question | chosen | rejected | rejected
                  clip | question | prefix | step | step | ... | question ...

One question of preferences ends the prompt; several are branches of the clip. What is asked or said
before the scored replies is an unscored branch, and stands once.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxvid.data import records
from jaxvid.data.chat import Chat
from jaxvid.data.layout import Branch
from jaxvid.data.records import Example, Response


def supervised(
    asked: Sequence[Example], words: Chat, kinds: tuple[str, ...], side: int
) -> tuple[Branch, ...]:
    """Each question with its answer; the answer is scored.

    A question with several answers is an unscored branch, and its answers continue it.
    """
    branches: list[Branch] = []
    for e in asked:
        question = words.suffix(e.prompt, kinds)
        none = np.zeros(len(question), bool)
        answers = [words.response(r.text) for r in e.responses if r.role == "answer"]
        parent = 0
        if len(answers) > 1:
            branches.append(_said(question, side))
            parent = len(branches)
        for reply in answers:
            scored = np.ones(len(reply), bool)
            branches.append(
                Branch(
                    reply if parent else np.concatenate([question, reply]),
                    scored if parent else np.concatenate([none, scored]),
                    side=side,
                    branch=len(branches),
                    weight=e.weight,
                    parent=parent,
                )
            )
    return tuple(branches)


class Compared(NamedTuple):
    """What stands on one clip: the question that ends its prompt (None: they are branches)."""

    question: str | None
    branches: tuple[Branch, ...]


def clips_of(compared: Sequence[Example]) -> list[int]:
    """The clips that these preferences are about, in order; -1 is none."""
    away = {r.media for e in compared for r in e.responses if r.media != records.SAME}
    return sorted({e.media for e in compared} | away)


def preferences(
    compared: Sequence[Example], words: Chat, kinds: Mapping[int, tuple[str, ...]]
) -> dict[int, Compared]:
    """The chosen and the rejected replies by clip; a rejected one names the chosen one as its mate.

    A reply about another clip than its example's stands there, behind the same question and prefix.
    `kinds` are the media of each clip. Trees made of these must be one group, in this order.
    """
    sides = clips_of(compared)
    placed: dict[int, list[tuple[Example, list[Response]]]] = {side: [] for side in sides}
    for e in compared:
        for side in sides:
            here = [r for r in e.responses if r.role != "answer" and _media(e, r) == side]
            here.sort(key=lambda r: r.role)  # the chosen one first
            if here:
                placed[side].append((e, here))
    chosen: dict[str, tuple[int, int]] = {}  # of an example: which tree, which of its branches
    made = []
    for tree, side in enumerate(sides):
        stand = _Stand(words, kinds[side], max(side, 0), {e.prompt for e, _ in placed[side]})
        for e, replies in placed[side]:
            for r in replies:
                stand.add(e, r)
                if r.role == "chosen":
                    chosen[e.name] = tree, len(stand.branches)
        made.append(stand)
    found = {}
    for tree, (side, stand) in enumerate(zip(sides, made)):
        branches = list(stand.branches)
        for i, name in stand.rejected.items():
            there, mate = chosen[name]
            branches[i] = branches[i]._replace(mate=mate, across=there - tree)
        found[side] = Compared(stand.question, tuple(branches))
    return found


def _media(example: Example, response: Response) -> int:
    return example.media if response.media == records.SAME else response.media


def _said(tokens: Int[np.ndarray, "n"], side: int, parent: int = 0) -> Branch:
    """What stands before replies, and is not scored."""
    none = np.zeros(len(tokens), bool)
    return Branch(tokens, none, side=side, weight=0.0, parent=parent)


class _Stand:
    """The branches of one clip as they are added, with their questions and prefixes."""

    def __init__(self, words: Chat, kinds: tuple[str, ...], side: int, questions: set[str]):
        self.words, self.kinds, self.side = words, kinds, side
        self.question = next(iter(questions)) if len(questions) == 1 else None
        self.branches: list[Branch] = []
        self.rejected: dict[int, str] = {}  # index of a branch, the example whose chosen it meets
        self.said: dict[tuple[int, bytes], int] = {}  # (parent, tokens) -> number of its branch

    def add(self, e: Example, r: Response) -> None:
        parent = 0
        if self.question is None:
            parent = self._once(self.words.suffix(e.prompt, self.kinds), 0)
        if e.prefix:
            parent = self._once(self.words.response(e.prefix, ends=False), parent)
        tokens = self.words.response(r.text, after=bool(e.prefix), ends=r.ends)
        if r.role == "rejected":
            self.rejected[len(self.branches)] = e.name
        self.branches.append(
            Branch(
                tokens,
                np.ones(len(tokens), bool),
                side=self.side,
                branch=len(self.branches),
                axis=records.AXES.index(r.axis),
                weight=e.weight,
                value=float(r.role == "chosen") if r.value is None else r.value,
                parent=parent,
            )
        )

    def _once(self, tokens: Int[np.ndarray, "n"], parent: int) -> int:
        """The number of the unscored branch of these tokens, which is made where it is not there.

        A prefix that goes on from another one, token for token, continues its branch.
        """
        stem, rest = parent, tokens
        for (root, known), number in self.said.items():
            start = np.frombuffer(known, np.int32)
            left = len(tokens) - len(start)
            if root == parent and left < len(rest) and tokens.tobytes().startswith(known):
                stem, rest = number, tokens[len(start) :]
        if len(rest):
            self.branches.append(_said(rest, self.side, stem))
            stem = len(self.branches)
            self.said[parent, tokens.tobytes()] = stem
        return stem

"""Replies in steps: the laptop world's questions of choice, answered by what is seen first.

    <think>It starts at the top left.
    Its path is still, then down.
    It ends at the bottom left.
    it falls and stays down
    </think> <answer>B</answer>

Every line ends a step (video-SALMONN-o1, https://arxiv.org/abs/2502.11775, ends one with
`<end_of_step>`: twelve tokens of the small tokenizer, where the end of a line is one). What a step
says is read off the record's own questions, so each is true; the clips are not rendered again.
"""

import dataclasses
from collections.abc import Iterator

from data_gen.procedural.tell import reasoned
from jaxvid.data.records import Example, Record, Response

SEPARATOR = "\n"
GONE = "gone"  # what the world says of a place out of sight


def records(source: Iterator[Record]) -> Iterator[Record]:
    """The records with their policy questions, each with a reply in steps to imitate.

    Raises ValueError for a record that is not of `jaxvid-forge procedural`.
    """
    for record in source:
        named = {e.name: e for e in record.examples}
        examples = []
        for side in range(len(record.media)):
            asked = [f"{name} {side}" for name in ("policy", "choice", "start", "path", "end")]
            if missing := [name for name in asked if name not in named]:
                raise ValueError(
                    f"record {record.id!r} has no example {missing}; replies in steps are made of "
                    "shards of `jaxvid-forge procedural`"
                )
            policy, choice, start, path, end = (named[name] for name in asked)
            reply = told(choice, start.answer, path.answer, end.answer)
            prompt = choice.prompt
            steps = Example(f"steps {side}", "sft", side, prompt, (), reply, (Response(reply),))
            examples += [policy, steps]
        yield dataclasses.replace(
            record,
            examples=tuple(examples),
            provenance={"tool": "data_gen.steps", "source": record.provenance},
        )


def told(choice: Example, start: str, path: str, end: str) -> str:
    """The reply in steps to a question of choice."""
    outcome = choice.options[ord(choice.answer) - ord("A")]
    steps = (
        f"It starts {_place(start)}.",
        f"Its path is {path}.",
        f"It ends {_place(end)}.",
        outcome,
    )
    return reasoned("".join(s + SEPARATOR for s in steps), choice.answer)


def _place(words: str) -> str:
    return "out of sight" if words == GONE else f"at the {words}"

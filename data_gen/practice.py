"""Reading practice, without clips: copy words, and find the letter of an option.

A small model trained from nothing does not learn to look things up in its own prompt from questions
of choice alone. Copying random words makes it match and copy; questions whose four answers are all
told, one by one, then teach which letter stands before which option. Without a clip every option is
as likely as the others, so the letter can only come from the thought before it. Large models come
with this skill, so only a base model made from nothing needs it.
"""

from collections.abc import Iterator

import numpy as np

from data_gen.procedural.outcomes import EDITS, FAMILIES
from data_gen.procedural.scene import COLOURS, SHAPES, generator, look
from data_gen.procedural.tell import COLUMNS, LETTERS, ROWS, choice_prompt, reasoned
from jaxvid.data.records import Example, Record, Response

LICENCE = "CC0-1.0"
PLACES = [f"{r} {c}" for r in ROWS for c in COLUMNS]
WORDS = sorted({w for o in EDITS for w in o.split()} | {*COLOURS, *SHAPES, *COLUMNS, *ROWS})
COPIED = 24  # words in a row
CHOICES = 2  # questions of a record, each answered in all four ways


def records(seed: int, split: str, count: int) -> Iterator[Record]:
    """`count` records of text alone; each a function of seed, split and index."""
    for i in range(count):
        name = f"practice-{split}/{i:06d}"
        rng = generator(seed, name)
        words = " ".join(str(w) for w in rng.choice(WORDS, COPIED))
        yield Record(
            id=name,
            split=split,
            media=(),
            examples=(
                Example("copy", "sft", -1, f"Repeat: {words}", (), words, (Response(words),)),
                *(_choice(f"choice {k}", rng) for k in range(CHOICES)),
            ),
            provenance={"tool": "data_gen.practice", "seed": seed},
            licence=LICENCE,
        )


def _choice(name: str, rng: np.random.Generator) -> Example:
    """A question the world asks, or one over outcomes of any family, with all its answers."""
    kind = rng.integers(4)
    if kind == 0:
        question, outcomes = "Where does it start?", PLACES
    elif kind == 1:
        question, outcomes = "Name one.", list(EDITS)
    else:
        family = list(FAMILIES.values())[rng.integers(len(FAMILIES))]
        premise = str(rng.choice(list(family.premises)))
        called = look(rng.choice(list(COLOURS)), rng.choice(SHAPES), family.name, premise)
        question = family.question.format(look=called, premise=premise)
        outcomes = [o for ordinary in family.premises.values() for o in ordinary]
    options = tuple(str(o) for o in rng.choice(outcomes, 4, replace=False))
    told = tuple(Response(reasoned(o, letter)) for o, letter in zip(options, LETTERS))
    return Example(name, "sft", -1, choice_prompt(question, options), (), told[0].text, told)

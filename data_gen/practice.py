"""Reading practice, without clips: copy words, and find the letter of an option.

A small model trained from nothing does not learn to look things up in its own prompt from questions
of choice alone; copying random words teaches it within some hundred steps. The option thought of is
drawn at random and not named in the prompt, so the letter can only come from the thought. Large
models come with this skill, so only a base model made from nothing needs it.
"""

from collections.abc import Iterator

from data_gen.procedural.outcomes import EDITS
from data_gen.procedural.scene import COLOURS, SHAPES, generator
from data_gen.procedural.tell import COLUMNS, LETTERS, ROWS, choice_prompt, reasoned
from jaxvid.data.records import Example, Record, Response

LICENCE = "CC0-1.0"
WORDS = sorted({w for o in EDITS for w in o.split()} | {*COLOURS, *SHAPES, *COLUMNS, *ROWS})
COPIED = 24  # words in a row
COPIES, CHOICES = 1, 5  # examples of a record


def records(seed: int, split: str, count: int) -> Iterator[Record]:
    """`count` records of text alone; each a function of seed, split and index."""
    for i in range(count):
        name = f"practice-{split}/{i:06d}"
        rng = generator(seed, name)
        examples = []
        for k in range(COPIES):
            words = " ".join(str(w) for w in rng.choice(WORDS, COPIED))
            examples.append(_example(f"copy {k}", f"Repeat: {words}", words))
        for k in range(CHOICES):
            options = tuple(str(o) for o in rng.choice(sorted(EDITS), 4, replace=False))
            at = int(rng.integers(4))
            prompt = choice_prompt("Name one.", options)
            examples.append(_example(f"pick {k}", prompt, reasoned(options[at], LETTERS[at])))
        yield Record(
            id=name,
            split=split,
            media=(),
            examples=tuple(examples),
            provenance={"tool": "data_gen.practice", "seed": seed},
            licence=LICENCE,
        )


def _example(name: str, prompt: str, answer: str) -> Example:
    return Example(name, "sft", -1, prompt, (), answer, (Response(answer),))

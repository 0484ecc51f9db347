"""A record: what it refuses, and its way to bytes and back."""

import dataclasses
import random
import subprocess
import sys

import pytest

from jaxvid.data import records
from jaxvid.data.records import Example, Media, Record, Response

POLICY = Example("what", "policy", 1, "What happens?", ("falls", "rises"), "B")
PAIR = Record(
    id="scene-7",
    split="train",
    media=(Media("real", "video", b"\x00\xff\x01", 2.1), Media("cf", "video", b"x", 2.0)),
    examples=(
        POLICY,
        Example("why", "sft", 0, "Why? \u00e9", responses=(Response("Because."),), weight=0.1),
        Example(
            "pref",
            "preference",
            0,
            "Describe.",
            responses=(
                Response("It rises.", "chosen", value=0.75, ends=False),
                Response("No.", "rejected", "temporal", media=1),
            ),
            prefix="First.",
        ),
    ),
    meta={"category": "event", "at": [1, 2.5]},
    provenance={"tool": "procedural", "seed": 7},
    licence="CC0-1.0",
)


def test_round_trip_is_exact_and_bytes_are_stable():
    PAIR.check()
    data = records.serialise(PAIR)
    assert records.parse(data) == PAIR
    assert records.serialise(records.parse(data)) == data


def test_bytes_do_not_depend_on_the_process():
    code = (
        "import hashlib; from tests.test_records import PAIR; from jaxvid.data import records;"
        "print(hashlib.sha256(records.serialise(PAIR)).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_empty_tables_round_trip():
    record = Record(
        "a", "train", (), (Example("q", "policy", -1, "2 + 2?", answer="4"),), licence="-"
    )
    record.check()
    assert records.parse(records.serialise(record)) == record


@pytest.mark.parametrize("seed", range(20))
def test_any_content_round_trips(seed):
    """Empty tables, empty and odd strings, any bytes, weights that float32 holds."""
    draw = random.Random(seed)
    text = lambda: "".join(draw.choices('a \n\0\u00e9\u4f60\U0001f600"\\', k=draw.randint(0, 3)))
    some = lambda make: tuple(make() for _ in range(draw.randint(0, 3)))
    record = Record(
        id="id",
        split="train",
        media=some(lambda: Media(text(), text(), draw.randbytes(draw.randint(0, 9)), 0.25)),
        examples=some(
            lambda: Example(
                name=text(),
                task=text(),
                media=draw.randint(-1, 3),
                prompt=text(),
                options=some(text),
                answer=text(),
                responses=some(lambda: Response(text(), text(), text())),
                weight=draw.randint(0, 99) / 100,
            )
        ),
        meta={text(): text()},
        licence="x",
    )
    assert records.parse(records.serialise(record)) == record


def with_example(**changes):
    return dataclasses.replace(PAIR, examples=(dataclasses.replace(POLICY, **changes),))


@pytest.mark.parametrize(
    "record, words",
    [
        (dataclasses.replace(PAIR, schema=1), "schema 1"),
        (dataclasses.replace(PAIR, id=" "), "id is empty"),
        (dataclasses.replace(PAIR, licence=""), "licence is empty"),
        (dataclasses.replace(PAIR, examples=()), "no examples"),
        (dataclasses.replace(PAIR, examples=(POLICY, POLICY)), "'what' is used twice"),
        (dataclasses.replace(PAIR, media=(Media("a", "film", b""),) * 2), "kind 'film'"),
        (dataclasses.replace(PAIR, media=(Media("a", "video", b""),) * 2), "no bytes"),
        (dataclasses.replace(PAIR, meta={"x": b"bytes"}), "meta is not JSON"),
        (dataclasses.replace(PAIR, meta={"x": float("nan")}), "meta is not JSON"),
        (with_example(task="rl"), "task 'rl'"),
        (with_example(media=2), "media index 2, the record has 2"),
        (with_example(prompt="\n"), "prompt is empty"),
        (with_example(options=("a", "a")), "option 'a' is given twice"),
        (with_example(answer="C"), "answer 'C', want one of ['A', 'B']"),
        (with_example(answer=""), "nothing to compare with"),
        (with_example(task="sft"), "wants a response of role 'answer'"),
        (with_example(task="preference"), "one chosen and some rejected"),
        (with_example(weight=float("nan")), "weight nan"),
        (with_example(responses=(Response("x", "bad", "up"),)), "role 'bad'"),
        (with_example(responses=(Response("x", "answer", "up"),)), "axis 'up'"),
        (with_example(responses=(Response(""),)), "response 0 is empty"),
        (with_example(responses=(Response("x", value=0.5),)), "of preferences"),
        (with_example(responses=(Response("x", ends=False),)), "of preferences"),
        (with_example(prefix="x"), "a prefix is of preferences"),
        (with_example(responses=(Response("x", "chosen", value=1.5),)), "value 1.5"),
        (with_example(responses=(Response("x", "chosen", media=0),)), "chosen, on media 0"),
        (with_example(responses=(Response("x", "rejected", media=9),)), "rejected, on media 9"),
    ],
)
def test_check_refuses(record, words):
    with pytest.raises(ValueError, match="record") as caught:
        record.check()
    assert words in str(caught.value)


def test_check_names_every_fault_at_once():
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(PAIR, id="", licence="", examples=()).check()
    assert all(w in str(caught.value) for w in ("id is empty", "licence is empty", "no examples"))


def test_parse_refuses_other_schema_and_other_bytes():
    other = records.serialise(dataclasses.replace(PAIR, schema=99))
    with pytest.raises(ValueError, match="has schema 99.*reads schema 2"):
        records.parse(other)
    for junk in (b"", b"junk" * 20):
        with pytest.raises(ValueError, match="not a record"):
            records.parse(junk)


def test_axes_are_those_of_the_batch():
    """batch.Branches.axis is the index here."""
    assert records.AXES == ("", "spatial", "temporal", "crossframe")

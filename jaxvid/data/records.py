"""What a data set is made of: the record, its faults, and its bytes.

A record carries its own media (encoded bytes), its examples, where it came from and its licence.
A duality pair is ONE record with `media[0]` real and `media[1]` counterfactual, so that no shuffle,
shard or filter can part the two sides. The bytes are tfds' (a `tf.train.Example` made by
`FEATURES`), so a folder of shards is a tfds data set; TensorFlow itself is never imported.
"""

import dataclasses
import json

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.features import FeaturesDict, Sequence, Text

SCHEMA = 2
MEDIA_KINDS = ("video", "image", "audio")
TASKS = ("sft", "choice", "caption", "preference", "policy")  # choice: SFT on an option list
ROLES = ("answer", "chosen", "rejected")
AXES = ("", "spatial", "temporal", "crossframe")  # index = Branches.axis in batch.py
SAME = -2  # Response.media: the clip of the reply's own example


@dataclasses.dataclass(frozen=True)
class Media:
    """One clip, image or sound track, encoded (MP4 with its sound, PNG or JPEG, M4A)."""

    name: str
    kind: str  # one of MEDIA_KINDS
    data: bytes = dataclasses.field(repr=False)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Response:
    """A reply to an example's prompt; `axis` says which way a rejected one is wrong.

    `value` is the chance, in [0, 1], that what is said up to its end leads to the right answer;
    None is 1 for a chosen reply and 0 for a rejected one. A rejected reply may be about another
    clip than its example's (`media`): the same words are then wrong there. A step of a longer reply
    does not end it: `ends` is False, and no closing token follows.
    """

    text: str
    role: str = "answer"  # one of ROLES
    axis: str = ""  # one of AXES
    value: float | None = None
    media: int = SAME  # index into Record.media
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt on one clip: `prompt` is the text after the video, options shown in it.

    `prefix` is what the reply has said before its responses (steps before the one in question).
    """

    name: str  # unique in its record
    task: str  # one of TASKS
    media: int  # index into Record.media; -1 is text alone
    prompt: str
    options: tuple[str, ...] = ()
    answer: str = ""  # the truth: a letter where there are options, else text
    responses: tuple[Response, ...] = ()
    weight: float = 1.0
    prefix: str = ""


def example(told: dict) -> Example:
    """The example of which `dataclasses.asdict`, through JSON perhaps, gave `told`."""
    responses = tuple(Response(**r) for r in told["responses"])
    return Example(**told | {"options": tuple(told["options"]), "responses": responses})


@dataclasses.dataclass(frozen=True)
class Record:
    """The unit of storage, of shuffling and of batch size."""

    id: str
    split: str
    media: tuple[Media, ...]
    examples: tuple[Example, ...]
    meta: dict = dataclasses.field(default_factory=dict)  # JSON: category, edit level, scene ...
    provenance: dict = dataclasses.field(default_factory=dict)  # JSON: tool, parameters, seed ...
    licence: str = ""
    schema: int = SCHEMA

    def check(self) -> None:
        """Raises ValueError naming every fault of the record, not only the first."""
        faults = _faults(self)
        if faults:
            raise ValueError(f"record {self.id!r}: " + "; ".join(faults))


def _faults(record: Record) -> list[str]:
    """Every reason why the record cannot be used."""
    bad = []
    if record.schema != SCHEMA:
        bad.append(f"schema {record.schema}, this version reads and writes schema {SCHEMA}")
    for field in ("id", "split", "licence"):
        if not getattr(record, field).strip():
            bad.append(f"{field} is empty")
    if not record.examples:
        bad.append("no examples")
    for i, m in enumerate(record.media):
        at = f"media {i} ({m.name!r})"
        if m.kind not in MEDIA_KINDS:
            bad.append(f"{at}: kind {m.kind!r}, want one of {MEDIA_KINDS}")
        if not m.data:
            bad.append(f"{at}: no bytes")
        if not 0 <= m.seconds < float("inf"):
            bad.append(f"{at}: {m.seconds} seconds")
    bad += [f"media name {n!r} is used twice" for n in _twice(m.name for m in record.media)]
    bad += [f"example name {n!r} is used twice" for n in _twice(e.name for e in record.examples)]
    for e in record.examples:
        bad += [f"example {e.name!r}: {fault}" for fault in _example_faults(e, len(record.media))]
    for name in ("meta", "provenance"):
        try:
            json.dumps(getattr(record, name), allow_nan=False)
        except (TypeError, ValueError) as error:
            bad.append(f"{name} is not JSON: {error}")
    return bad


def _example_faults(example: Example, media: int) -> list[str]:
    bad = []
    if example.task not in TASKS:
        bad.append(f"task {example.task!r}, want one of {TASKS}")
    if not -1 <= example.media < media:
        bad.append(f"media index {example.media}, the record has {media} (-1 is text alone)")
    if not example.name.strip():
        bad.append("name is empty")
    if not example.prompt.strip():
        bad.append("prompt is empty")
    if not 0 <= example.weight < float("inf"):
        bad.append(f"weight {example.weight}, want a finite number of at least 0")
    if any(not o.strip() for o in example.options):
        bad.append("an option is empty")
    bad += [f"option {o!r} is given twice" for o in _twice(example.options)]
    letters = [chr(ord("A") + i) for i in range(len(example.options))]
    if example.options and example.answer and example.answer not in letters:
        bad.append(f"answer {example.answer!r}, want one of {letters} for its options")
    for i, r in enumerate(example.responses):
        if not r.text.strip():
            bad.append(f"response {i} is empty")
        if r.role not in ROLES:
            bad.append(f"response {i}: role {r.role!r}, want one of {ROLES}")
        if r.axis not in AXES:
            bad.append(f"response {i}: axis {r.axis!r}, want one of {AXES}")
        if r.value is not None and not 0 <= r.value <= 1:
            bad.append(f"response {i}: value {r.value}, want a share between 0 and 1, or None")
        if r.media != SAME and (r.role != "rejected" or not -1 <= r.media < media):
            bad.append(
                f"response {i}: {r.role}, on media {r.media}; a rejected one may be on another of "
                f"the record's {media} (-1 is text alone), others are on their example's ({SAME})"
            )
        if example.task != "preference" and (r.value is not None or not r.ends):
            bad.append(f"response {i}: value and ends are of preferences; this is {example.task}")
    if example.prefix and example.task != "preference":
        bad.append(f"a prefix is of preferences; this is {example.task}")
    roles = [r.role for r in example.responses]
    if example.task == "preference" and (roles.count("chosen") != 1 or "rejected" not in roles):
        bad.append(f"a preference wants one chosen and some rejected responses; roles are {roles}")
    if example.task in ("sft", "choice", "caption") and "answer" not in roles:
        bad.append(f"{example.task} wants a response of role 'answer'; roles are {roles}")
    if example.task == "policy" and not example.answer.strip():
        bad.append("answer is empty: the reward has nothing to compare with")
    return bad


def _twice(names) -> list[str]:
    names = list(names)
    return sorted({n for n in names if names.count(n) > 1})


# tf.train.Example cannot nest lists, so options and responses are tables of their own that name
# their example by index.
FEATURES = FeaturesDict(
    {
        "id": Text(),
        "split": Text(),
        "schema": np.int32,
        "licence": Text(),
        "meta": Text(doc="JSON"),
        "provenance": Text(doc="JSON"),
        "media": Sequence(
            {"name": Text(), "kind": Text(), "data": Text(doc="bytes"), "seconds": np.float32}
        ),
        "examples": Sequence(
            {
                "name": Text(),
                "task": Text(),
                "media": np.int32,
                "prompt": Text(),
                "answer": Text(),
                "weight": np.float32,
                "prefix": Text(),
            }
        ),
        "options": Sequence({"example": np.int32, "text": Text()}),
        "responses": Sequence(
            {
                "example": np.int32,
                "text": Text(),
                "role": Text(),
                "axis": Text(),
                "value": np.float32,  # NaN is None
                "media": np.int32,
                "ends": np.int32,
            }
        ),
    }
)
_SERIALISER = ExampleSerializer(FEATURES.get_serialized_info())


def serialise(record: Record) -> bytes:
    """The record as a `tf.train.Example`; equal records give equal bytes."""
    examples = [dataclasses.asdict(e) for e in record.examples]
    options = [{"example": i, "text": o} for i, e in enumerate(examples) for o in e.pop("options")]
    responses = [
        r | {"example": i, "value": np.nan if r["value"] is None else r["value"]}
        for i, e in enumerate(examples)
        for r in e.pop("responses")
    ]
    tables = {
        "media": [dataclasses.asdict(m) for m in record.media],
        "examples": examples,
        "options": options,
        "responses": responses,
    }
    row = {
        "id": record.id,
        "split": record.split,
        "schema": record.schema,
        "licence": record.licence,
        "meta": _json(record.meta),
        "provenance": _json(record.provenance),
    }
    for name, rows in tables.items():
        row[name] = {c: [r[c] for r in rows] for c in FEATURES[name].feature}
    example = _SERIALISER.get_tf_example(FEATURES.encode_example(row))
    return example.SerializeToString(deterministic=True)  # maps have no order of their own


def parse(data: bytes) -> Record:
    """The record of `serialise`. Raises ValueError for other bytes and other schemas."""
    try:
        row = FEATURES.deserialize_example_np(data)
    except (DecodeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{len(data)} bytes are not a record of schema {SCHEMA}: {error}"
        ) from error
    if row["schema"] != SCHEMA:
        raise ValueError(
            f"record {_text(row['id'])!r} has schema {row['schema']}; this version of jaxvid "
            f"reads schema {SCHEMA}. Build the shards again, or read them with the older version."
        )
    options: dict[int, list[str]] = {}
    for r in _rows(row["options"]):
        options.setdefault(r.pop("example"), []).append(r["text"])
    responses: dict[int, list[Response]] = {}
    for r in _rows(row["responses"]):
        told = {"ends": bool(r["ends"]), "value": None if np.isnan(r["value"]) else r["value"]}
        responses.setdefault(r.pop("example"), []).append(Response(**r | told))
    return Record(
        id=_text(row["id"]),
        split=_text(row["split"]),
        media=tuple(Media(**m) for m in _rows(row["media"])),
        examples=tuple(
            Example(**e, options=tuple(options.get(i, ())), responses=tuple(responses.get(i, ())))
            for i, e in enumerate(_rows(row["examples"]))
        ),
        meta=json.loads(row["meta"]),
        provenance=json.loads(row["provenance"]),
        licence=_text(row["licence"]),
        schema=int(row["schema"]),
    )


def _json(value: dict) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _text(value: bytes) -> str:
    return value.decode("utf-8")


def _rows(table: dict[str, list]) -> list[dict]:
    """A table of columns as rows of plain Python values."""
    columns = [[_plain(c, v) for v in table[c]] for c in table]
    return [dict(zip(table, values)) for values in zip(*columns, strict=True)]


def _plain(column: str, value):
    if isinstance(value, bytes):
        return value if column == "data" else _text(value)
    if isinstance(value, np.floating):
        # The format keeps float32. Its shortest decimal gives 0.1 back for 0.1.
        return float(str(np.float32(value)))
    return int(value)

"""How an evaluation asks: greedy replies, under a control, and the files that tell of them.

Controls tell what a score is made of:

    none      the clips as they are
    blank     every frame mid-grey: what the question and its options alone give away
    shuffled  frames in a drawn order: what remains without the order of events
"""

import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxvid import files, hosts
from jaxvid.data import layout, pipeline
from jaxvid.data.chat import Chat
from jaxvid.eval import metrics
from jaxvid.rollout import sampler

VERSIONS = ("jaxvid", "jax", "flax", "av", "pillow", "tokenizers")
READER = "jaxvid.answers, strict"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to ask. Replies are greedy."""

    control: Literal["none", "blank", "shuffled"] = "none"
    max_tokens: int = 64
    rows: int = 64  # prompts at a time
    seed: int = 0  # of the shuffled control and of the intervals
    limit: int = 0  # only the first so many questions; 0 is all

    def __post_init__(self):
        if self.control not in ("none", "blank", "shuffled"):
            raise ValueError(f"control {self.control!r}; choose none, blank or shuffled")
        if self.rows < 1 or self.limit < 0:
            raise ValueError(f"rows {self.rows}, limit {self.limit}; want at least 1 and 0")


@dataclasses.dataclass(frozen=True)
class Blank:
    """Every pixel mid-grey. A hook of `pipeline.Builder.frames`."""

    grey: int = pipeline.GREY

    def __call__(
        self, frames: UInt8[np.ndarray, "F h w 3"], record: str
    ) -> UInt8[np.ndarray, "F h w 3"]:
        return np.full_like(frames, self.grey)


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Frames in an order drawn from the seed and the record's id, never the true order.

    Both sides of a pair get the same order.
    """

    seed: int = 0

    def __call__(
        self, frames: UInt8[np.ndarray, "F h w 3"], record: str
    ) -> UInt8[np.ndarray, "F h w 3"]:
        n = len(frames)
        rng = np.random.default_rng((self.seed, zlib.crc32(record.encode())))
        order = rng.permutation(n)
        while n > 1 and (order == np.arange(n)).all():
            order = rng.permutation(n)
        return frames[order]


def controlled(builder: pipeline.Builder, settings: Settings) -> pipeline.Builder:
    """The builder, its clips under the control."""
    hook = {"none": builder.frames, "blank": Blank(), "shuffled": Shuffled(settings.seed)}
    return dataclasses.replace(builder, frames=hook[settings.control])


class Reply(NamedTuple):
    text: str
    tokens: int
    ended: bool  # by a stop token, not by max_tokens


def greedy(
    model: nnx.Module,
    trees: Sequence[layout.Tree],
    chat: Chat,
    settings: Settings,
    mesh: Mesh | None,
) -> list[Reply]:
    """The most likely reply to each prompt."""
    out = sampler.generate_all(
        model,
        trees,
        chat,
        sampler.Sampling(max_tokens=settings.max_tokens, temperature=0.0),
        group=1,
        keys=jax.random.split(jax.random.key(0), len(trees)),  # greedy: never looked at
        rows=settings.rows,
        mesh=mesh,
    )
    sizes, ended = out.length[:, 0].tolist(), out.ended[:, 0].tolist()
    text = lambda i: chat.decode(out.tokens[i, 0, : sizes[i]])
    return [Reply(text(i), sizes[i], ended[i]) for i in range(len(trees))]


def collect(
    numbered: Iterator[tuple[int, Any]],
    settings: Settings,
    size: int,
    ask: Callable[[list[Any]], list[list[Any]]],
    parse: Callable[[dict[str, Any]], Any],
) -> list[Any]:
    """What `ask` says of each question, in the order of their numbers, the first `settings.limit`
    of them; `size` questions at a time.

    In a run of several processes each asks its own, and all are told what all found: `ask` gives
    NamedTuples, of which `parse` reads what JSON leaves. Raises ValueError where a process has no
    question.
    """
    numbered = itertools.takewhile(lambda q: not settings.limit or q[0] < settings.limit, numbered)
    each, found, spare = max(size // jax.process_count(), 1), [], []
    while True:
        chunk = list(itertools.islice(numbered, each))
        spare = spare or [q for _, q in chunk[:1]]
        busy, idle = hosts.some(bool(chunk), not spare)
        if not busy:
            break
        if idle:
            raise ValueError(
                f"there are fewer records to ask about than {jax.process_count()} processes; use "
                "fewer processes, or a larger split"
            )
        # One that has asked all of its own asks again, and forgets: all run the same programs.
        told = ask([q for _, q in chunk] or spare)
        found += [[n, [_line(p) for p in ps]] for (n, _), ps in zip(chunk, told)]
    rows = sorted((row for part in hosts.gather(found) for row in part), key=lambda row: row[0])
    return [parse(line) for _, lines in rows for line in lines]


# Files ------------------------------------------------------------------------------------------


def write(
    folder: pathlib.Path,
    predictions: Sequence[Any],  # NamedTuples
    scores: dict[str, Any],
    builder: pipeline.Builder,
    settings: Settings,
    about: dict[str, Any],
) -> None:
    """What every kind of evaluation writes: a line per reply, its scores, and how it was made. A
    kill in between leaves the old or the new, whole. Of several processes the first one writes."""
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_line(p), ensure_ascii=False) for p in predictions]
    files.write(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    content = scores | {
        "reader": READER,
        "decoding": "greedy",
        "settings": dataclasses.asdict(settings),
        "data": dataclasses.asdict(builder.data),
        "vision": dataclasses.asdict(builder.prompting.vision),
        "device": jax.devices()[0].device_kind,
        "versions": {name: _version(name) for name in VERSIONS},
        "about": about,
    }
    files.write(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _line(prediction: Any) -> dict[str, Any]:
    """A prediction as JSON; samples are there only where some were drawn."""
    line = prediction._asdict()
    samples = line.pop("samples", ())
    return line | ({"samples": [s._asdict() for s in samples]} if samples else {})


def plain(m: Any) -> dict[str, Any]:
    """A NamedTuple of scores as JSON, its intervals too."""
    fields = m._asdict().items()
    return {k: v._asdict() if isinstance(v, metrics.Interval) else v for k, v in fields}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

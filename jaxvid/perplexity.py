"""Temporal perplexity: how much of a text all frames of a clip explain, and one of them does not.

    TPL = -( R_ppl(V_1:T, x) - R_ppl(V_k:k, x) )         (Video-UTR, arXiv 2502.12081)
        = mean token loss with frame k alone - mean token loss with all T frames; larger is better

and as a ratio, loss with one frame over loss with all. A text that one frame tells has a TPL near
0. The paper's k is the last frame; `Settings.frame` chooses. One frame is a video of one frame: its
clock starts at 0, and it is padded as the family pads. Frames are those the model was trained to
see, at the size that they have among all T. Clips are seen, not heard. A clip of one frame, or an
image, has T = 1, so its TPL is 0 and its ratio 1 by definition.

Every answer of task sft, choice or caption is a branch of its clip's tree, scored twice: below all
frames and below the one. Records are scored in chunks of fixed bounds, each written when it is
done, so that a run that was stopped goes on, to the same numbers. Filtering by it is in sift.py.
"""

import dataclasses
import functools
import json
import pathlib
import zlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxvid import files, score, sharding
from jaxvid.data import layout, media, pipeline, replies, shards
from jaxvid.data.records import Example, Record
from jaxvid.eval import metrics

QUANTILES = (5, 25, 50, 75, 95)  # percent
BINS = 10  # of the histogram


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is scored, and against which frame."""

    frame: Literal["last", "middle", "random"] = "last"  # random: by the record's id and the seed
    tasks: tuple[str, ...] = pipeline.SUPERVISED  # of the examples whose answers are scored
    seed: int = 0
    rows: int = 8  # of a batch; rounded up to the devices that share rows
    chunk: int = 16  # records scored together

    def __post_init__(self):
        if self.frame not in ("last", "middle", "random"):
            raise ValueError(f"frame {self.frame!r}; choose last, middle or random")
        wrong = [t for t in self.tasks if t not in pipeline.SUPERVISED]
        if wrong or not self.tasks:
            raise ValueError(f"tasks {self.tasks}: those with an answer are {pipeline.SUPERVISED}")
        if self.rows < 1 or self.chunk < 1:
            raise ValueError(f"rows {self.rows} and chunk {self.chunk}; want at least 1 of each")


class Row(NamedTuple):
    """One scored answer, a line of tpl.jsonl. Losses are nats a token, the closing one counted."""

    record: str
    example: str
    response: int  # which of the example's answers
    task: str
    media: int
    frames: int  # T
    tokens: int
    loss: float  # with all frames
    loss_one: float  # with one
    tpl: float
    ratio: float | None  # None where the loss with all frames is 0


class Skipped(NamedTuple):
    """What could not be scored, a line of skipped.jsonl. `example` "" is the whole record."""

    record: str
    example: str
    reason: str


class Summary(NamedTuple):
    """Of all answers; intervals are over records. `ratio` is that of the two mean losses."""

    answers: int
    records: int
    skipped: int
    tpl: metrics.Interval
    loss: metrics.Interval
    loss_one: metrics.Interval
    ratio: float
    quantiles: dict[str, float]
    histogram: list[tuple[float, float, int]]  # from, to, answers
    tasks: dict[str, metrics.Interval]


# Scoring ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _logp(graph, params, tokens, vision, audio):
    return score.score(nnx.merge(graph, params), tokens, vision, audio).logp


class Asked(NamedTuple):
    """The answers to a clip, twice: below all of its frames and below one. A clip of one frame has
    one tree."""

    record: Record
    media: int
    frames: int
    answers: list[tuple[Example, int]]  # in the order of the trees' scored branches
    trees: list[layout.Tree]


def which(settings: Settings, frames: int, record: str, side: int) -> int:
    """Index of the one frame among those of a clip."""
    if settings.frame == "random":
        name = zlib.crc32(f"{record}\0{side}".encode())
        return int(np.random.default_rng((settings.seed, name)).integers(frames))
    return frames - 1 if settings.frame == "last" else (frames - 1) // 2


def asked(
    record: Record, builder: pipeline.Builder, sampling: media.Sampling, settings: Settings
) -> tuple[list[Asked], list[Skipped]]:
    """The trees of a record's answers, and what of it has none."""
    found, skipped = [], []
    answered = [e for e in record.examples if e.task in settings.tasks]
    for e in answered:
        if e.media < 0:
            skipped.append(Skipped(record.id, e.name, "text alone: it has no frames"))
    if not answered:
        tasks = sorted({e.task for e in record.examples})
        reason = f"no answer of {settings.tasks}; its examples are of {tasks}"
        skipped.append(Skipped(record.id, "", reason))
    for side in range(len(record.media)):
        here = [e for e in answered if e.media == side]
        if here:
            try:
                found.append(_asked(record, side, here, builder, sampling, settings))
            except ValueError as error:  # of media, too: MediaError is one
                skipped += [Skipped(record.id, e.name, str(error)) for e in here]
    return found, skipped


def _asked(
    record: Record,
    side: int,
    examples: list[Example],
    builder: pipeline.Builder,
    sampling: media.Sampling,
    settings: Settings,
) -> Asked:
    vision, item = builder.prompting.vision, record.media[side]
    told = media.plan(item.data, sampling, vision)
    media.require(told, item.kind)
    if told.kind == "audio":
        raise ValueError(f"record {record.id!r}, media {side}: sound alone has no frames")
    frames = np.asarray(media.decode(item.data, sampling, vision).frames)
    count = len(np.unique(told.indices))
    branches = replies.supervised(examples, builder.chat, (told.kind,), side)
    answers = [
        (e, i) for e in examples for i in range(sum(r.role == "answer" for r in e.responses))
    ]
    cut = functools.partial(_tree, record.id, side, builder, branches)
    at = which(settings, len(frames), record.id, side)
    trees = [cut(told, frames)] if count > 1 else []
    if told.kind == "video":
        grid = (1, *told.grid[1:])
        told = told._replace(indices=told.indices[:1] * 0, total=1, grid=grid, times=np.zeros(1))
        frames = frames[at : at + 1]
    return Asked(record, side, count, answers, [*trees, cut(told, frames)])


def _tree(
    name: str,
    side: int,
    builder: pipeline.Builder,
    branches: tuple[layout.Branch, ...],
    told: media.Plan,
    frames: UInt8[np.ndarray, "F h w 3"],
) -> layout.Tree:
    """The answers below these frames. Raises ValueError where they are more than the context."""
    where = f"record {name!r}, media {side}"
    medium = pipeline.measured(told, builder.prompting, heard=False, where=where)
    patches, _ = media.patchify(frames, builder.prompting.vision)
    clip = pipeline.Clip(medium, layout.Clip(patches, told.grid), side)
    tree = builder.tree(name, clip, None, branches)
    longest = len(tree.prompt) + max(len(b.tokens) for b in branches)
    if builder.context and longest > builder.context:
        raise ValueError(
            f"{where}: {len(frames)} frames and the longest answer are {longest} tokens; the "
            f"model's context is {builder.context}. Take fewer or smaller frames."
        )
    return tree


def budget(trees: list[layout.Tree], rows: int) -> layout.Budget:
    """Rows that hold the largest of these trees."""
    most = layout.Size(*map(max, zip(*map(layout.size, trees))))
    patches = {layout.most_patches(t) for t in trees}
    group = trees[0].vision.merge ** 2
    # Frames of one size need no padding; families with frames of a fixed size have no other.
    merged = layout.bucket(-(-max(patches) // group), 4)
    wide = patches.pop() if len(patches) == 1 else group * merged
    return layout.Budget(
        rows=rows,
        tokens=layout.bucket(most.tokens, 64),
        scored=layout.bucket(most.scored, 32),
        branches=layout.bucket(most.branches, 8),
        frames=layout.bucket(most.frames, 4),
        patches=wide,
    )


def losses(
    graph: nnx.GraphDef, params: nnx.State, trees: list[layout.Tree], rows: int, mesh: Mesh
) -> list[list[tuple[int, float]]]:
    """(tokens, mean loss) of each scored branch of each tree, in order."""
    ways = sharding.data_shards(mesh)
    numbered = [
        t._replace(branches=tuple(b._replace(record=i, branch=m) for m, b in enumerate(t.branches)))
        for i, t in enumerate(trees)
    ]
    found: list[dict[int, tuple[int, float]]] = [{} for _ in trees]
    for batch in layout.pack([[t] for t in numbered], budget(trees, -(-rows // ways) * ways)):
        where = sharding.row_sharding(mesh, batch.old.shape[0])
        inputs = jax.device_put((batch.tokens, batch.vision, batch.audio), where)
        logp = np.asarray(_logp(graph, params, *inputs), np.float64)
        for row, column in zip(*np.nonzero(batch.branches.record >= 0)):
            mine = batch.tokens.slot[row] == column + 1
            if mine.any():
                tree = int(batch.branches.record[row, column])
                value = int(mine.sum()), float(-logp[row, mine].mean())
                found[tree][int(batch.branches.branch[row, column])] = value
    return [[branches[m] for m in sorted(branches)] for branches in found]


def scored(
    graph: nnx.GraphDef,
    params: nnx.State,
    found: list[Asked],
    rows: int,
    mesh: Mesh,
) -> list[Row]:
    """The rows of these answers, in their order."""
    trees = [t for a in found for t in a.trees]
    values = iter(losses(graph, params, trees, rows, mesh) if trees else ())
    out = []
    for a in found:
        full = next(values)
        one = next(values) if len(a.trees) > 1 else full
        for (e, response), (tokens, loss), (_, alone) in zip(a.answers, full, one, strict=True):
            ratio = alone / loss if loss else None
            place = (a.record.id, e.name, response, e.task, a.media, a.frames)
            out.append(Row(*place, tokens, loss, alone, alone - loss, ratio))
    return out


# A folder of shards -------------------------------------------------------------------------------


def measure(
    graph: nnx.GraphDef,
    params: nnx.State,
    builder: pipeline.Builder,
    source: shards.Source,
    sampling: media.Sampling,
    settings: Settings,
    workdir: pathlib.Path,
    *,
    mesh: Mesh,
    about: dict[str, Any],
) -> tuple[list[Row], list[Skipped]]:
    """Score every answer of a source; WORKDIR gets tpl.jsonl, skipped.jsonl and tpl.json.

    `about` (which model) and the settings name the run: a folder of another is refused, one of the
    same goes on, or is read. Raises ValueError for a model that sees no video and where no answer
    of the source can be scored.
    """
    if "video" not in builder.prompting.markers:
        raise ValueError(
            f"this model sees no video, only {sorted(builder.prompting.markers)}; temporal "
            "perplexity compares frames. Give a video model"
        )
    if jax.process_count() > 1:
        raise ValueError("temporal perplexity is scored by one process; start it on one host")
    told = {"data": repr(source), "sampling": dataclasses.asdict(sampling), **about}
    told = json.loads(json.dumps({"settings": dataclasses.asdict(settings), **told}))
    parts = _claim(workdir, told)
    for start in range(0, len(source), settings.chunk):
        part = parts / f"{start:09d}.json"
        if (workdir / "tpl.jsonl").exists() or part.exists():
            continue
        rows, skipped = [], []
        for i in range(start, min(start + settings.chunk, len(source))):
            each, faults = asked(source[i], builder, sampling, settings)
            rows, skipped = rows + each, skipped + faults
        done = scored(graph, params, rows, settings.rows, mesh)
        files.write(part, json.dumps({"rows": done, "skipped": skipped}))
        print(f"{min(start + settings.chunk, len(source))} of {len(source)} records", flush=True)
    if not (workdir / "tpl.jsonl").exists():
        _join(workdir, parts, source)
    return load(workdir)


def _claim(workdir: pathlib.Path, told: dict[str, Any]) -> pathlib.Path:
    """The folder of finished chunks. Raises ValueError if the work folder is of another run."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "tpl.json"
    before = json.loads(path.read_text())["run"] if path.exists() else told
    if before != told:
        differ = [k for k in sorted(before.keys() | told.keys()) if before.get(k) != told.get(k)]
        was = "; ".join(f"{k}: {before.get(k)} there, {told.get(k)} now" for k in differ)
        raise ValueError(f"{workdir} has the scores of another run ({was}); give another --workdir")
    if not path.exists():
        files.write(path, json.dumps({"run": told}, indent=1) + "\n")
    parts = workdir / "parts"
    parts.mkdir(exist_ok=True)
    return parts


def _join(workdir: pathlib.Path, parts: pathlib.Path, source: shards.Source) -> None:
    """The chunks as one table; then they are gone."""
    made = sorted(parts.glob("*.json"))
    each = [json.loads(path.read_text()) for path in made]
    rows = [Row(*row) for part in each for row in part["rows"]]
    skipped = [Skipped(*row) for part in each for row in part["skipped"]]
    if not rows:
        raise ValueError(
            f"none of the {len(source)} records has an answer that can be scored; the first: "
            + "; ".join(f"{s.record}: {s.reason}" for s in skipped[:3])
        )
    files.write(workdir / "skipped.jsonl", "".join(line(s) for s in skipped))
    files.write(workdir / "tpl.jsonl", "".join(line(r) for r in rows))
    for path in made:
        path.unlink()
    parts.rmdir()


def load(workdir: pathlib.Path) -> tuple[list[Row], list[Skipped]]:
    """The table that `measure` left in a folder."""
    read = lambda name: map(json.loads, (workdir / name).read_text().splitlines())
    return [Row(**r) for r in read("tpl.jsonl")], [Skipped(**r) for r in read("skipped.jsonl")]


def summary(rows: list[Row], skipped: list[Skipped], *, seed: int = 0) -> Summary:
    """What the rows amount to, with 95 % intervals by bootstrap over records."""

    def mean(some: list[Row]) -> list[metrics.Interval]:
        values = np.array([[r.tpl, r.loss, r.loss_one] for r in some])
        return metrics.clustered(values, [r.record for r in some], seed=seed)

    values = np.array([r.tpl for r in rows])
    tpl, loss, one = mean(rows)
    counts, edges = np.histogram(values, BINS)
    tasks = sorted({r.task for r in rows})
    return Summary(
        len(rows),
        len({r.record for r in rows}),
        len(skipped),
        tpl,
        loss,
        one,
        one.value / loss.value if loss.value else float("inf"),
        {f"{q}": float(np.percentile(values, q)) for q in QUANTILES},
        [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts)],
        {t: mean([r for r in rows if r.task == t])[0] for t in tasks},
    )


def page(found: Summary, settings: Settings) -> str:
    """The summary as text."""
    t, frame = found.tpl, settings.frame
    most = max(n for *_, n in found.histogram)
    return "\n".join(
        [
            f"{found.answers} answers of {found.records} records, {found.skipped} skipped",
            f"TPL {t.value:.4f} ({t.low:.4f} to {t.high:.4f}), ratio {found.ratio:.3f}",
            f"loss {found.loss.value:.4f} with all frames, {found.loss_one.value:.4f} with the "
            f"{frame} one",
            *(
                f"  {task:<8} TPL {x.value:.4f} ({x.low:.4f} to {x.high:.4f})"
                for task, x in found.tasks.items()
            ),
            "quantiles  " + "  ".join(f"{q} %: {x:.4f}" for q, x in found.quantiles.items()),
            *(
                f"  {a:8.3f} to {b:8.3f}  {n:7}  {'#' * round(40 * n / most)}"
                for a, b, n in found.histogram
            ),
        ]
    )


def line(row: Any) -> str:
    """A named tuple as a line of JSON."""
    return json.dumps(row._asdict(), ensure_ascii=False) + "\n"

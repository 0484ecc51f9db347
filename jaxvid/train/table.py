"""What was sampled, to read: a Parquet table every so many updates, and the faults of rewards.

WORKDIR/rollouts/step-000020.parquet   a row for every reply sampled in update 20
WORKDIR/faults.jsonl                   a line for every reply that could not be paid
"""

import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from jaxvid import files
from jaxvid.train.groups import SIDES, Fault, Replies, Settings, paid

FOLDER = "rollouts"


def write(
    workdir: pathlib.Path,
    step: int,
    seen: Replies,
    kept: Int[np.ndarray, "n"],
    advantage: Float[np.ndarray, "n 2 G"],
    settings: Settings,
) -> pathlib.Path:
    """The table of an update. `advantage` is of the pairs `kept`; of others it is null."""
    place = {int(pair): i for i, pair in enumerate(kept)}
    totals, rows = paid(seen, settings), []
    for i, question in enumerate(seen.questions):
        for example in question.examples:
            side = example.media
            for g, text in enumerate(seen.texts[i][side]):
                at, n = (i, side, g), int(seen.length[i, side, g])
                rows.append(
                    {
                        "step": step,
                        "record": question.record.id,
                        "question": example.name,
                        "side": SIDES[side],
                        "branch": g,
                        "prompt": example.prompt,
                        "answer": example.answer,
                        "reply": text,
                        "reward": float(totals[at]),
                        "format": float(seen.format[at]),
                        "correct": float(seen.correct[at]),
                        "parts": json.dumps(seen.parts[i][side][g], sort_keys=True),
                        "advantage": float(advantage[place[i], side, g]) if i in place else None,
                        "kept": i in place,
                        "paid": bool(seen.asked[i, side]),
                        "tokens": n,
                        "ended": bool(seen.ended[at]),
                        "mean_logp": float(seen.logp[at][:n].mean()) if n else 0.0,
                    }
                )
    path = workdir / FOLDER / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
    files.write(path, buffer.getvalue())
    return path


SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        *((name, pa.string()) for name in ("record", "question", "side")),
        ("branch", pa.int32()),
        *((name, pa.string()) for name in ("prompt", "answer", "reply")),
        *((name, pa.float32()) for name in ("reward", "format", "correct")),
        ("parts", pa.string()),  # JSON: values that a reward of your own names
        ("advantage", pa.float32()),
        *((name, pa.bool_()) for name in ("kept", "paid")),
        ("tokens", pa.int32()),
        ("ended", pa.bool_()),
        ("mean_logp", pa.float32()),
    ]
)


def faults(workdir: pathlib.Path, step: int, found: list[Fault]) -> None:
    """Append the faults of an update. What a run that was killed wrote of it, or later, goes."""
    path = workdir / "faults.jsonl"
    before = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in before if json.loads(line)["step"] < step]
    if len(kept) == len(before) and not found:
        return
    lines = kept + [json.dumps({"step": step} | f._asdict(), ensure_ascii=False) for f in found]
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(line + "\n" for line in lines))

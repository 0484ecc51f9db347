"""`jaxvid score`: one pass of the reference over the preferences of a run, kept for training.

DPO needs the reference's log-probs of replies that never change, and computes them in every step. A
pass ahead of it computes them once; the run then names the folder (`sidecar`), and holds no
reference model.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jaxtyping import Float

from jaxvid import config, sharding
from jaxvid.config import PreferenceRun
from jaxvid.data import layout, shards, sidecar
from jaxvid.data.pipeline import Builder, Data
from jaxvid.data.records import Record
from jaxvid.models import hf
from jaxvid.train import loop, step

PARTS = ("data", "validation")  # of a run; a folder each


def score(run: PreferenceRun, out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the reference's log-probs of the run's records, and of its validation's, into `out`
    (by default the run's `sidecar`, or FIRST_SHARDS/reference). Stopped, it goes on.

    Raises ValueError for what has no fixed reference, and where `out` holds that of another.
    """
    out = out or pathlib.Path(run.sidecar or f"{run.data.shards[0]}/reference")
    work = {name: data for name, data in _datas(run).items() if data is not None}
    todo = {}
    for name, data in work.items():
        sources = [shards.Source(folder, data.split) for folder in data.shards]
        count = -(-sum(map(len, sources)) // sidecar.RECORDS)
        made = identity(run, data)
        todo[name] = sources, sidecar.begin(out / name, made, count)
    if not any(missing for _, missing in todo.values()):
        return out
    mesh = sharding.make_mesh(run.replica, run.fsdp, run.tensor, run.context)
    with jax.set_mesh(mesh):
        loaded = config.load_model(run, mesh)
        params = hf.load(run.reference, mesh=mesh).params if run.reference else loaded.params
        scores = functools.partial(step.make_score(loaded.graph), params)
        for name, (sources, missing) in todo.items():
            data = dataclasses.replace(work[name], tasks=("preference",))
            builder = config.make_builder(run.model, loaded.cfg, data)
            _pass(builder, sources, missing, scores, out / name, mesh)
    return out


def with_sidecar(run: config.Run, builder: Builder, name: str) -> Builder:
    """The builder of `name` (one of PARTS), which reads the run's sidecar if it has one.

    Raises SidecarError where that was made of something else.
    """
    if not isinstance(run, PreferenceRun) or not run.sidecar:
        return builder
    made = identity(run, _datas(run)[name])
    found = sidecar.Sidecar(pathlib.Path(run.sidecar) / name, made)
    return dataclasses.replace(builder, sidecar=found)


def check(run: config.Run) -> None:
    """Raise at once, before a model is loaded, for a sidecar that is not the run's."""
    for name in PARTS if isinstance(run, PreferenceRun) and run.sidecar else ():
        if (data := _datas(run)[name]) is not None:
            sidecar.Sidecar(pathlib.Path(run.sidecar) / name, identity(run, data))


def identity(run: PreferenceRun, data: Data) -> dict[str, Any]:
    """What a reference's log-probs depend on, as plain JSON; what they are computed on is left out.

    Raises ValueError for runs whose reference, or whose clips, are not fixed.
    """
    if data.blank:
        raise ValueError(
            f"data.blank is {data.blank}: clips that are shown as grey by chance differ from epoch "
            "to epoch, and log-probs kept beside the shards know one of them. Set --data.blank 0, "
            "or --sidecar '' to compute the reference in every step"
        )
    if run.init and not run.reference:
        raise ValueError(
            "the reference is a model with fresh weights (init), which no folder holds; set "
            "--reference, or --sidecar ''"
        )
    still = bool(run.lora.rank or run.freeze) and not run.reference
    sources = [repr(shards.Source(folder, data.split)) for folder in data.shards]
    return {
        "model": sidecar.of_files(run.reference or run.model, "*.safetensors"),
        "words": sidecar.of_files(run.model, sidecar.WORDS),
        "config": sidecar.of_files(run.model, "config.json"),
        "dtype": run.compute.dtype,
        "frozen_dtype": run.frozen_dtype if still else "float32",
        "sampling": dataclasses.asdict(data.sampling),
        "sound": data.sound,
        "shards": sources,
    }


def _datas(run: PreferenceRun) -> dict[str, Data | None]:
    return dict(zip(PARTS, (run.data, run.validation)))


def _pass(builder: Builder, sources, missing: list[int], scores, folder, mesh) -> None:
    """Score the missing parts. A part's batches hold its own records alone, so that what was
    stopped and what ran through give the same numbers."""
    total, size = sum(map(len, sources)), builder.data.pairs
    bounds = [(i, min(i + sidecar.RECORDS, total)) for i in range(0, total, sidecar.RECORDS)]
    first = jax.process_index() == 0
    with tqdm.tqdm(total=total, unit="record", disable=not first) as bar:
        bar.update(total - sum(bounds[i][1] - bounds[i][0] for i in missing))
        for part in missing:
            found: dict[bytes, Float[np.ndarray, "s"]] = {}
            start, stop = bounds[part]
            for at in range(start, stop, size):
                numbers = range(at, min(at + size, stop))
                found |= _scored([_record(sources, i) for i in numbers], builder, scores, mesh)
                bar.update(len(numbers))
            if first:
                sidecar.write(folder, part, found)


def _record(sources: list[shards.Source], number: int) -> Record:
    for source in sources:
        if number < len(source):
            return source[number]
        number -= len(source)
    raise IndexError(f"no record {number} behind the last of {len(sources)} parts")


def _scored(found: list[Record], builder: Builder, scores, mesh) -> dict[bytes, np.ndarray]:
    """Log-probs of the scored branches of some records, by key."""
    numbers = sidecar.Numbers()
    made = dataclasses.replace(builder, sidecar=numbers)
    compared = [r for r in found if any(e.task == "preference" for e in r.examples)]
    groups = [made(record, np.random.default_rng(0)) for record in compared]  # nothing is drawn
    out: dict[bytes, np.ndarray] = {}
    for batch in layout.pack(groups, builder.data.budget) if groups else ():
        logp = _everywhere(batch, scores, mesh)
        for row, column in np.argwhere(batch.branches.record >= 0):
            here = batch.tokens.slot[row] == column + 1
            if here.any():
                out[numbers.keys[batch.branches.record[row, column]]] = logp[row, here]
    return out


def _everywhere(batch, scores, mesh) -> Float[np.ndarray, "B S"]:
    """The log-probs of a micro-batch that every process has whole: each scores its rows."""
    rows = batch.tokens.slot.shape[0] // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    local = jax.tree.map(lambda x: x[None, mine], batch)
    logp = scores(loop.place(local, mesh)).logp
    if jax.process_count() > 1:
        logp = multihost_utils.process_allgather(logp, tiled=True)
    return np.asarray(logp)[0]

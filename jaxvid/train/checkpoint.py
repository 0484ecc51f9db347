"""Checkpoints of a run: the train state, where the data stood, the seed, config and code version.

Orbax writes in the background and publishes a step by renaming it (at gs:// by a file in it, which
is written last), so a killed run leaves whole checkpoints only. Kept are the last `keep` and the
best by one validation metric. A checkpoint restores onto any mesh, any number of processes and
other floating-point types. Every array's checksum is compared on the way back in; where the newest
checkpoint is damaged, the one before it is taken, and the damaged one is set aside as STEP.damaged.

Frozen weights are not saved: they are read again from where the run began, and their checksums,
which are saved, tell whether that is still the same.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import re
import subprocess
import uuid
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import fsspec
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import nnx
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxvid import files, hosts, paths
from jaxvid.train.state import NONE, TrainState

FORMAT = 2


class Damaged(ValueError):
    """A checkpoint that cannot be read, or is not what was written."""


class Meta(NamedTuple):
    """What stands beside the arrays; plain JSON."""

    seed: int
    data: Any  # the stream's get_state(): the same in every process
    config: dict[str, Any]
    code: str = ""  # of whoever wrote it: see `code_version`


class Checkpoints:
    """The checkpoints in `folder`, here or at gs://; `best` names the metric that decides which
    one is kept. `tidy`: what was not written to its end is removed, which the run itself may do.

    Raises ValueError for storage that Orbax does not write to, and where the processes of a run do
    not see the same checkpoints.
    """

    def __init__(
        self,
        folder: pathlib.Path | str,
        *,
        keep: int = 2,
        best: str = "eval_loss",
        mode: Literal["min", "max"] = "min",
        tidy: bool = True,
    ):
        self.folder = _folder(folder)
        self.passed: list[int] = []  # damaged steps that `restore` set aside
        # A checkpoint without a validation ranks last, and of those the latest first.
        self.best, self.worst = best, math.inf if mode == "min" else -math.inf
        score: Callable[[Any], float] = lambda m: m.get(best, self.worst)
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(get_metric_fn=score, reverse=mode == "min", n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=score, best_mode=mode, cleanup_tmp_directories=tidy
        )
        self._mend_metrics()
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        seen = hosts.gather(sorted(self.manager.all_steps()))
        if any(steps != seen[0] for steps in seen):
            raise ValueError(
                f"the processes see different checkpoints in {self.folder}: {seen}. Give a "
                "--workdir that all of them share"
            )

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; None if no checkpoint has one."""
        step = self.manager.best_step()
        scores = {} if step is None else self.manager.metrics(step) or {}
        known = math.isfinite(scores.get(self.best, math.nan))
        return step if known else None

    def save(
        self, step: int, state: TrainState, meta: Meta, metrics: dict[str, float] | None = None
    ) -> None:
        """Start writing; returns once the arrays are off the device. `metrics` of a validation."""
        arrays = flatten(_own(state))
        sums = jax.device_get(checksums(arrays))
        content = {
            "format": FORMAT,
            "step": step,
            "seed": meta.seed,
            "data": _of_every_process(meta.data),
            "config": meta.config,
            "code": code_version(),
            "arrays": {k: [x.shape, str(x.dtype), int(sums[k])] for k, x in arrays.items()},
            "frozen": _identity(state.frozen),
        }
        content = json.loads(json.dumps(content))
        content["sha256"] = _digest(content)
        value = (metrics or {}).get(self.best, self.worst)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(content)
            ),
            metrics={self.best: value if math.isfinite(value) else self.worst},
        )

    def restore(
        self, like: TrainState, step: int | None = None, *, config: dict[str, Any] | None = None
    ) -> tuple[int, TrainState, Meta]:
        """The checkpoint of `step` (None: the last that is whole), laid out as the arrays of
        `like`; the frozen weights are those of `like`. Damaged ones after it are renamed.

        `config`, the run's own, is for the error about a checkpoint of another run, which says
        what differs. Floating-point arrays are cast to the types of `like`, and that is printed.
        Raises FileNotFoundError if there is none, Damaged if what is wanted cannot be read or has
        changed, ValueError if it is of another model or optimizer, or if the frozen weights of
        `like` are not those that the run began with.
        """
        if step is not None or self.latest() is None:
            return self._restore(like, step, config)
        faults: dict[int, Damaged] = {}
        for at in sorted(self.manager.all_steps(), reverse=True):
            try:
                found = self._restore(like, at, config)
            except Damaged as error:
                faults[at] = error
                continue
            for bad, error in faults.items():
                say(f"{error}\n  set aside as {self._set_aside(bad)}; going on from step {at}")
                self.passed.append(bad)
            return found
        raise Damaged(
            f"no checkpoint in {self.folder} can be read; all were left as they are. If the disk "
            "or the network failed, start again; else put back a copy, or start in a new "
            "--workdir.\n  " + "\n  ".join(str(error) for error in faults.values())
        )

    def _restore(self, like: TrainState, step: int | None, config: dict[str, Any] | None):
        content = self._read_meta(step)
        own = flatten(_own(like))
        try:
            told = self._check_frozen(content, like.frozen)
            self._check(content, own)
        except ValueError as error:
            changed = differences(content["config"], json.loads(json.dumps(config or {})))
            if config is None or not changed:
                raise
            lines = "\n  ".join(changed)
            raise ValueError(f"{error}\nThe config has changed since:\n  {lines}") from None
        arrays = self._read_arrays(step, content, own)
        state = jax.tree.unflatten(jax.tree.structure(_own(like)), list(arrays.values()))
        state = state._replace(frozen=like.frozen)
        if told:
            say(f"checkpoint of step {step}: {told}")
        meta = Meta(*(content[name] for name in Meta._fields))
        return step, state, meta

    def restore_params(
        self,
        shapes: nnx.State,
        shardings: nnx.State,
        step: int | None = None,
        *,
        frozen: nnx.State = NONE,
    ) -> nnx.State:
        """The trained parameters alone of a checkpoint, whatever the optimizer was. Raises and
        casts as `restore` does; `frozen` are the weights that the run did not train."""
        step = self.latest() if step is None else step
        content = self._read_meta(step)
        self._check_frozen(content, frozen)
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        structs = jax.tree.map(place, shapes, shardings)
        wanted = flatten(TrainState(None, structs, None, None, None))
        content["arrays"] = {k: v for k, v in content["arrays"].items() if k.startswith("params.")}
        self._check(content, wanted)
        arrays = self._read_arrays(step, content, wanted)
        return jax.tree.unflatten(jax.tree.structure(structs), list(arrays.values()))

    def _read_meta(self, step: int | None) -> dict[str, Any]:
        """What `save` wrote beside the arrays of a step. Raises as `restore` does."""
        there = sorted(self.manager.all_steps())
        if step not in there:
            raise FileNotFoundError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {self.folder}; "
                f"there are {there or 'none'}"
            )
        handler = ocp.JsonCheckpointHandler()
        content = self._whole(step, lambda: handler.restore(self.folder / str(step) / "meta"))
        digest = content.pop("sha256", None)
        if digest not in (None, _digest(content)):
            raise Damaged(self._about(step, "what it says of itself has changed"))
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} holds checkpoints of format {content.get('format')}; this version "
                f"reads {FORMAT}. Start in a new --workdir, or use the version that wrote it."
            )
        return content

    def _read_arrays(
        self, step: int, content: dict[str, Any], wanted: dict[str, Any]
    ) -> dict[str, Array]:
        """The arrays named in `wanted`, in its order and as its types. Raises Damaged if they
        have changed since they were written."""
        was = {k: jnp.dtype(content["arrays"][k][1]) for k in wanted}
        place = lambda k, x: jax.ShapeDtypeStruct(x.shape, was[k], sharding=x.sharding)
        structs = {k: place(k, x) for k, x in wanted.items()}
        args = ocp.args.PyTreeRestore(
            item=structs,
            restore_args=ocp.checkpoint_utils.construct_restore_args(structs),
            partial_restore=True,
        )
        # Not through the manager, which would wait for a process that could not read its part.
        handler = ocp.PyTreeCheckpointHandler()
        read = lambda: handler.restore(self.folder / str(step) / "state", args=args)
        arrays = self._whole(step, read)
        sums = jax.device_get(checksums(arrays))
        if bad := [k for k in wanted if int(sums[k]) != content["arrays"][k][2]]:
            fault = f"{len(bad)} arrays differ from what was saved ({', '.join(bad[:3])})"
            raise Damaged(self._about(step, fault))
        if cast := [k for k in wanted if was[k] != wanted[k].dtype]:
            kinds = sorted({f"{was[k]} to {wanted[k].dtype}" for k in cast})
            say(f"checkpoint of step {step}: {len(cast)} arrays are cast, {', '.join(kinds)}")
        for k in cast:
            arrays[k] = arrays[k].astype(wanted[k].dtype)
        return {k: arrays[k] for k in wanted}

    def _whole(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives. Raises Damaged, in every process, if it fails in one: they must go on
        from the same step."""
        found, fault = None, ""
        try:
            found = read()
        except Exception as error:  # Orbax and TensorStore raise what they please
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if fault := next(filter(None, hosts.gather(fault)), ""):
            raise Damaged(self._about(step, fault))
        return found

    def _about(self, step: int, fault: str) -> str:
        return f"checkpoint {self.folder / str(step)} is damaged: {fault}"

    def _set_aside(self, step: int) -> str:
        """Rename the folder of a step, so that the step can be saved again; its new name."""
        names = (f"{step}.damaged{f'-{i}' if i else ''}" for i in itertools.count())
        free = next(name for name in names if not (self.folder / name).exists())
        hosts.together()  # all have looked
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / free)
        hosts.together()
        self.manager.reload()
        return free

    def _mend_metrics(self) -> None:
        """Give a checkpoint whose metrics cannot be read the worst there are: the manager reads
        those of every step, and would not start."""
        if jax.process_index() == 0 and self.folder.is_dir():
            for step in self.folder.iterdir():
                path = step / "metrics" / "metrics"
                if not step.name.isdigit() or not path.exists():
                    continue
                try:
                    fine = isinstance(json.loads(path.read_text()), dict)
                except ValueError:
                    fine = False
                if not fine:
                    say(f"{path} cannot be read; the checkpoint counts as one without validation")
                    path.write_text(json.dumps({self.best: self.worst}))
        hosts.together()

    def wait(self) -> None:
        """Block until what was started is on disk; raises what went wrong there."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    def _check(self, content: dict[str, Any], wanted: dict[str, Any]) -> None:
        there = {k: (tuple(v[0]), v[1]) for k, v in content["arrays"].items()}
        here = {k: (tuple(x.shape), str(x.dtype)) for k, x in wanted.items()}
        wrong = [f"{k}: the run has no such array" for k in there.keys() - here.keys()]
        wrong += [f"{k}: the checkpoint has no such array" for k in here.keys() - there.keys()]
        wrong += [
            f"{k}: checkpoint {there[k]}, run {here[k]}"
            for k in there.keys() & here.keys()
            if there[k] != here[k] and not _castable(there[k], here[k])
        ]
        wrong.sort(key=lambda line: (not line.startswith("params."), line))  # the model first
        if wrong:
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(
                f"the checkpoint in {self.folder} is of another model or optimizer. Give a new "
                "--workdir, or the config it was made with:\n  " + "\n  ".join(wrong[:8]) + more
            )

    def _check_frozen(self, content: dict[str, Any], frozen: nnx.State) -> str:
        """What is to be told of the frozen weights: that their types have changed, or nothing."""
        there, here = content["frozen"], _identity(frozen)
        if there.keys() != here.keys():
            odd = sorted(there.keys() ^ here.keys())
            raise ValueError(
                f"the checkpoint in {self.folder} froze other weights than this run does: "
                f"{', '.join(odd[:4])}{' ...' if odd[4:] else ''}. Give `freeze` and `lora` as it "
                "was made with, or a new --workdir."
            )
        if changed := [k for k in here if not _same(here[k], there[k])]:
            raise ValueError(
                f"{len(changed)} frozen weights are not those that the run in {self.folder} began "
                f"with: {', '.join(changed[:3])}. Frozen weights are read from the run's model "
                f"({content['config'].get('model', 'not named')}); put it back as it was, or start "
                "in a new --workdir."
            )
        cast = sorted({f"{there[k][1]} to {here[k][1]}" for k in here if here[k] != there[k]})
        return f"the frozen weights go from {', '.join(cast)}" if cast else ""


def _folder(folder: pathlib.Path | str) -> epath.Path:
    if not files.is_remote(folder):
        return epath.Path(folder).absolute()
    if not str(folder).startswith("gs://"):
        # Orbax would take it for a local folder, s3:/bucket.
        raise ValueError(
            f"{folder}: Orbax reads and writes checkpoints at gs:// and in local folders alone"
        )
    # Else a process does not see what others, or TensorStore in this one, have written since.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    there = epath.Path(folder)
    # Its own name is that of a folder made by hand; probes are left where they cannot be removed.
    known = rf"\d+(\.damaged(-\d+)?)?|metadata|\.jaxvid-\w+|{re.escape(there.name)}"
    names = [one.name for one in there.iterdir()] if there.is_dir() else []
    if odd := sorted(name for name in names if not re.fullmatch(known, name)):
        # Orbax removes every folder there that does not say that it is a whole checkpoint.
        raise ValueError(
            f"{folder} holds what is not jaxvid's: {', '.join(odd[:4])}. Give another --workdir"
        )
    return there


def check_bucket(url: str) -> None:
    """Raises ValueError unless Orbax can write checkpoints to this gs:// folder. What it does
    there is tried here in small, before a model is loaded."""
    files.opened(url)  # is the package there that the next imports come with?
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    bucket, _, path = url.removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/.jaxvid-{uuid.uuid4().hex}/"}
    patience = {"gcs_request_retries": {"max_retries": 3}}
    try:
        storage.Client().get_bucket(bucket)  # Orbax asks in this way whether it has real folders
        store = tensorstore.KvStore.open(spec, context=tensorstore.Context(patience)).result()
        store.write("probe", b"written by jaxvid to see whether it can; remove it").result()
        store.delete_range(tensorstore.KvStore.KeyRange()).result()
    except (GoogleAPIError, GoogleAuthError, OSError, ValueError) as error:
        raise ValueError(
            f"checkpoints cannot be written to {url}: {error}\nIs the name of the bucket right, "
            "does this machine have credentials (a service account, `gcloud auth application-"
            "default login`), and do its roles hold storage.buckets.get and storage.objects.create,"
            " get, list and delete (roles/storage.objectUser, roles/storage.legacyBucketReader)?"
        ) from error


def say(text: str) -> None:
    """Print from one process."""
    if jax.process_index() == 0:
        print(text, flush=True)


@functools.cache
def code_version() -> str:
    """Version of the package and, in a checkout, the commit (`+` if files differ from it)."""
    folder = pathlib.Path(__file__).resolve().parents[2]
    try:
        version = importlib.metadata.version("jaxvid")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if not (folder / ".git").exists():  # installed: a repository around it is another project's
        return version
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository it refuses
        return version
    return f"{version}, commit {commit}{'+' if changed else ''}"


def _git(folder: pathlib.Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """`field: old -> new` for everything that differs between two saved runs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{path}: {json.dumps(before)} -> {json.dumps(after)}"]
    names = sorted(before.keys() | after.keys())
    join = lambda name: f"{path}.{name}" if path else name
    found = [differences(before.get(n), after.get(n), join(n)) for n in names]
    return [line for lines in found for line in lines]


def flatten(state: TrainState) -> dict[str, Any]:
    """Name -> array for every leaf: `params.decoder.table.value`, `opt_state.1.mu. ...`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _own(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state."""
    return state._replace(frozen=NONE)


def _castable(there: tuple[Any, str], here: tuple[Any, str]) -> bool:
    """Whether (shape, type) of a checkpoint can become those of the run."""
    floats = all(jnp.issubdtype(jnp.dtype(kind), jnp.floating) for _, kind in (there, here))
    return there[0] == here[0] and floats


def _identity(frozen: nnx.State) -> dict[str, list[Any]]:
    """[shape, dtype, checksum, checksum as bfloat16] of every frozen weight, by name."""
    arrays = {paths.join(path): v[...] for path, v in nnx.to_flat_state(frozen)}
    sums, short = jax.device_get((checksums(arrays), checksums(arrays, jnp.bfloat16)))
    about = lambda k, x: [list(x.shape), str(x.dtype), int(sums[k]), int(short[k])]
    return {k: about(k, x) for k, x in arrays.items()}


def _same(here: list[Any], there: list[Any]) -> bool:
    """Whether two identities are of one weight: its bits, or in another type its bfloat16's."""
    which = 2 if here[1] == there[1] else 3
    return here[0] == there[0] and here[which] == there[which]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit, static_argnums=1)
def checksums(arrays: dict[str, Array], dtype: Any = None) -> dict[str, UInt32[Array, ""]]:
    """Sum of the bits of each array as integers: exact, and the same on every mesh. `dtype` is
    what arrays of floating-point numbers are cast to before."""

    def one(x):
        if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(dtype)
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return {name: one(x) for name, x in arrays.items()}


def _of_every_process(data: Any) -> Any:
    """`data` as JSON gives it back. Raises ValueError if it is not the same in all processes: a
    run may go on with another number of them."""
    found = hosts.gather(data)
    if any(one != found[0] for one in found):
        raise ValueError(f"the processes' streams stand at different places: {found}")
    return found[0]

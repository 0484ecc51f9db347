"""Checkpoints of a run: the train state, where the data stood, the seed and the config.

Orbax writes in the background and publishes a step by renaming it, so a killed run leaves whole
checkpoints only. Kept are the last `keep` and the best by one validation metric. A checkpoint
restores onto any mesh. Every array's checksum is compared on the way back in.

Frozen weights are not saved: they are read again from where the run began, and their checksums,
which are saved, tell whether that is still the same.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxvid import paths
from jaxvid.train.state import NONE, TrainState

FORMAT = 1


class Meta(NamedTuple):
    """What stands beside the arrays; plain JSON."""

    seed: int
    data: Any  # the iterator's get_state()
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder`; `best` names the metric that decides which one is kept."""

    def __init__(
        self,
        folder: pathlib.Path | str,
        *,
        keep: int = 2,
        best: str = "eval_loss",
        mode: Literal["min", "max"] = "min",
    ):
        self.folder = pathlib.Path(folder).absolute()
        # A checkpoint without a validation ranks last, and of those the latest first.
        self.best, self.worst = best, math.inf if mode == "min" else -math.inf
        score: Callable[[Any], float] = lambda m: m[best]
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(get_metric_fn=score, reverse=mode == "min", n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=score, best_mode=mode, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; None if no checkpoint has one."""
        step = self.manager.best_step()
        known = step is not None and math.isfinite(self.manager.metrics(step)[self.best])
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
            "data": _of_all_processes(meta.data),
            "config": meta.config,
            "arrays": {k: [list(x.shape), str(x.dtype), int(sums[k])] for k, x in arrays.items()},
            "frozen": _identity(state.frozen),
        }
        value = (metrics or {}).get(self.best, self.worst)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(content)
            ),
            metrics={self.best: value if math.isfinite(value) else self.worst},
        )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[int, TrainState, Meta]:
        """The checkpoint of `step` (None: the last), laid out as the arrays of `like`; the frozen
        weights are those of `like`.

        Raises FileNotFoundError if there is none, ValueError if it is of another model or
        optimizer, if its arrays are not those that were saved, or if the frozen weights of `like`
        are not those that the run began with.
        """
        step = self.latest() if step is None else step
        content = self._read_meta(step)
        wanted = {
            k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for k, x in flatten(_own(like)).items()
        }
        self._check_frozen(content, like.frozen)
        self._check(content, wanted)
        arrays = self._read_arrays(step, content, wanted)
        state = jax.tree.unflatten(jax.tree.structure(_own(like)), list(arrays.values()))
        state = state._replace(frozen=like.frozen)
        return step, state, Meta(content["seed"], self._data(content["data"]), content["config"])

    def restore_params(
        self,
        shapes: nnx.State,
        shardings: nnx.State,
        step: int | None = None,
        *,
        frozen: nnx.State = NONE,
    ) -> nnx.State:
        """The trained parameters alone of a checkpoint, whatever the optimizer was. Raises as
        `restore` does; `frozen` are the weights that the run did not train."""
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
        there = sorted(self.manager.all_steps())
        if step not in there:
            raise FileNotFoundError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {self.folder}; "
                f"there are {there or 'none'}"
            )
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args)["meta"]

    def _read_arrays(
        self, step: int, content: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, Array]:
        """The arrays named in `wanted`, in its order. Raises ValueError if they have changed."""
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        arrays = self.manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        sums = jax.device_get(checksums(arrays))
        if bad := [k for k in wanted if int(sums[k]) != content["arrays"][k][2]]:
            raise ValueError(
                f"checkpoint {self.folder}/{step} is damaged: {len(bad)} arrays differ from what "
                f"was saved ({', '.join(bad[:3])}). Delete the folder {step} to resume from the "
                "checkpoint before it."
            )
        return {k: arrays[k] for k in wanted}

    def wait(self) -> None:
        """Block until what was started is on disk; raises what went wrong there."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    def _check(self, content: dict[str, Any], wanted: dict[str, Any]) -> None:
        if content["format"] != FORMAT:
            raise ValueError(
                f"{self.folder} holds checkpoints of format {content['format']}; this version "
                f"reads {FORMAT}. Start in a new --workdir, or use the version that wrote it."
            )
        there = {k: (tuple(v[0]), v[1]) for k, v in content["arrays"].items()}
        here = {k: (tuple(x.shape), str(x.dtype)) for k, x in wanted.items()}
        wrong = [f"{k}: the run has no such array" for k in there.keys() - here.keys()]
        wrong += [f"{k}: the checkpoint has no such array" for k in here.keys() - there.keys()]
        wrong += [
            f"{k}: checkpoint {there[k]}, run {here[k]}"
            for k in there.keys() & here.keys()
            if there[k] != here[k]
        ]
        wrong.sort(key=lambda line: (not line.startswith("params."), line))  # the model first
        if wrong:
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(
                f"the checkpoint in {self.folder} is of another model or optimizer. Give a new "
                "--workdir, or the config it was made with:\n  " + "\n  ".join(wrong[:8]) + more
            )

    def _check_frozen(self, content: dict[str, Any], frozen: nnx.State) -> None:
        there, here = content.get("frozen", {}), _identity(frozen)
        if there.keys() != here.keys():
            odd = sorted(there.keys() ^ here.keys())
            raise ValueError(
                f"the checkpoint in {self.folder} froze other weights than this run does: "
                f"{', '.join(odd[:4])}{' ...' if odd[4:] else ''}. Give `freeze` and `lora` as it "
                "was made with, or a new --workdir."
            )
        if changed := [k for k in here if here[k] != there[k]]:
            raise ValueError(
                f"{len(changed)} frozen weights are not those that the run in {self.folder} began "
                f"with: {', '.join(changed[:3])}. Frozen weights are read from the run's model "
                f"({content['config'].get('model', 'not named')}), in frozen_dtype; put both back "
                "as they were, or start in a new --workdir."
            )

    def _data(self, states: list[Any]) -> Any:
        if len(states) != jax.process_count():
            raise ValueError(
                f"the checkpoint in {self.folder} was written by {len(states)} processes and this "
                f"run has {jax.process_count()}: their data streams cannot be continued. Resume "
                f"with {len(states)} processes, or export the model and start from it."
            )
        return states[jax.process_index()]


def flatten(state: TrainState) -> dict[str, Any]:
    """Name -> array for every leaf: `params.decoder.table.value`, `opt_state.1.mu. ...`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _own(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state."""
    return state._replace(frozen=NONE)


def _identity(frozen: nnx.State) -> dict[str, list[Any]]:
    """[shape, dtype, checksum] of every frozen weight, by name; plain JSON."""
    arrays = {paths.join(path): v[...] for path, v in nnx.to_flat_state(frozen)}
    sums = jax.device_get(checksums(arrays))
    return {k: [list(x.shape), str(x.dtype), int(sums[k])] for k, x in arrays.items()}


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """Sum of the bits of each array as integers: exact, and the same on every mesh."""

    def one(x):
        bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return {name: one(x) for name, x in arrays.items()}


def _of_all_processes(data: Any) -> list[Any]:
    """The data state of every process, in order; one process writes them all."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(data))]
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size])).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:n].tobytes().decode()) for row, n in zip(rows, sizes)]

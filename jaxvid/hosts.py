"""The processes of one run: how they start, and what they tell one another.

Every process runs the same program on its own devices and its own part of the data. Whatever
decides what is run next (how many replies are still missing, whether a pair is kept) is agreed on
here first, so that all of them dispatch the same programs in the same order. In a run of one
process nothing is sent and arrays are handed through.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from jaxvid import sharding

# A process that says nothing for so long is taken for dead, and the others end.
SILENCE = 60  # seconds
WAIT = 300  # seconds that a process waits for the others to start


def start(where: str) -> None:
    """Join the other processes of a run; before anything else of JAX.

    where: "" is a process by itself; "auto" finds the others as JAX does (TPU slices, SLURM, GKE,
    Open MPI); "HOST:PORT,I,N" is process I of N, of which process 0 listens there. Raises
    ValueError for anything else, and where nothing is found.
    """
    if not where:
        return
    limits = {"heartbeat_timeout_seconds": SILENCE, "initialization_timeout": WAIT}
    if where == "auto":
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            raise ValueError(
                f"--distributed auto found no cluster here ({error}); name the processes by "
                "--distributed HOST:PORT,I,N, or leave it out on one machine"
            ) from error
        return
    address, *numbers = where.split(",")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or ":" not in address:
        raise ValueError(f"--distributed {where!r}; give auto or HOST:PORT,I,N (process I of N)")
    process, processes = map(int, numbers)
    if process >= processes:
        raise ValueError(f"--distributed {where!r}: processes are 0 to {processes - 1}")
    jax.distributed.initialize(address, processes, process, **limits)


def share() -> dict[str, int]:
    """Which part of the data is this process's, as `data.pipeline` takes it."""
    return {"process": jax.process_index(), "processes": jax.process_count()}


def check(mesh: Mesh) -> None:
    """ValueError unless every row of a batch lies in one process."""
    processes = jax.process_count()
    rows = np.vectorize(lambda d: d.process_index)(mesh.devices)
    rows = rows.reshape(sharding.data_shards(mesh), -1)  # the axes of rows come first
    if processes > 1 and (rows != rows[:, :1]).any():
        raise ValueError(
            f"a row of the batch would lie in several processes: mesh {dict(mesh.shape)} over "
            f"{processes} processes of {jax.local_device_count()} devices. Set tensor x context "
            f"to a divisor of {jax.local_device_count()}"
        )


def together() -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxvid")


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order. Plain JSON."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size])).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:n].tobytes().decode()) for row, n in zip(rows, sizes)]


def interleave(x: np.ndarray) -> np.ndarray:
    """[n, ...] of each process -> [n * processes, ...], in the order in which `data.pipeline` deals
    records out: element i of process p is number i * processes + p. All have the same n."""
    if jax.process_count() == 1:
        return x
    every = multihost_utils.process_allgather(x)  # [processes, n, ...]
    return np.moveaxis(every, 0, 1).reshape(-1, *x.shape[1:])


def most(*numbers: int) -> list[int]:
    """The largest of each number over the processes."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.array(numbers)).max(0).tolist()


def some(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    return [n > 0 for n in most(*map(int, flags))]


def until(over: Callable[[], bool], every: float = 1.0) -> None:
    """Wait until `over()` in all processes. They ask one another every so many seconds: no single
    wait is long, so nothing on the way takes it for a hang."""
    while some(not over())[0]:
        time.sleep(every)


def place(tree: Any, where: Sharding) -> Any:
    """This process's part of arrays, as arrays of all processes. Random keys too."""

    def one(x):
        if jax.process_count() == 1:
            return jax.device_put(x, where)
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.make_array_from_process_local_data(where, np.asarray(jax.random.key_data(x)))
            return jax.random.wrap_key_data(data)
        return jax.make_array_from_process_local_data(where, np.asarray(x))

    return jax.tree.map(one, tree)


def local(x: jax.Array, axis: int = 0) -> np.ndarray:
    """What this process gave of an array that is split along `axis` alone."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[axis].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)], axis)

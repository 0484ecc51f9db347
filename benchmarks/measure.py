"""Time and memory on this machine, and the table a benchmark prints.

Times that are compared come from one process, run in turns (A, B, A, B, ...), so that load from
outside falls on both; a figure is the median. Memory of a compiled program is the compiler's own
plan of its temporaries; of a whole process, the most that was resident.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxvid import sharding

MIB, GIB = 2**20, 2**30


class Row(NamedTuple):
    """A line of a table. Without a target it is there to be read."""

    what: str
    figure: str
    target: str = ""
    reached: str = ""


def at_most(what: str, value: float, limit: float, of: str = "{:.2f}") -> Row:
    """A figure that should not be larger than `limit`; `of` formats both."""
    reached = "yes" if value <= limit else "no"
    return Row(what, of.format(value), "at most " + of.format(limit), reached)


def at_least(what: str, value: float, limit: float, of: str = "{:.2f}") -> Row:
    """A figure that should not be smaller than `limit`; `of` formats both."""
    reached = "yes" if value >= limit else "no"
    return Row(what, of.format(value), "at least " + of.format(limit), reached)


def table(rows: list[Row], out: str = "") -> str:
    """Prints the rows as one markdown table, writes it to the file `out` if named, returns it."""
    lines = ["| figure | measured | target | reached |", "|---|---|---|---|"]
    text = "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
    print(text, end="", flush=True)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            file.write(text)
    return text


def seconds(
    runs: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1
) -> dict[str, float]:
    """Median time of each run, taken in turns; each runs `warm` times before."""
    taken = {name: [] for name in runs}
    for i in range(repeats + warm):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= warm:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def laps(
    run: Callable[[], Any],
    repeats: int,
    *,
    warm: int = 1,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> tuple[list[float], list[Any]]:
    """(seconds, result) of every run, those to warm up at the head; `wait` makes a result final."""
    taken, results = [], []
    for _ in range(warm + repeats):
        start = time.perf_counter()
        result = run()
        wait(result)
        taken.append(time.perf_counter() - start)
        results.append(result)
    return taken, results


def one_device() -> jax.sharding.Mesh:
    """The mesh of the first device alone."""
    kinds = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    shape = (1,) * len(kinds)
    return jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=jax.devices()[:1])


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program allocates beside its arguments and results, at its peak."""
    return compiled.memory_analysis().temp_size_in_bytes


def peak_resident(module: str, *args: str) -> int:
    """The most bytes that `python -m module args` had resident, in a process of its own.

    Raises RuntimeError if it fails.
    """
    command = [sys.executable, "-m", module, *args]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
    if child.returncode:
        raise RuntimeError(f"`{' '.join(command)}` exited with {child.returncode}; run it alone")
    return usage.ru_maxrss * 1024

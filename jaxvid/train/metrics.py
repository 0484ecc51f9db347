"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a line that a person reads.

One line of JSON per logged step: {"step": 20, "loss": ..., "grad_norm": ..., ...}. A number that is
not finite is null there (JSON has no nan) and left out of TensorBoard.
"""

import datetime
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import tensorboardX
from jaxtyping import Array, Float

from jaxvid import files


class Window:
    """Means of every metric over the steps since the last line; skipped steps count apart."""

    # A non-finite step changed nothing: its loss would hide the mean of the others.
    COUNTERS = ("skipped", "skipped_total")

    def __init__(self):
        self.values: dict[str, list[float]] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means, and an empty window. Counters give their last value, .../max the largest."""
        means = {name: self._mean(name, seen) for name, seen in self.values.items()}
        self.values = {}
        return means

    def _mean(self, name: str, seen: list[float]) -> float:
        if name in self.COUNTERS:
            return seen[-1]
        finite = [x for x in seen if math.isfinite(x)]
        if name.endswith("/max") and finite:
            return max(finite)
        return sum(finite) / len(finite) if finite else math.nan


class Writer:
    """Appends to `folder`. A run resumed at `start` first drops what was logged after it. `also`
    gets every line too."""

    def __init__(
        self,
        folder: pathlib.Path,
        start: int = 0,
        also: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self.folder, self.board, self.also = folder, None, also
        if jax.process_index():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        lines = read(folder) if self.path.exists() else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= start]
        files.write(self.path, "".join(kept))
        self.board = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else None
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.board is None:
            return
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        line = {"step": step} | {name: finite.get(name) for name in values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in finite.items():
            self.board.add_scalar(name, value, step)
        if self.also is not None:
            self.also(step, values)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


# What of a line a person watches, where it is there, and how it is written.
SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", "loss {:.4f}".format),
    ("reward", "reward {:.3f}".format),
    ("rewards/accuracies", "accuracy {:.2f}".format),
    ("grad_norm", "|g| {:.3f}".format),
    ("learning_rate", "lr {:.2e}".format),
    ("perf/throughput", "{:,.0f} tokens/s".format),
    ("perf/tflops", "{:.3g} TFLOP/s".format),
    ("perf/mfu", "MFU {:.1%}".format),
    ("perf/input_wait", "input {:.0%}".format),
    ("perf/memory_peak_gib", "{:.1f} GiB".format),
    ("step_time", "{:.3g} s/step".format),
)


def line(step: int, steps: int, values: dict[str, float], pace: float) -> str:
    """One line about `values` at a step out of `steps`, and the time left at `pace` s a step."""
    known = {name for name in values if not (name == "perf/tflops" and "perf/mfu" in values)}
    told = [write(values[name]) for name, write in SHOWN if name in known]
    if (skipped := values.get("skipped_total", 0)) > 0:
        told.append(f"{skipped:.0f} skipped")
    left = datetime.timedelta(seconds=round((steps - step) * pace))
    return f"step {step:{len(str(steps))}}/{steps}  " + "  ".join(told) + f"  {left} left"


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl: step, and a number or None by name.

    A last line cut off by a kill is left out.
    """
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def to_host(values: dict[str, Float[Array, ""] | float]) -> dict[str, float]:
    """Python floats; waits for the device."""
    return {name: float(x) for name, x in jax.device_get(values).items()}

"""What watches a run from inside: traces for the profiler, an end to runs that stand still, memory
and speed."""

import faulthandler
import pathlib
import resource
import signal
import sys
import threading
from typing import Any

import jax

from jaxvid import chips

FOLDER = "profile"  # of the work folder
ON_SIGNAL = 3  # updates that SIGUSR1 has traced


class Trace:
    """Traces updates `first` to `last` (0: none) into WORKDIR/profile, and the next few when the
    process gets SIGUSR1. TensorBoard's profiler and xprof read them."""

    def __init__(self, workdir: pathlib.Path, first: int, last: int):
        if not 0 <= first <= last:
            raise ValueError(
                f"profile is ({first}, {last}); give the first and the last update to trace, such "
                "as 10 12, or 0 0 for none"
            )
        self.folder, self.span, self.until = workdir / FOLDER, (first, last), 0
        self.asked, self.old = False, None

    def __enter__(self) -> "Trace":
        if threading.current_thread() is threading.main_thread():
            self.old = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.old is not None:
            signal.signal(signal.SIGUSR1, self.old)
        if self.until:
            self.until = 0
            jax.profiler.stop_trace()

    def before(self, n: int) -> None:
        """Start where update n is the first to trace."""
        if self.until or not (self.asked or n == self.span[0]):
            return
        self.until = n + ON_SIGNAL - 1 if self.asked else self.span[1]
        self.asked = False
        jax.profiler.start_trace(str(self.folder))

    def after(self, n: int, result: Any) -> None:
        """Stop where update n, which gave `result`, was the last."""
        if self.until and n >= self.until:
            jax.block_until_ready(result)
            self.until = 0
            jax.profiler.stop_trace()

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


class Watchdog:
    """Ends the process, with the stacks of all its threads on stderr, where nothing was heard of it
    for `minutes` (0: never): a run that hangs costs as much as one that works."""

    def __init__(self, minutes: float):
        if minutes < 0:
            raise ValueError(f"stall_minutes is {minutes}; give minutes, or 0 for never")
        self.seconds = 60 * minutes

    def __enter__(self) -> "Watchdog":
        self.heard()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.rest()

    def rest(self) -> None:
        """Wait for nothing until `heard`: validation takes as long as it takes."""
        faulthandler.cancel_dump_traceback_later()

    def heard(self) -> None:
        """The run goes on: wait anew."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)


def memory() -> dict[str, float]:
    """Most memory in use on any device of this process so far, in GiB; nothing where a platform
    does not say."""
    told = [d.memory_stats() for d in jax.local_devices()]
    peaks = [t["peak_bytes_in_use"] for t in told if t and "peak_bytes_in_use" in t]
    return {"perf/memory_peak_gib": max(peaks) / 2**30} if peaks else {}


def speed(flops: float, seconds: float) -> dict[str, float]:
    """What each device made of a step of so many FLOPs, over all devices: TFLOP/s, and their share
    of its bfloat16 peak (model FLOPs utilisation) where that is known."""
    each = flops / seconds / jax.device_count()
    peak = chips.peak(jax.devices()[0].device_kind)
    return {"perf/tflops": each / 1e12} | ({"perf/mfu": each / peak} if peak else {})


def host_memory() -> dict[str, float]:
    """Most memory that this process had resident so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {"perf/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}

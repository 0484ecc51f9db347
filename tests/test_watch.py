"""Watching a run: traces on demand, and an end to runs that stand still."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import pytest
from toy import SETTINGS, Stream, train

from jaxvid.train import metrics, watch


def traces(folder):
    return sorted((folder / watch.FOLDER).rglob("*.xplane.pb"))


def test_steps_are_traced_when_asked_for(tmp_path):
    """By their numbers, and three more by a signal; the lines say how long data were waited for."""
    hook = lambda n: os.kill(os.getpid(), signal.SIGUSR1) if n == 4 else None
    before = signal.getsignal(signal.SIGUSR1)
    train(tmp_path, Stream(before=hook), dataclasses.replace(SETTINGS, profile=(2, 2)))
    assert signal.getsignal(signal.SIGUSR1) == before
    assert len(traces(tmp_path)) == 2
    for line in metrics.read(tmp_path):
        assert 0 <= line["perf/input_wait"] <= 1


def test_nothing_is_traced_unasked(tmp_path):
    with watch.Trace(tmp_path, 0, 0) as trace:
        for n in range(1, 4):
            trace.before(n)
            trace.after(n, jax.numpy.zeros(()))
    assert not (tmp_path / watch.FOLDER).exists()


def test_a_run_that_stands_still_ends_and_says_where():
    code = (
        "import time; from jaxvid.train import watch\n"
        "def stuck(): time.sleep(60)\n"
        "with watch.Watchdog(0.5 / 60) as dog:\n"
        "    dog.rest(); time.sleep(1); dog.heard(); stuck()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="profile is"):
        watch.Trace(tmp_path, 3, 2)
    with pytest.raises(ValueError, match="stall_minutes is -1"):
        watch.Watchdog(-1.0)


def test_memory_is_told_where_it_is_known(monkeypatch):
    assert watch.memory() == {}  # a CPU does not say

    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30}

    monkeypatch.setattr(watch.jax, "local_devices", lambda: [Device()])
    assert watch.memory() == {"perf/memory_peak_gib": 3.0}


def test_memory_of_the_host_is_told():
    before = watch.host_memory()["perf/host_peak_gib"]
    ballast = bytearray(512 * 2**20)
    ballast[:: 2**12] = b"1" * len(ballast[:: 2**12])  # touched, so resident
    assert before > 0.05 and watch.host_memory()["perf/host_peak_gib"] > 0.5

"""Watching a run: traces on demand, and an end to runs that stand still."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import pytest
from toy import SETTINGS, Stream, train

from jaxvid import chips
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


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H1000", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_the_share_of_a_peak(monkeypatch, kind, tera):
    """Of 8 devices, each makes an eighth of the work."""

    class Device:
        device_kind = kind

    monkeypatch.setattr(watch.jax, "devices", lambda: [Device()] * 8)
    told = watch.speed(8 * 40e12, 2.0)
    assert told.pop("perf/tflops") == pytest.approx(20)
    assert told == ({} if tera is None else {"perf/mfu": pytest.approx(20 / tera)})
    assert chips.peak(kind) == (tera and pytest.approx(1e12 * tera))


def test_a_line_says_what_a_person_watches():
    values = {"loss": 1.25, "grad_norm": 0.5, "learning_rate": 1e-5, "perf/throughput": 12345.6}
    values |= {"step_time": 2.5, "perf/tflops": 80.0, "perf/mfu": 0.4061, "perf/input_wait": 0.02}
    assert metrics.line(20, 1500, values, 3.0) == (
        "step   20/1500  loss 1.2500  |g| 0.500  lr 1.00e-05  12,346 tokens/s  MFU 40.6%  input 2%"
        "  2.5 s/step  1:14:00 left"
    )
    more = {"reward": 0.5, "rewards/accuracies": 0.75, "skipped_total": 2.0, "loss": float("nan")}
    few = values | more | {"perf/memory_peak_gib": 12.34}
    del few["perf/mfu"]
    assert metrics.line(1500, 1500, few, 2.5) == (
        "step 1500/1500  loss nan  reward 0.500  accuracy 0.75  |g| 0.500  lr 1.00e-05  12,346 "
        "tokens/s  80 TFLOP/s  input 2%  12.3 GiB  2.5 s/step  2 skipped  0:00:00 left"
    )


def test_a_log_that_is_no_terminal_has_lines(tmp_path, capsys):
    evaluate = lambda state: {"eval_loss": 0.5}
    train(tmp_path, Stream(), dataclasses.replace(SETTINGS, eval_every=3), evaluate=evaluate)
    told = capsys.readouterr()
    steps = [line for line in told.out.splitlines() if line.startswith("step ")]
    assert len(steps) == 8 and steps[0].startswith("step 1/6  loss ") and "0:00:00 left" in steps[6]
    assert [steps[3], steps[7]] == ["step 3: eval_loss 0.5000", "step 6: eval_loss 0.5000"]
    assert "\r" not in told.out and told.err == ""
    timed = {name for line in metrics.read(tmp_path) for name in line if name.startswith("time/")}
    assert timed == {"time/checkpoint", "time/validation"}

"""Runs of several processes: what one process of eight devices does, two of four do as well."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pairs
import pytest
import safetensors.numpy

from jaxvid import hosts, sharding
from jaxvid.data import pipeline, records
from jaxvid.data.records import Example, Response
from jaxvid.models import hf

TESTS = pathlib.Path(__file__).parent
PATIENCE = 600  # seconds that a crew may take
VARY = ("step_time", "perf/", "time/")  # what no two runs have in common


def record(i: int) -> records.Record:
    """A pair with answers, preferences and policy questions."""
    plain = pairs.record(i, split="train")
    more = []
    for side, (good, bad) in enumerate((("A", "B"), ("B", "A"))):
        named = dict(zip("ABCD", pairs.REPLIES))
        more.append(
            Example(f"sft {side}", "sft", side, pairs.ASKED, responses=(Response(named[good]),))
        )
        both = (Response(named[good], "chosen"), Response(named[bad], "rejected", "temporal"))
        more.append(Example(f"dpo {side}", "preference", side, pairs.ASKED, responses=both))
    examples = plain.examples + tuple(more)
    return records.Record(plain.id, "train", plain.media, examples, plain.meta, licence="CC0-1.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts")
    pairs.write(path, [record(i) for i in range(6)], split="train")
    cfg = pairs.config(path)
    hf.save(path / "ready", cfg, hf.initialise(cfg, 0).params, like=path / "model", dtype="float32")
    return path


def start(folder, out, processes, *kinds):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    command = [sys.executable, str(TESTS / "crew.py"), str(folder), str(out), str(port)]
    return [
        subprocess.Popen(
            [*command, str(i), str(processes), *kinds],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_numbers(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        names = [n for n in x if not n.startswith(VARY)]
        np.testing.assert_allclose(
            [np.nan if x[n] is None else x[n] for n in names],
            [np.nan if y[n] is None else y[n] for n in names],
            rtol=1e-4,
            atol=1e-5,
        )


def same_runs(folder, one, other, *kinds):
    for kind in kinds:
        if kind in ("eval", "probe"):
            name = "none/predictions.jsonl" if kind == "eval" else "predictions.jsonl"
            found = [lines(out / kind / name) for out in (one, other)]
            assert len(found[0]) > 2
            for x, y in zip(*found, strict=True):
                drawn = [[s.pop("logp", None) for s in p.get("samples", ())] for p in (x, y)]
                assert x == y
                np.testing.assert_allclose(*drawn, atol=1e-4)
            continue
        same_numbers(*(lines(out / kind / "metrics.jsonl") for out in (one, other)))
        first, a, b = (
            safetensors.numpy.load_file(path / "model.safetensors")
            for path in (folder / "ready", one / kind / "model", other / kind / "model")
        )
        assert a.keys() == b.keys() == first.keys()
        # Over all weights: Adam makes a whole step of a gradient that is nothing but rounding.
        size = lambda tensors: np.sqrt(sum((x**2).sum() for x in tensors))
        moved, apart = (size(a[n] - x[n] for n in a) for x in (first, b))
        assert apart <= 1e-3 * moved, (kind, moved, apart)


def ended(crew):
    """What each process said, and how it ended; none may go on for long."""
    said = [p.communicate(timeout=PATIENCE)[0] for p in crew]
    return list(zip((p.returncode for p in crew), said))


def compared(folder, tmp_path, processes, *kinds):
    one, two = tmp_path / "1", tmp_path / str(processes)
    for out, n in ((one, 1), (two, processes)):
        for code, said in ended(start(folder, out, n, *kinds)):
            assert code == 0, said[-3000:]
    same_runs(folder, one, two, *kinds)
    return one, two


def test_two_processes_are_one(folder, tmp_path):
    one, two = compared(folder, tmp_path, 2, "dna")
    tables = [sorted(p.name for p in (out / "dna/rollouts").iterdir()) for out in (one, two)]
    assert tables[0] == tables[1] and len(tables[0]) == 2


@pytest.mark.slow
def test_two_processes_are_one_in_all_else(folder, tmp_path):
    compared(folder, tmp_path, 2, "sft", "dpo", "eval", "probe")


@pytest.mark.slow
def test_four_processes_are_one(folder, tmp_path):
    compared(folder, tmp_path, 4, "sft", "dna", "eval")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_process_ends_the_others(folder, tmp_path, how):
    crew = start(folder, tmp_path, 2, "endless")
    wait_for(tmp_path / "endless/metrics.jsonl", crew)
    crew[1].send_signal(how)
    since = time.monotonic()
    said = crew[0].communicate(timeout=PATIENCE)[0]
    crew[1].kill()
    crew[1].communicate()
    assert crew[0].returncode not in (0, 143)
    assert time.monotonic() - since < 90
    assert "another task died" in said or "Connection closed by peer" in said, said[-2000:]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(folder, tmp_path):
    (code, said), (failed, why) = ended(start(folder, tmp_path, 2, "breaks"))
    assert failed not in (0, 143) and "record 'r' is broken" in why
    assert code not in (0, 143), said[-2000:]


def wait_for(path, crew):
    end = time.monotonic() + PATIENCE
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < end and all(p.poll() is None for p in crew)
        time.sleep(0.5)


def test_where_the_others_are_is_checked():
    for wrong in ("host", "host,0,2", "host:1,2", "host:1,a,2"):
        with pytest.raises(ValueError, match="give auto or HOST:PORT,I,N"):
            hosts.start(wrong)
    with pytest.raises(ValueError, match="processes are 0 to 1"):
        hosts.start("host:1,2,2")


def test_one_process_hands_through():
    assert hosts.gather({"a": [1, 2.5]}) == [{"a": [1, 2.5]}]
    assert hosts.most(3, 1) == [3, 1] and hosts.some(True, False) == [True, False]
    asked = iter([False, False, True])
    hosts.until(lambda: next(asked), every=0.0)
    assert not list(asked)
    x = np.arange(6.0).reshape(3, 2)
    assert hosts.interleave(x) is x
    mesh = sharding.make_mesh(1, 4, 2)
    hosts.check(mesh)
    placed = hosts.place(np.arange(8.0), sharding.row_sharding(mesh, 8))
    np.testing.assert_array_equal(hosts.local(placed), np.arange(8.0))


def test_each_process_asks_of_its_own_records(folder):
    builder = pairs.builder(folder, "train")
    number = lambda found: [(n, q.record.id) for n, q in found]
    for ask in (pipeline.questions, pipeline.probes):
        whole = number(ask(builder.data, builder))
        parts = [number(ask(builder.data, builder, process=i, processes=4)) for i in range(4)]
        assert sorted(x for part in parts for x in part) == whole
        assert [len(part) for part in parts] == [2 * len(whole) // 6] * 2 + [len(whole) // 6] * 2

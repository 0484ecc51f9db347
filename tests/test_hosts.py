"""Runs of several processes: what one process of eight devices does, two of four do as well."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pairs
import pytest
import safetensors.numpy

from jaxvid.data import records
from jaxvid.data.records import Example, Response
from jaxvid.models import hf

TESTS = pathlib.Path(__file__).parent
PATIENCE = 240  # seconds that a crew may take
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
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "XLA_FLAGS": ""}
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


def crew(folder, out, processes, *kinds):
    """Run the kinds in a crew; every process must end well."""
    said = [p.communicate(timeout=PATIENCE)[0] for p in start(folder, out, processes, *kinds)]
    return out, said


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
        for name in a:  # Adam makes a whole step of the sign of a gradient that is nearly zero
            moved, apart = np.linalg.norm(a[name] - first[name]), np.linalg.norm(a[name] - b[name])
            assert apart <= 1e-3 * moved, (kind, name, moved, apart)


KINDS = ("sft", "dpo", "dna", "eval", "probe")


def test_two_processes_are_one(folder, tmp_path):
    one, said = crew(folder, tmp_path / "1", 1, *KINDS)
    two, more = crew(folder, tmp_path / "2", 2, *KINDS)
    for kind in KINDS:
        assert (one / kind).is_dir(), said[0][-2000:]
        assert (two / kind).is_dir(), "\n".join(s[-2000:] for s in more)
    same_runs(folder, one, two, *KINDS)
    tables = [sorted((out / "dna/rollouts").glob("*.parquet")) for out in (one, two)]
    assert len(tables[0]) == len(tables[1]) == 2

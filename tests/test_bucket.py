"""Runs whose work folder is gs://, against a bucket on this machine: Orbax, TensorStore, gcsfs and
Google's own client as they are, in one and in several processes."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import fake_gcs
import jax
import numpy as np
import pairs
import pytest
from test_checkpoint_processes import together
from test_hosts import record
from toy import SETTINGS, Stream, assert_same, train

from jaxvid import files, main
from jaxvid.models import hf
from jaxvid.train import checkpoint, metrics

if importlib.util.find_spec("gcsfs") is None:  # it reads its environment where it is imported
    pytest.skip("no gcsfs", allow_module_level=True)
TESTS = pathlib.Path(__file__).parent
URL = f"gs://{fake_gcs.NAME}/run"
RECIPE = """
import crew

def get_config(runlocal=False):
    return crew.run_of("eval" if runlocal else "sft", {folder!r})
"""


@pytest.fixture(scope="module")
def server():
    """One for all tests: TensorStore looks once where it is."""
    with fake_gcs.Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)  # also of the processes that a test starts
        yield server


@pytest.fixture
def bucket(server):
    server.objects.clear()
    server.refuse = lambda method, path: False
    return server


def paths() -> str:
    return os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


def steps(bucket) -> set[str]:
    return {name.split("/")[1] for name in bucket.names("run/")}


@pytest.mark.slow
def test_two_processes_write_to_a_bucket_and_go_on(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together(2, URL, "save")
    assert steps(bucket) == {"1", "2"}
    for step in (1, 2):
        names = bucket.names(f"run/{step}/")
        assert f"run/{step}/commit_success.txt" in names
        for process in (0, 1):
            assert any(f"/ocdbt.process_{process}/" in name for name in names)
    for said in together(2, URL, "half"):  # what only one of them misses, both pass over
        assert "went on from step 1, {'taken': 1}, passed [2]" in said
    assert steps(bucket) == {"1", "2", "2.damaged"}
    [said] = together(1, URL, "restore")
    assert "went on from step 2, {'taken': 1}, passed []" in said
    assert steps(bucket) == {"2", "2.damaged", "3"}  # of 1 nothing is left
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_tried_before_anything_else(bucket):
    checkpoint.check_bucket(URL)
    with files.at(URL):
        assert not bucket.names()
    bucket.refuse = lambda method, path: path.startswith("/storage/v1/b/bucket?")
    with pytest.raises(ValueError, match="(?s)cannot be written to gs://bucket/run: .*buckets.get"):
        checkpoint.check_bucket(URL)
    for refused in ("POST", "DELETE"):
        bucket.refuse = lambda method, path, refused=refused: method == refused
        with pytest.raises(ValueError, match="cannot be written to gs://bucket/run: .*not yours"):
            checkpoint.check_bucket(URL)
        with pytest.raises(ValueError, match="(?s)gs://bucket/run: .*not yours.*credentials"):
            files.at(URL).__enter__()
    with pytest.raises(ValueError, match="cannot be written to gs://other/run"):
        checkpoint.check_bucket("gs://other/run")
    bucket.refuse = lambda method, path: False
    assert len(bucket.names("run/.jaxvid-")) == 2  # written, and could not be removed
    saver = checkpoint.Checkpoints(URL)
    assert saver.latest() is None
    saver.close()


def test_a_run_in_a_bucket_goes_on_bit_for_bit(bucket, tmp_path):
    """Stopped after four updates, and gone on with by a machine that has nothing."""
    straight = train(tmp_path / "here", Stream())
    there = files.checkpoints(URL)
    for steps in (4, 6):
        with files.at(URL) as folder:
            settings = dataclasses.replace(SETTINGS, steps=steps, checkpoints=there)
            result = train(folder, Stream(), settings)
            assert not (folder / "checkpoints").exists()
    assert_same(*(jax.tree.map(np.array, x.state) for x in (straight, result)))
    found = [json.loads(x) for x in bucket.read("run/metrics.jsonl").decode().splitlines()]
    assert [x["loss"] for x in found] == [x["loss"] for x in metrics.read(tmp_path / "here")]
    written = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
    assert written == {"4", "6"}
    assert all(bucket.names(f"run/checkpoints/{n}/commit_success.txt") for n in written)


def test_half_a_checkpoint_in_a_bucket_does_not_count(bucket):
    there = files.checkpoints(URL)
    with files.at(URL) as folder:
        train(folder, Stream(), dataclasses.replace(SETTINGS, steps=4, checkpoints=there))
    del bucket.objects["run/checkpoints/4/commit_success.txt"]
    for tidy in (False, True):
        assert bucket.names("run/checkpoints/4/")
        saver = checkpoint.Checkpoints(there, tidy=tidy)
        assert saver.latest() == 2
        saver.close()
    assert not bucket.names("run/checkpoints/4/")


def test_what_is_not_jaxvid_s_is_left_alone(bucket):
    """Orbax would remove it, since it does not say that it is a whole checkpoint."""
    bucket.put("run/checkpoints/epoch-3/model.bin", b"years of work")
    with pytest.raises(ValueError, match="checkpoints holds what is not jaxvid's: epoch-3"):
        checkpoint.Checkpoints(files.checkpoints(URL))
    assert bucket.names() == ["run/checkpoints/epoch-3/model.bin"]


def test_a_folder_made_by_hand_is_taken(bucket):
    """It is an empty object whose name ends with a slash."""
    for name in ("run/", "run/checkpoints/"):
        bucket.put(name, b"")
    with files.at(URL) as folder:
        assert not list(folder.iterdir())
        saver = checkpoint.Checkpoints(files.checkpoints(URL))
        assert saver.latest() is None
        saver.close()


@pytest.fixture
def recipe(tmp_path):
    pairs.write(tmp_path, [record(i) for i in range(6)], split="train")
    cfg = pairs.config(tmp_path)
    params = hf.initialise(cfg, 0).params
    hf.save(tmp_path / "ready", cfg, params, like=tmp_path / "model", dtype="float32")
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(folder=str(tmp_path)))
    (tmp_path / "tmp").mkdir()
    return path


def crew(recipe: pathlib.Path, verb: str, workdir: str, *flags: str) -> list[tuple[int, str]]:
    """How two processes of the command line end, and what they say."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": paths(), "TMPDIR": str(recipe.parent / "tmp")}
    env |= {"JAX_NUM_CPU_DEVICES": "4"}
    config = f"{recipe}:runlocal" if verb == "eval" else str(recipe)
    command = [sys.executable, "-m", "jaxvid.main", verb, config, "--workdir", workdir, *flags]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    running = [
        subprocess.Popen([*command, "--distributed", f"localhost:{port},{i},2"], **pipe)
        for i in (0, 1)
    ]
    said = [p.communicate(timeout=300)[0] for p in running]
    return [(p.returncode, text) for p, text in zip(running, said)]


@pytest.mark.slow
def test_a_run_of_two_processes_in_a_bucket(bucket, recipe):
    """As in a folder that both share; and what cannot be copied at the end ends only the process
    that copies it, from which the same command goes on."""
    each = ["--checkpoint-every", "1", "--optimizer.schedule", "constant"]
    short = ["--steps", "2", "--profile", "1", "1", *each]
    bucket.refuse = lambda method, path: method == "POST" and "run/model/" in path
    (first, said), (second, also) = crew(recipe, "train", URL, *short)
    assert first == 1 and "not everything was copied to gs://bucket/run" in said, said[-3000:]
    assert second == 0, also[-3000:]
    [left] = (recipe.parent / "tmp").glob("jaxvid-*")
    assert (left / "model" / "model.safetensors").is_file()
    assert not bucket.names("run/model")
    bucket.refuse = lambda method, path: False
    long = ["--steps", "3", *each]
    local = recipe.parent / "local"
    for where in (URL, str(local)):
        for code, said in crew(recipe, "train", where, *long):
            assert code == 0, said[-3000:]
    found = [json.loads(x) for x in bucket.read("run/metrics.jsonl").decode().splitlines()]
    for a, b in zip(found, metrics.read(local), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])
    for path in (local / "model").iterdir():
        assert bucket.read(f"run/model/{path.name}") == path.read_bytes(), path.name
    folders = {name.split("/")[1] for name in bucket.names("run/")}
    kept = {"checkpoints", "model", "profile", "tensorboard", "config.json", "metrics.jsonl"}
    assert folders == kept
    written = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
    assert {"2", "3"} <= written and "1" not in written
    assert list((recipe.parent / "tmp").glob("jaxvid-*")) == [left]
    assert main.main(["export", URL, str(recipe.parent / "out")]) == 0
    weights = (recipe.parent / "out" / "model.safetensors").read_bytes()
    assert weights == bucket.read("run/model/model.safetensors")


@pytest.mark.slow
def test_an_evaluation_of_two_processes_in_a_bucket(bucket, recipe):
    for code, said in crew(recipe, "eval", URL):
        assert code == 0, said[-3000:]
    assert bucket.names() == [
        "run/config.json",
        "run/none/predictions.jsonl",
        "run/none/results.json",
    ]

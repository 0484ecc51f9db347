"""Weights & Biases, played by a module that writes down what it is asked for."""

import dataclasses
import json
import sys

import jax
import pytest
from toy import SETTINGS, Stream, train

from jaxvid import main
from jaxvid.train import metrics, tracker

STUB = """
asked, broken, refused = [], set(), ""

class errors:
    class UsageError(Exception):
        pass

    class AuthenticationError(Exception):
        pass

def Settings(**given):
    return given

def note(what, **given):
    if what in broken:
        raise RuntimeError(f"no route at {what}")
    asked.append((what, given))

class Run:
    def define_metric(self, name, step_metric):
        note("axis", name=name, step_metric=step_metric)

    def log(self, values):
        note("log", **values)

    def finish(self, exit_code):
        note("finish", exit_code=exit_code)

def init(**given):
    if refused:
        raise errors.UsageError(refused)
    note("init", **given)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def run(folder, stream, settings=SETTINGS, config=None):
    with tracker.opened("videos", "my run", folder, config or {"seed": 3}) as also:
        return train(folder, stream, settings, also=also)


def of(wandb, what):
    return [given for name, given in wandb.asked if name == what]


def test_every_line_is_sent_and_a_resumed_run_goes_on(wandb, tmp_path):
    stopped = dataclasses.replace(SETTINGS, steps=4)
    run(tmp_path / "run", Stream(bad=(3,)), stopped)
    run(tmp_path / "run", Stream(bad=(3,)))
    first, second = of(wandb, "init")
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 3}
    assert first["project"] == "videos" and first["name"] == "my run"
    assert first["dir"] == str(tmp_path / "run") and first["id"].startswith("my-run-")
    assert json.loads((tmp_path / "run/wandb.json").read_text()) == {"id": first["id"]}
    assert of(wandb, "axis") == 2 * [{"name": "*", "step_metric": "step"}]
    assert of(wandb, "finish") == 2 * [{"exit_code": 0}]
    lines = [
        {k: x for k, x in line.items() if x is not None} for line in metrics.read(tmp_path / "run")
    ]
    assert of(wandb, "log") == lines and "loss" not in lines[2]
    run(tmp_path / "other", Stream())
    assert of(wandb, "init")[-1]["id"] != first["id"]


def test_a_run_that_fails_is_said_to(wandb, tmp_path):
    def end(n):
        raise StopIteration

    with pytest.raises(ValueError, match="the data ended"):
        run(tmp_path, Stream(before=end))
    assert of(wandb, "finish") == [{"exit_code": 1}]


@pytest.mark.parametrize("where", ["init", "axis", "log", "finish"])
def test_training_goes_on_without_it(wandb, tmp_path, capsys, where):
    wandb.broken.add(where)
    assert run(tmp_path, Stream()).step == 6
    assert len(metrics.read(tmp_path)) == 6
    said = capsys.readouterr().out
    assert said.count("Weights & Biases: RuntimeError: no route") == 1
    assert "The run goes on without it" in said


def test_a_refusal_ends_the_run_before_it_begins(wandb, tmp_path):
    wandb.refused = "No API key"
    with pytest.raises(ValueError, match="--wandb videos: No API key.*WANDB_MODE=offline"):
        run(tmp_path, Stream())


def test_a_missing_package_is_told_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = ["--wandb", "videos", "--workdir", str(tmp_path / "run")]
    assert main.main(["train", "tiny_sft:runlocal", *flags]) == 1
    assert "pip install 'jaxvid[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_process_logs_and_only_if_asked(wandb, tmp_path, monkeypatch):
    with tracker.opened("", "a", tmp_path, {}) as also:
        assert also is None
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with tracker.opened("videos", "a", tmp_path, {}) as also:
        assert also is None
    assert not wandb.asked and not list(tmp_path.glob("wandb.json"))

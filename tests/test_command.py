"""Recipes, overrides and the command line."""

import dataclasses
import json
import pathlib

import jax
import pytest

from jaxvid import config, main, runs
from jaxvid.train import metrics, optimizers


def test_window_means_leave_out_skipped_steps():
    window = metrics.Window()
    for loss, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        window.add({"loss": loss, "skipped": skipped})
    assert window.take() == {"loss": 2.0, "skipped": 0}
    assert window.take() == {}


RECIPE = '''"""A recipe."""
from jaxvid.config import Data, Muon, SFTRun
from jaxvid.data.layout import Budget

def get_config(runlocal=False):
    budget = Budget(rows=2, tokens=8, scored=4, branches=1, frames=2, patches=4)
    data = Data(shards=("a", "b"), tasks=("sft",), budget=budget)
    return SFTRun(model="m", data=data, optimizer=Muon(lr=1e-3), steps=2 if runlocal else 9)
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def test_overrides_are_typed(recipe):
    flags = ["--optimizer.lr", "0.5", "--data.shards", "c", "--optimizer.schedule", "linear"]
    run = runs.load_config(recipe, flags)
    assert run.optimizer == optimizers.Muon(lr=0.5, schedule="linear")
    assert run.data.shards == ("c",) and run.steps == 9
    assert runs.load_config(recipe + ":runlocal", []).steps == 2
    assert run.loop_settings().steps == 9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.lrr", "0.5"], "--optimizer.lr"),
        (["--stepps", "3"], "--steps"),
        (["--optimizer.lr", "fast"], "could not convert string to float"),
        (["--steps", "2.5"], "--steps"),
    ],
)
def test_wrong_overrides_name_the_remedy(recipe, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["train", recipe, "--workdir", "nowhere", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not pathlib.Path("nowhere").exists()


def test_command_line_errors_are_one_line(recipe, capsys):
    for line, said in (
        (["train", "tiny_sftt", "--workdir", "w"], "no recipe 'tiny_sftt'"),
        (["train", recipe], "no --workdir"),
        (["train", recipe + ":small", "--workdir", "w"], "variants are `:runlocal`"),
        (["inspect", "nowhere"], "config.json"),
        (["validate", "nowhere"], None),
        (["report", "nowhere"], "nowhere"),
    ):
        assert main.main(line) == 1
        err = capsys.readouterr().err
        assert said is None or (said in err and err.count("\n") == 1), err
    for line in (["validate", "a", "--medai"], ["reprot", "a"]):
        with pytest.raises(SystemExit):
            main.main(line)
        assert {"validate": "--media", "reprot": "report"}[line[0]] in capsys.readouterr().err


def test_env(capsys):
    assert main.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out and "8 x cpu" in out


def test_saved_run_reads_back(recipe):
    flags = ["--optimizer.warmup", "3", "--lora.rank", "4", "--rates", "lora.a", "2", "lora.b", "3"]
    run = runs.load_config(recipe, flags)
    assert run.rates == (("lora.a", 2.0), ("lora.b", 3.0)) and run.lora.rank == 4
    text = json.dumps(config.plain(run))
    assert config.read(json.loads(text)) == run
    other = json.loads(json.dumps(config.plain(dataclasses.replace(run, steps=7))))
    assert config.differences(json.loads(text), other) == ["steps: 9 -> 7"]
    with pytest.raises(ValueError, match="unknown settings \\['speed'\\]"):
        config.read(json.loads(text) | {"speed": 1})
    with pytest.raises(FileNotFoundError, match="@checkpoints/nothing"):
        config.resolve(dataclasses.replace(run, model="@checkpoints/nothing"))

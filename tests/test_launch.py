"""The local pipeline: its plan, how it goes on, and all of it in its small version."""

import json
import subprocess
import sys

import pytest

from launch import local as local_module
from launch.local import Local, local
from launch.main import main
from launch.stages import stages


def test_plan_trains_from_the_right_models(tmp_path):
    plan = {s.name: s for s in stages(Local(workdir=tmp_path))}
    model = lambda name: plan[name].commands[0][plan[name].commands[0].index("--model") + 1]
    assert model("sft") == "@checkpoints/tiny_base"
    assert model("dpo") == model("dna") == f"{tmp_path}/sft/model"
    assert list(plan)[0] == "forge" and list(plan)[-1] == "report"
    assert {f"{s}: evaluation" for s in ("base", "sft", "dpo", "dna")} <= set(plan)


def test_footage_joins_the_mixture_of_sft_alone(tmp_path):
    plan = {s.name: s for s in stages(Local(workdir=tmp_path, videos=tmp_path / "mine"))}
    assert "--videos" in plan["footage"].commands[0]
    assert str(tmp_path / "footage") in plan["sft"].commands[0]
    assert str(tmp_path / "footage") not in plan["dna"].commands[0]


def test_done_stages_are_not_run_again_and_a_failed_one_is_named(tmp_path, monkeypatch, capsys):
    ran = []

    class Result:
        returncode = 0

    def run(command, env):
        ran.append(command)
        Result.returncode = 3 if "eval" in command else 0
        return Result

    monkeypatch.setattr(local_module.subprocess, "run", run)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "forged.json").write_text("{}")
    entry = [{"file": "x", "records": 2, "bytes": 10, "sha256": ""}]
    (shards / "manifest.json").write_text(json.dumps({"splits": {"train": entry}}))
    with pytest.raises(SystemExit, match="stage 'base: evaluation' stopped with exit code 3"):
        local(Local(workdir=tmp_path))
    assert len(ran) == 1 and "eval" in ran[0]
    assert "done before" in capsys.readouterr().out


def test_a_work_folder_belongs_to_one_set_of_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "stages", lambda args: [])
    local(Local(workdir=tmp_path))
    with pytest.raises(SystemExit, match="--fast was False, is True"):
        local(Local(workdir=tmp_path, fast=True))


def test_help_and_unknown_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["local", "--help"])
    assert stop.value.code == 0 and "--videos" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["local", "--fsat"])
    assert stop.value.code != 0


@pytest.mark.skipif(sys.platform == "win32", reason="the shards use file locks of POSIX")
def test_local_fast_end_to_end(tmp_path):
    """All stages on the shipped checkpoint, as a user would: from forge to the report."""
    command = [sys.executable, "-m", "launch.main", "local", "--fast", "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (tmp_path / "report.html").read_text()
    assert "the report is" in done.stdout and str(tmp_path / "report.html") in done.stdout
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    for stage in ("base", "sft", "dpo", "dna"):
        for control in ("none", "blank", "shuffled"):
            assert (tmp_path / stage / "eval" / control / "results.json").exists()
    results = lambda c: json.loads((tmp_path / "base/eval" / c / "results.json").read_text())
    base, blind = results("none")["overall"], results("blank")["overall"]
    # The shipped base sees, and says what is likely: 80 % and 4 % of 300 pairs.
    assert base["real"]["value"] >= 0.5 and base["counterfactual"]["value"] <= 0.25
    assert base["unparsed"] == blind["unparsed"] == blind["both"]["value"] == 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("done before") == 9

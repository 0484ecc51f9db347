"""The recipes of paper size: each trains two real steps of a tiny twin, and says what it must."""

import ast
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from jaxvid import config, runs, sharding
from launch.ahead import chips, published
from launch.preflight import named

ROOT = pathlib.Path(__file__).parent.parent
PAPER = named()
TWINS = ("llava_next_video", "llava_onevision", "qwen3_vl", "video_salmonn_o1")
# Whose twins are those of another recipe, setting by setting.
SAME = {
    "dna_32b_sft": "dna_7b_sft",
    "dna_72b_sft": "dna_7b_sft",
    "dna_32b_rl": "dna_7b_rl",
    "dna_72b_rl": "dna_7b_rl",
}
QUICK = ("dna_7b_sft", "dna_7b_rl", "pasta_7b")  # the others have more to forge, and other twins
SLOW = [name for name in PAPER if name not in (*SAME, *QUICK)]
MAKE = """
import json, sys
from data_gen import build
from jaxvid import main
few = ("--train", "{n}", "--validation", "0", "--test", "0", "--workers", "0")
recipes, twins = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sizes = [x.replace("{n}", "4") for x in few]
build.main(["procedural", "--out", "runs/world", *sizes])
if "pasta_7b" in recipes:
    build.main(["pasta", "--shards", "runs/world", "--out", "runs/pasta"])
if "utr_7b" in recipes:
    build.main(["utr", "--shards", "runs/world", "--out", "runs/utr/shards", "--scale", "9"])
if "pdpo_7b" in recipes:
    made = ["--workdir", "runs/step_pairs", "--compute.unroll", "1"]
    assert main.main(["steps", "tiny_steps:runlocal", *made]) == 0
if {"thud_sft", "thud_dpo"} & set(recipes):
    two = [x.replace("{n}", "2") for x in few]
    for show in ("intervened", "general"):
        out = ["--out", f"runs/sound/{show}", "--mix.show", show]
        build.main(["sound", *out, *two])
for family in twins:
    assert main.main(["tiny", family, f"runs/twins/{family}", "--like", sys.argv[3]]) == 0
for name in recipes:
    print("RESULT", name, main.main(["train", f"{name}:runlocal", "--workdir", f"out/{name}"]))
"""


def loaded(name, variant=""):
    return runs.load_config(name + variant, [])


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_paper_size_says_what_it_must(name):
    """Run, Test and Expect, with no figure of ours; its slice and its model; warm-up of 3 %."""
    doc = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
    for line in ("Run:     jaxvid train configs/", "Test:    jaxvid train configs/", "Expect:"):
        assert line in doc
    assert f"configs/{name}.py --workdir runs/{name}" in doc
    assert f"configs/{name}.py:runlocal" in doc and "not run here" in doc
    told = vars(runs.recipe(name))
    topology = chips.read(told["TOPOLOGY"], told.get("SLICES", 1))
    assert topology.chip and told["BASE"] in published.CONFIGS
    if "slices" in doc.lower() or topology.slices > 1:
        assert f"Fits {topology.slices} slices of {told['TOPOLOGY']}" in " ".join(doc.split())
    run = loaded(name)
    steps = run.steps * run.updates_per_step()
    assert run.optimizer.warmup == pytest.approx(0.03 * steps, abs=0.015 * steps + 1)
    assert run.compute.dtype == "bfloat16" and run.data.microbatches
    asked = {axis: vars(run)[axis] for axis in sharding.AXES}
    sizes = chips.sizes(topology, asked)
    assert run.data.budget.rows % (sizes["replica"] * sizes["fsdp"]) == 0


@pytest.mark.parametrize("name", PAPER)
def test_a_twin_keeps_what_the_recipe_is_about(name):
    run, twin = loaded(name), runs.recipe(name).get_config(runlocal=True)
    assert twin.steps == 2 and type(twin) is type(run)
    kept = ["objective", "lora", "freeze", "frozen_dtype", "rates"]
    kept += ["advantages", "reward"] if isinstance(run, config.PolicyRun) else []
    for field in kept:
        assert vars(twin)[field] == vars(run)[field], field
    assert type(twin.optimizer) is type(run.optimizer) and twin.optimizer.lr == run.optimizer.lr
    assert twin.data.tasks[0] == run.data.tasks[0] and twin.data.sound == run.data.sound


@pytest.mark.parametrize("name", SAME)
def test_larger_models_have_the_same_twin(name):
    twin = lambda of: runs.recipe(of).get_config(runlocal=True)
    assert twin(name) == twin(SAME[name])


def test_settings_are_the_papers():
    """What the papers fix."""
    assert (loaded("dna_7b_rl").steps, loaded("dna_32b_rl").steps) == (600, 60)
    assert loaded("dna_72b_rl").steps == 20
    for name in (n for n in PAPER if n.startswith("dna_")):
        run = loaded(name)
        assert run.optimizer.lr == 1e-6
        if name.endswith("_rl"):
            assert (run.rollout.group, 2 * run.data.pairs) == (16, 64)
            assert (run.objective.clip_low, run.objective.clip_high) == (0.2, 0.28)
            assert run.objective.kl_coef == 0 and run.rollout.sampling.temperature == 1
    assert loaded("pasta_7b").data.sampling.frames == 32
    assert loaded("pasta_7b").data.pairs * 220 * 3 == pytest.approx(3 * 7020, rel=0.01)
    thud = loaded("thud_dpo")
    assert (thud.lora.rank, thud.lora.alpha, thud.lora.dropout) == (32, 64.0, 0.05)
    assert (thud.optimizer.lr, thud.data.pairs, thud.objective.beta) == (1e-6, 64, 0.1)
    assert (loaded("thud_sft").optimizer.lr, 4 * loaded("thud_sft").data.pairs) == (2e-6, 32)
    pdpo = loaded("pdpo_7b")
    assert (pdpo.lora.rank, pdpo.lora.alpha, pdpo.data.sampling.frames) == (64, 256.0, 60)
    utr = loaded("utr_7b")
    assert (utr.optimizer.lr, utr.data.pairs, utr.data.sampling.frames) == (1e-5, 512, 32)
    assert dict(utr.rates)["tower"] * utr.optimizer.lr == pytest.approx(2e-6)


def train(names, folder):
    """All of them in one process on one device, so that what they share is compiled once."""
    twins = [family for family in TWINS if any(family in loaded_model(n) for n in names)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    like = str(ROOT / "configs/checkpoints/tiny_base")
    command = [sys.executable, "-c", MAKE, json.dumps(names), json.dumps(twins), like]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    (folder / "log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def loaded_model(name):
    return runs.recipe(name).get_config(runlocal=True).model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(list(QUICK), tmp_path_factory.mktemp("recipes"))


def check(folder, name):
    log = (folder / "log").read_text()
    assert f"RESULT {name} 0" in log, log[-3000:]
    rows = [json.loads(x) for x in (folder / f"out/{name}/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["loss"]) and row["skipped_total"] == 0
        assert row["grad_norm"] > 0
        assert row["perf/tflops"] > 0 and "perf/mfu" not in row  # of a CPU no peak is known
    assert (folder / f"out/{name}/model/config.json").is_file()


@pytest.mark.parametrize("name", QUICK)
def test_two_steps_of_a_twin(name, trained):
    check(trained, name)


@pytest.mark.slow
def test_two_steps_of_the_other_twins(tmp_path):
    train(SLOW, tmp_path)
    for name in SLOW:
        check(tmp_path, name)

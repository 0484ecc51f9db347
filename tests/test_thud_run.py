"""The recipes with sound, two steps each: from the base that sees to a model that hears, by SFT and
DPO, to the probes."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_gen import build
from jaxvid import main
from jaxvid.data import chat
from jaxvid.models import hf

BASE = "configs/checkpoints/tiny_base"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards of interventions, of general questions, a model that hears)"""
    folder = tmp_path_factory.mktemp("thud")
    few = ("--train", "2", "--validation", "0", "--test", "2", "--workers", "0")
    for show in ("intervened", "general"):
        build.main(["sound", "--out", str(folder / show), "--mix.show", show, *few])
    twin = ["tiny", "qwen2_5_omni_thinker", str(folder / "model"), "--like", BASE]
    assert main.main(twin) == 0
    return folder


def command(verb, recipe, made, out, *flags):
    given = [f"configs/{recipe}.py:runlocal", "--workdir", str(out), *flags]
    rolled = ("--data.cache", str(made / "cache"), "--compute.unroll", "1")  # quicker to compile
    return [verb, *given, *rolled]


def test_a_twin_like_another_model_has_its_weights_and_its_words(made):
    old, new = hf.load(BASE), hf.load(made / "model")
    words = [
        chat.Chat(folder, c.cfg.prompting.markers)
        for folder, c in ((BASE, old), (made / "model", new))
    ]
    text = "Where is the glass? 1.2"
    assert list(words[0].encode(text)) == list(words[1].encode(text))
    table = [np.asarray(m.params["decoder"]["table"][...]) for m in (old, new)]
    np.testing.assert_array_equal(table[0], table[1][: len(table[0])])
    for part in ("tower", "decoder"):
        norm = [np.asarray(m.params[part]["blocks"]["mlp"]["gate"]["w"][...]) for m in (old, new)]
        np.testing.assert_array_equal(*norm)
    assert np.asarray(new.params["ears"]["out"]["w"][...]).std() > 0
    assert main.main(["tiny", "qwen2_5_vl", "x", "--like", BASE, "--tokenizer", BASE]) == 1


def test_warm_up_preferences_and_probes_run(made, tmp_path):
    shards = [str(made / "intervened"), str(made / "general")]
    at = lambda *parts: ("--model", str(pathlib.Path(*parts)))
    sft, dpo, probe = (tmp_path / name for name in ("sft", "dpo", "probe"))
    data = ("--data.shards", *shards)
    commands = [
        command("train", "tiny_thud_sft", made, sft, *at(made, "model"), *data[:2]),
        command("train", "tiny_thud", made, dpo, *at(sft, "model"), *data),
        command("eval", "tiny_thud_eval", made, probe, *at(dpo, "model"), *data),
        ["train", "configs/tiny_thud_eval.py:runlocal", "--workdir", "x", *at(dpo, "model")],
    ]
    code = "from jaxvid.main import main; import sys; "
    code += f"sys.exit([main(c) for c in {commands}] != [0, 0, 0, 1])"
    # In a process of one device: what takes its time here is to compile.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(x) for x in (dpo / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and np.isfinite(lines[-1]["loss"])
    found = json.loads((probe / "results.json").read_text())
    assert found["overall"]["n"] == 16
    assert set(found["kinds"]) == {"shift", "mute", "swap", "offset"}
    assert "three classes" in json.loads((probe / "sound.json").read_text())

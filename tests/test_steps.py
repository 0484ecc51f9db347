"""Step pairs: cutting, choosing, perturbing, weighing by script, and a run that is killed."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pairs
import pytest
import toy
from flax import nnx

from data_gen import build
from jaxvid import main, rewards, stepping
from jaxvid.config import StepsRun
from jaxvid.data import layout, records, shards
from jaxvid.data.records import Response
from jaxvid.models import hf
from jaxvid.ops.logprob import kl_ref
from jaxvid.rollout import contrast, sampler, steps
from jaxvid.rollout.sampler import Sampling
from jaxvid.rollout.steps import Reply, Settings
from jaxvid.train import metrics

SETTINGS = Settings(
    separator="!",
    paths=3,
    top=2,
    alternatives=4,
    rollouts=4,
    path_pairs=2,
    sampling=Sampling(max_tokens=24),
    rows=8,
    records=2,
)


# Text and arrays ----------------------------------------------------------------------------------


def test_replies_are_cut_at_the_separator():
    assert steps.split("a.<s>b.<s>C", "<s>") == (["a.<s>", "b.<s>"], "C")
    assert steps.split("a<s>", "<s>") == (["a<s>"], "") and steps.split("a", "<s>") == ([], "a")
    assert steps.cut("a.<s>b<s>", "<s>") == ("a.<s>", True) and steps.cut("a", "<s>") == (
        "a",
        False,
    )


def test_the_steps_of_largest_divergence_are_taken_in_order():
    assert contrast.select([0.1, 0.5, 0.2, 0.5], 3) == [1, 2, 3]
    assert contrast.select([0.1, 0.1, 0.1], 2) == [0, 1] and contrast.select([], 3) == []


def test_the_noise_is_the_papers():
    np.testing.assert_allclose(contrast.noise_scales(100), (0.9983, 0.0584), atol=5e-5)
    white = np.full((64, 32, 32, 3), 255, np.uint8)
    grey = np.full((64, 32, 32, 3), 100, np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    hook = contrast.Noised(100, mean, std, seed=3)
    out = hook(grey, "a").astype(float) / 255
    a, b = contrast.noise_scales(100)
    for c in range(3):
        x = (out[..., c] - mean[c]) / std[c]
        assert x.mean() == pytest.approx(a * (100 / 255 - mean[c]) / std[c], abs=2e-3)
        rounding = 1 / (255 * std[c]) / np.sqrt(12)
        assert x.std() == pytest.approx(np.hypot(b, rounding), rel=0.01)
    assert hook(white, "a").max() == 255
    np.testing.assert_array_equal(hook(grey, "a"), hook(grey, "a"))
    assert (hook(grey, "a") != hook(grey, "b")).mean() > 0.5
    assert (hook(grey, "a") != dataclasses.replace(hook, seed=4)(grey, "a")).mean() > 0.5


def test_a_prompt_is_extended_as_a_branch_would():
    tree = toy.tree(1)._replace(branches=())
    said, more = np.array([9, 10, 11]), np.array([12])
    branches = (layout.Branch(np.concatenate([said, more]), np.ones(4, bool)),)
    (whole,) = layout.pack([[tree._replace(branches=branches)]], toy.BUDGET)
    after = layout.extend(tree, said)
    assert layout.next_position(after) == layout.next_position(tree) + 3
    (longer,) = layout.pack(
        [[after._replace(branches=(layout.Branch(more, np.ones(1, bool)),))]], toy.BUDGET
    )
    for name in ("tokens", "positions", "depth", "media"):
        for x, y in zip(getattr(whole.tokens, name), getattr(longer.tokens, name)):
            np.testing.assert_array_equal(x, y)
    assert longer.tokens.sources[0, 0] == whole.tokens.sources[0, 3]


def test_rows_hold_one_tree_each():
    trees = [toy.tree(i) for i in range(2)]
    budget = dataclasses.replace(toy.BUDGET, rows=3)
    found = layout.rows(trees, budget)
    for i, tree in enumerate(trees):
        (alone,) = layout.pack([[tree]], toy.BUDGET)
        for x, y in zip((found.tokens, found.vision), (alone.tokens, alone.vision)):
            for a, b in zip(x, y):
                np.testing.assert_array_equal(a[i], b[0])
    assert not found.tokens.end[2].any()
    with pytest.raises(ValueError, match="2 prompts for 1 rows"):
        layout.rows(trees, toy.BUDGET)


def test_divergences_are_the_definition():
    """Of each tree alone, with the whole vocabulary in memory; 0 where the clips are the same."""
    model = toy.Toy(rngs=nnx.Rngs(0))
    clean = []
    for i in range(3):
        n = 2 + i  # of different lengths
        tokens = np.random.default_rng(i).integers(8, 64, n)
        clean.append(toy.tree(i)._replace(branches=(layout.Branch(tokens, np.ones(n, bool)),)))
    dark = lambda t: t._replace(clips=tuple(c._replace(patches=c.patches // 9) for c in t.clips))
    noised = [dark(clean[0]), dark(clean[1]), clean[2]]
    found = contrast.divergences(model, clean, noised, rows=2)
    budget = dataclasses.replace(toy.BUDGET, rows=3)
    batches = [layout.rows(t, budget) for t in (clean, noised)]
    hidden = [
        jnp.take_along_axis(model.hidden(*b[:3]), jnp.asarray(b.tokens.sources)[..., None], axis=1)
        for b in batches
    ]
    want = kl_ref(*hidden, model.unembedding())
    assert [len(d) for d in found] == [2, 3, 4]
    for i, d in enumerate(found):
        np.testing.assert_allclose(d, want[i, : len(d)], atol=1e-5)
    assert found[0].max() > 1e-3 and found[2].max() < 1e-6


# Pairs by script ----------------------------------------------------------------------------------

DONE = " <answer>{}</answer>"
# What is said (of four draws) after what was said before, to any question; the right answer of the
# bright clip is A, of the dark one B.
SCRIPT = {
    "": ["it is dark!so it falls!" + DONE.format("B"), "it glows!so it rises!" + DONE.format("A")]
    + ["it is grey!no" + DONE.format("C"), " white"],
    "it is dark!": ["so it rises!" + DONE.format("A"), "so it falls!x", "hm" + DONE.format("A")],
    "it glows!": ["so it falls!", "so it rises!z", " ! "],
}
SAID = {  # rollouts
    "it is dark!": "BBBA",
    "it glows!": "AAAB",
    "it is grey!": "ABCC",
    "it is dark!so it falls!": "BBBB",
    "it is dark!so it rises!": "AAAB",
    "it glows!so it rises!": "AABC",
    "it glows!so it falls!": "BCCC",
}


class Scripted:
    """In the sampler's place: replies by what stands after the prompt. Greedy ones are the first;
    alternatives of a step are the draws after it."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []

    def __call__(self, model, trees, chat, sampling, *, group, keys, rows, mesh):
        texts = []
        for tree in trees:
            before = chat.decode(tree.prompt).rpartition("assistant\n")[2]
            self.calls.append((before, group))
            if group == SETTINGS.rollouts:
                said = [DONE.format(x) for x in SAID[before]]
            else:
                said = SCRIPT[before] * group
            texts.append([chat.response(t.lstrip(), after=True) for t in said[:group]])
        length = np.array([[len(t) for t in row] for row in texts])
        ids = np.zeros((*length.shape, length.max()), np.int32)
        for i, row in enumerate(texts):
            for g, tokens in enumerate(row):
                ids[i, g, : len(tokens)] = tokens
        return sampler.Rollouts(ids, np.zeros(ids.shape, np.float32), length, length > 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps")
    pairs.write(path, [pairs.record(i) for i in range(3)])
    cfg = pairs.config(path)
    loaded = hf.initialise(cfg, 0)
    hf.save(path / "ready", cfg, loaded.params, like=path / "model", dtype="float32")
    return path


@pytest.fixture
def scripted(monkeypatch):
    script = Scripted()
    monkeypatch.setattr(sampler, "generate_all", script)
    # The later step hangs on the clip most, then the first.
    fake = lambda model, clean, noised, rows, mesh: [
        np.arange(len(t.branches[0].tokens), dtype=np.float32) for t in clean
    ]
    monkeypatch.setattr(contrast, "divergences", fake)
    return script


def made(folder, settings=SETTINGS):
    builder = pairs.builder(folder)
    source = shards.Source(folder / "shards", "test")
    right = lambda record, e, text: f"<answer>{e.answer}<" in text
    hook = contrast.Noised(100, (0.5,) * 3, (0.5,) * 3)
    parts = steps.Parts(None, builder, hook, right, settings, seed=0)
    return steps.make(parts, [source[0]])[0]


def test_step_pairs_by_script(folder, scripted):
    """The dark clip's greedy reply is right, so the bright one's question alone is kept; its first
    wrong path is cut into two steps, whose alternatives get the script's shares."""
    found = made(folder)
    by_name = {e.name: e for e in found.examples}
    assert list(by_name) == [
        "q0 of 0/paths 0",
        "q0 of 0/path 0 step 0",
        "q0 of 0/path 0 step 1",
    ]
    whole = by_name["q0 of 0/paths 0"]
    assert [r.role for r in whole.responses] == ["chosen", "rejected"]
    assert [r.text for r in whole.responses] == [SCRIPT[""][1], SCRIPT[""][0]]
    assert all(r.ends and r.value is None for r in whole.responses) and whole.prefix == ""

    first = by_name["q0 of 0/path 0 step 0"]
    assert first.prefix == "" and (first.task, first.media, first.answer) == ("preference", 0, "A")
    assert first.responses == (
        Response("it glows!", "chosen", value=0.75, ends=False),
        Response("it is dark!", "rejected", value=0.25, ends=False),
        Response("it is grey!", "rejected", value=0.25, ends=False),
    )
    second = by_name["q0 of 0/path 0 step 1"]
    assert second.prefix == "it is dark!"
    finished = Response("hm" + DONE.format("A"), "chosen", value=1.0)  # p of what is over is known
    assert second.responses == (
        finished,
        Response("so it falls!", "rejected", value=0.0, ends=False),
        Response("so it rises!", "rejected", value=0.75, ends=False),
    )
    for e in found.examples:
        records.Record("r", "test", pairs.clips(), (e,), licence="x").check()
    assert set(found.notes) == {"q0 of 0/path 0 step 0", "q0 of 0/path 0 step 1"}
    assert found.notes["q0 of 0/path 0 step 1"]["divergence"] > 0
    assert found.tally["kept"] == 1 and found.tally["step pairs"] == 4
    assert found.tally["left out: greedy reply right"] == 1
    assert found.tally["alternatives left out: drawn before"] == 2
    assert found.tally["rolled out"] == 5 and found.tally["p"] == 0.25 + 0.75 + 0.25 + 0 + 0.75
    groups = Counter(group for _, group in scripted.calls)
    assert groups == {1: 2, 3: 1 + 2, 4: 5}


def test_which_questions_are_kept_and_what_is_tied(folder, scripted):
    """With any path wrong, the dark clip's question is kept too."""
    found = made(folder, dataclasses.replace(SETTINGS, keep="any_wrong", ties=True, top=1))
    assert found.tally["kept"] == 2 and found.tally["paths right"] == 2
    names = [e.name for e in found.examples if e.prefix]
    assert names == ["q0 of 0/path 0 step 1", "q0 of 1/path 1 step 1"]
    tied = found.examples[-1]
    assert [(r.text, r.value) for r in tied.responses] == [
        ("so it rises!", 0.25),
        ("so it falls!", 0.25),
    ]
    assert found.tally["alternatives left out: blank"] == 1


def test_paths_are_compared_if_they_are_finished():
    replies = [Reply("b!C", True, False), Reply("b!C", True, False), Reply("c!C", False, False)]
    replies += [Reply(" d!C", True, False), Reply("e!A", True, True), Reply("A", True, True)]
    assert steps.usable(replies, dataclasses.replace(SETTINGS, stepped=9)) == [0, 1, 4]
    tally = Counter()
    (example,) = steps.path_examples(pairs.record(0).examples[0], replies, SETTINGS, tally)
    assert [r.text for r in example.responses] == ["e!A", "b!C"]
    assert tally["paths left out: cut off, blank or after white space"] == 2


def test_ties_are_dropped_or_kept():
    question = pairs.record(0).examples[0]
    asked = steps._Asked(pairs.record(0), question, None)
    step = steps._Step(asked, 0, 1, "x!", "a!", 0.1, None)
    weighed = [Response("a!", value=0.5), Response("b!", value=0.5), Response("c!", value=0.25)]
    tally = Counter()
    texts = lambda e: [r.text for r in e.responses]
    assert texts(steps.step_example(step, weighed, SETTINGS, tally)) == ["a!", "c!"]
    ties = dataclasses.replace(SETTINGS, ties=True)
    assert texts(steps.step_example(step, weighed, ties, tally)) == ["a!", "b!", "c!"]
    assert steps.step_example(step, weighed[:2], SETTINGS, tally) is None
    assert steps.step_example(step, weighed[:1], SETTINGS, tally) is None
    assert tally["steps left out: alternatives equally good"] == 1
    assert tally["steps left out: no other alternative"] == 1


# A run --------------------------------------------------------------------------------------------


def recipe(folder, **kw):
    settings = dataclasses.replace(SETTINGS, records=1, **kw)
    data = pairs.builder(folder).data
    return StepsRun(model=str(folder / "ready"), data=data, steps=settings)


def content(workdir):
    source = shards.Source(workdir / "shards", "test")
    return repr(source), [source.read(i) for i in range(len(source))]


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(folder, scripted, tmp_path, monkeypatch):
    summary = stepping.run(recipe(folder), tmp_path / "whole")
    assert (summary["records"], summary["questions"], summary["kept"]) == (3, 6, 3)
    assert summary["mean p"] == pytest.approx(0.4) and summary["records written"] == 3
    assert "greedy reply right: 3" in stepping.told(summary)
    record = shards.Source(tmp_path / "whole" / "shards", "test")[0]
    assert record.media == pairs.clips() and record.provenance["source"] == {"tool": "tests"}
    assert record.provenance["settings"]["rollouts"] == 4

    real, calls = steps.make, []

    def stops(parts, found):
        calls.append(found[0].id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(parts, found)

    monkeypatch.setattr(steps, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        stepping.run(recipe(folder), tmp_path / "cut")
    with open(tmp_path / "cut" / "journal.jsonl", "a") as file:
        file.write('{"record": "half a l')
    with pytest.raises(ValueError, match="steps.top: 2 -> 1"):
        stepping.run(recipe(folder, top=1), tmp_path / "cut")
    assert stepping.run(recipe(folder), tmp_path / "cut") == summary
    assert calls == ["pair 0", "pair 1", "pair 1", "pair 2"]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    fewer = stepping.run(recipe(folder, limit=2), tmp_path / "cut")
    assert (fewer["records"], len(content(tmp_path / "cut")[1])) == (2, 2)
    assert stepping.run(recipe(folder), tmp_path / "cut") == summary  # done: nothing is asked
    assert len(calls) == 4


def test_bad_input_is_told_before_a_model_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping.config, "load_model", lambda *a: pytest.fail("model was read"))
    run = recipe(folder)
    wrong = dataclasses.replace(run, data=dataclasses.replace(run.data, tasks=("sft",)))
    with pytest.raises(ValueError, match=r"step pairs are made of \('policy',\)"):
        stepping.run(wrong, tmp_path / "a")
    lost = dataclasses.replace(run, reward=rewards.Function(path="no_such_module:pay"))
    with pytest.raises(ValueError, match="reward.path 'no_such_module:pay'"):
        stepping.run(lost, tmp_path / "a")
    with pytest.raises(ValueError, match="no folder of shards"):
        stepping.run(
            dataclasses.replace(run, data=dataclasses.replace(run.data, shards=("/none",))),
            tmp_path / "b",
        )
    sound = records.Media("s", "audio", b"x", 1.0)
    deaf = dataclasses.replace(pairs.record(0), media=(sound, sound))
    with pytest.raises(ValueError, match="no picture to perturb"):
        steps.check([deaf], lambda record, e, text: False)
    silent = dataclasses.replace(pairs.record(0), examples=())
    with pytest.raises(ValueError, match="no policy question"):
        steps.check([silent], lambda record, e, text: False)


def test_a_run_without_pairs_says_why(folder, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "_failed", lambda parts, asked, tally: [])
    with pytest.raises(ValueError, match="no pair came of"):
        stepping.run(recipe(folder), tmp_path)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(separator=""), "separator is empty"),
        (dict(paths=1, top=0), "paths 1, want at least 2; top 0, want at least 1"),
        (dict(noise=1000), "less than 1000"),
        (dict(sampling=Sampling(temperature=0.0)), "replies must differ"),
    ],
)
def test_settings_say_what_was_wanted(wrong, told):
    with pytest.raises(ValueError, match=told):
        Settings(**wrong)


def test_the_summary_of_nothing():
    summary = stepping.summarise([])
    assert summary["mean p"] is None and "none rolled out" in stepping.told(summary)
    assert json.dumps(summary)


def test_the_recipes_run(tmp_path):
    """Forge, step pairs of the shipped base, and two updates of pDPO on them, on one device."""
    world, found, pdpo = (str(tmp_path / name) for name in ("world", "pairs", "pdpo"))
    sizes = ("--train", "2", "--validation", "0", "--test", "0", "--workers", "0")
    build.main(["procedural", "--out", world, *sizes])
    rolled = ("--compute.unroll", "1")  # quicker to compile
    pairs_of = ["steps", "tiny_steps:runlocal", "--workdir", found, "--data.shards", world, *rolled]
    train = ["train", "tiny_pdpo:runlocal", "--workdir", pdpo, *rolled]
    train += ["--data.shards", f"{found}/shards"]
    code = f"from jaxvid.main import main; raise SystemExit(main({pairs_of}) or main({train}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "step pairs: " in done.stdout
    source = shards.Source(f"{found}/shards", "train")
    assert any(not r.ends for record in source for e in record.examples for r in e.responses)
    rows = metrics.read(tmp_path / "pdpo")
    assert rows and np.isfinite([row["loss"] for row in rows]).all()
    assert (tmp_path / "pdpo" / "model" / "config.json").is_file()


def test_a_recipe_of_another_kind_is_named(tmp_path, capsys):
    assert main.main(["train", "tiny_steps:runlocal", "--workdir", str(tmp_path)]) == 1
    assert "tiny_steps:runlocal is a StepsRun" in capsys.readouterr().err
    assert main.main(["steps", "tiny_pdpo:runlocal", "--workdir", str(tmp_path)]) == 1
    assert "wants a StepsRun" in capsys.readouterr().err

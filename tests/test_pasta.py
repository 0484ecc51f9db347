"""Adversarial preferences and probes of the laptop world."""

import dataclasses
from collections import Counter

import pytest

from data_gen import build, pasta
from data_gen.procedural import make, tell
from data_gen.procedural.scene import Settings
from jaxvid import main
from jaxvid.data import shards
from jaxvid.data.records import Record
from jaxvid.eval import probe
from jaxvid.train import metrics

HOW = pasta.How(seed=0)


@pytest.fixture(scope="module")
def world():
    """Records of the world without its clips: here only the words count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "_encode", lambda *scene: b"a clip")
        return make.chunk(0, "test", 0, 32, Settings(), make.Mix())


@pytest.fixture(scope="module")
def made(world):
    found = list(pasta.records(world, HOW))
    for record in found:
        record.check()
    return found


def said(record: Record, task: str):
    return [e for e in record.examples if e.task == task]


def test_the_chosen_description_is_the_world_s_and_each_rejected_one_lies_on_its_axis(world, made):
    for source, record in zip(world, made, strict=True):
        captions = [e.answer for e in source.examples if e.task == "caption"]
        general = [e for e in said(record, "preference") if e.prompt == pasta.DESCRIBE]
        assert [e.answer for e in general] == captions
        for e in general:
            chosen, *rejected = e.responses
            assert chosen.text == e.answer and chosen.role == "chosen"
            assert [r.axis for r in rejected] == list(pasta.AXES)
            for r in rejected:
                sentences = zip(chosen.text.split(". "), r.text.split(". "), strict=True)
                changed = [i for i, (a, b) in enumerate(sentences) if a != b]
                assert changed == [1 + pasta.AXES.index(r.axis)]


def test_swapped_lies_are_true_as_often_as_false(made):
    """No text tells which side of a preference it is on, but for a few clips left over."""
    for axis in pasta.AXES:
        true, false = Counter(), Counter()
        for record in made:
            for e in said(record, "preference"):
                if e.prompt == pasta.DESCRIBE:
                    at = 1 + pasta.AXES.index(axis)
                    true[e.responses[0].text.split(". ")[at]] += 1
                    false[e.responses[at].text.split(". ")[at]] += 1
        assert sum((true - false).values()) <= 4, axis


def test_questions_have_one_right_option_and_controls(world, made):
    kinds = Counter()
    for source, record in zip(world, made):
        for clip in pasta.clips_of(source):
            for e in (e for e in said(record, "policy") if e.media == clip.side):
                kind, axis = e.name.partition("/")[0].split("-")
                kinds[kind] += 1
                truth, right = clip.true[axis], e.options["ABCD".index(e.answer)]
                assert len(set(e.options)) == 4 and e.prompt.count("\n") == 4
                said_so = pasta.SAID[axis].format(truth) in e.prompt
                if kind == "none":
                    assert right == e.options[-1] == pasta.NONE and truth not in e.options
                elif kind == "listed":
                    assert right == truth and e.options[-1] == pasta.NONE
                elif kind == "premise":
                    assert right == truth and pasta.SO in e.options and not said_so
                else:
                    assert right == pasta.SO and said_so and truth not in e.options
        replies = {(e.media, e.prompt): e.responses[0].text for e in said(record, "choice")}
        assert len(replies) == 12
        for e in said(record, "preference"):
            if e.prompt != pasta.DESCRIBE:
                chosen, rejected = e.responses
                assert chosen.text == replies[e.media, e.prompt] != rejected.text
                assert rejected.text.split("<answer>")[1][0] != e.answer
    assert min(kinds.values()) > 0.4 * max(kinds.values()) and len(kinds) == 4


def test_bent_truths_are_not_true(world):
    """Of every clip of the world, under many draws."""
    for draw in range(3):
        for clip in (c for record in world for c in pasta.clips_of(record)):
            rng = pasta.generator(draw, clip.record)
            for axis, truth in clip.true.items():
                assert pasta.bent(axis, truth, rng) != pasta.SAID[axis].format(truth)
    rng = pasta.generator(0, "bent")
    drawn = {pasta.bent("temporal", "still, then down", rng) for _ in range(20)}
    assert drawn == {"Its path is down, then still.", "Its path is still and down at once."}
    assert {pasta.bent("crossframe", "left to right", rng) for _ in range(20)} == {
        pasta.TWO_SHAPES,
        "The small shape goes from right to left.",
    }
    places = {f"It starts at the {r} {c}." for r in tell.ROWS for c in tell.COLUMNS}
    assert {pasta.bent("spatial", "top left", rng) for _ in range(50)} < places


def test_the_same_words_about_the_other_clip(world):
    how = dataclasses.replace(HOW, across=True, specific=False, adversaries="bend")
    for record in pasta.records(world, how):
        record.check()
        first, second = said(record, "preference")
        assert [r.media for r in first.responses] == [-2, -2, -2, -2, 1]
        assert [r.media for r in second.responses] == [-2, -2, -2, -2, 0]
        assert first.responses[-1].text == first.answer != second.answer


def test_forge_writes_every_split_once_and_takes_the_world_alone(world, tmp_path):
    shards.write(tmp_path / "world", world, split="test")
    forge = ["pasta", "--shards", str(tmp_path / "world"), "--out", str(tmp_path / "pasta")]
    build.main([*forge, "--test", "8"])
    source = shards.Source(str(tmp_path / "pasta"), "test")
    assert len(source) == 8 and source[0].id == f"pasta/{world[0].id}"
    assert source[0].media == world[0].media
    with pytest.raises(SystemExit, match="is there"):
        build.main(forge)
    plain = dataclasses.replace(world[0], meta={})
    with pytest.raises(ValueError, match="has no scene"):
        list(pasta.records([plain], HOW))


def test_the_page_s_commands_end_to_end(tmp_path, quick):
    """Forge, score, train by the small recipe with the scores, ask the probe."""
    at = lambda name: str(tmp_path / name)
    sizes = ("--train", "4", "--validation", "4", "--test", "4")
    build.main(["procedural", "--out", at("world"), "--workers", "0", *sizes])
    build.main(["pasta", "--shards", at("world"), "--out", at("pasta")])
    where = ["--data.shards", at("pasta"), "--validation.shards", at("pasta")]
    where += ["--data.budget.rows", "8", "--validation.budget.rows", "8"]  # eight devices
    assert main.main(["score", "tiny_pasta:runlocal", "--out", at("kept"), *where]) == 0
    run = ["tiny_pasta:runlocal", "--workdir", at("run"), "--sidecar", at("kept"), *where]
    assert main.main(["train", *run]) == 0
    last = metrics.read(tmp_path / "run")[-1]
    assert all(f"eval_rewards/accuracies/{axis}" in last for axis in pasta.AXES)
    ask = ["tiny_pasta_eval:runlocal", "--model", at("run/model"), "--workdir", at("probe")]
    assert main.main(["eval", *ask, "--data.shards", at("pasta"), "--ask.limit", "12"]) == 0
    found = probe.load(tmp_path / "probe")
    assert len(found) == 12 and {p.kind.split("-")[1] for p in found} == set(pasta.AXES)

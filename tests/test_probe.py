"""Probes: questions asked alone on their own clips, graded by a reward, over clips."""

import dataclasses
import json

import numpy as np
import pairs
import pytest

from jaxvid import config, rewards, runs
from jaxvid.data import records
from jaxvid.eval import metrics, probe

REWARD = rewards.Answer()


def record(i, *, wrong=0):
    """Three questions of two kinds on unlike many clips; the last `wrong` want what is not so."""
    asked = [("light/0", 0, "A"), ("light/1", 1, "B"), ("dark/0", 1, "B")]
    asked = [(n, m, "D" if k >= 3 - wrong else a) for k, (n, m, a) in enumerate(asked)]
    examples = tuple(
        records.Example(name, "policy", media, pairs.ASKED, pairs.OPTIONS, answer)
        for name, media, answer in asked
    )
    return dataclasses.replace(pairs.record(i), examples=examples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe")
    pairs.write(path, [record(0), record(1, wrong=1), record(2, wrong=2)])
    return path


def ask(folder, reward=REWARD, out=None, **settings):
    builder = pairs.builder(folder)
    settings = probe.Settings(**{"max_tokens": 16, "rows": 8} | settings)
    return probe.evaluate(pairs.Watcher(builder.chat), builder, settings, reward, out=out)


def test_every_question_is_asked_alone_and_scored_by_kind(folder, tmp_path):
    found = ask(folder, out=tmp_path)
    assert (found.overall.n, found.overall.records, found.overall.unparsed) == (9, 3, 0)
    assert found.overall.accuracy.value == pytest.approx(6 / 9)
    assert found.overall.grade.value == pytest.approx(6 / 9 + 1)  # all are well-formed
    assert list(found.kinds) == ["dark", "light"]
    assert found.kinds["dark"].accuracy.value == pytest.approx(1 / 3)
    assert found.kinds["light"].accuracy.value == pytest.approx(5 / 6)
    first = found.predictions[0]
    assert (first.name, first.kind, first.media, first.read) == ("light/0", "light", 0, "A")
    assert probe.load(tmp_path) == found.predictions
    assert probe.grade(probe.load(tmp_path)) == found
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["kinds"]["dark"]["accuracy"] == found.kinds["dark"].accuracy._asdict()
    assert saved["overall"]["n"] == 9 and saved["settings"]["rows"] == 8


def test_a_cut_reply_is_unparsed_and_wrong(folder):
    found = ask(folder, max_tokens=2)
    assert (found.overall.unparsed, found.overall.accuracy.value) == (1, 0)
    gain = probe.compare(ask(folder).predictions, found.predictions)
    assert list(gain) == ["overall", "dark", "light"]
    assert gain["overall"].value == pytest.approx(6 / 9)
    assert probe.compare(found.predictions, found.predictions)["light"] == (0, 0, 0)


def test_controls_and_limit_do_what_they_say(folder):
    blank = ask(folder, control="blank", limit=4)
    assert (blank.overall.n, blank.overall.accuracy.value) == (4, 0)
    with pytest.raises(ValueError, match="different questions"):
        probe.compare(ask(folder).predictions, blank.predictions)
    with pytest.raises(ValueError, match="rows 0, limit 0"):
        probe.Settings(rows=0)


def test_a_reward_that_is_not_there_is_told_at_once(folder, tmp_path):
    lost = rewards.Function(path="no_such_module:pay")
    run = config.ProbeRun(model="/none", data=pairs.builder(folder).data, reward=lost)
    with pytest.raises(ValueError, match="reward.path 'no_such_module:pay'"):
        runs.probe(run, tmp_path)


def test_a_split_without_questions_is_refused(tmp_path):
    told = records.Example("a", "sft", 0, "What?", responses=(records.Response("That."),))
    pairs.write(tmp_path, [dataclasses.replace(pairs.record(0), examples=(told,))])
    with pytest.raises(ValueError, match="no example of task 'policy'"):
        ask(tmp_path)


@pytest.mark.parametrize(
    "answer, body, want",
    [
        ("yes", "Yes, it is.", "yes"),
        ("-0.8", "0.4 s", "0.4"),
        ("1 - 2 s", "0:01 to 0:03", "(1.0, 3.0)"),
        ("A knock.", "a KNOCK", "a knock"),
        ("-0.8", "early", None),
        ("no", "perhaps", None),
    ],
)
def test_open_replies_are_read_as_the_answer_is(answer, body, want):
    example = records.Example("q", "policy", 0, "?", (), answer)
    assert probe.read(example, f"<answer>{body}</answer>") == want
    assert probe.read(example, body) is None  # a reward reads answer tags alone


def test_intervals_draw_whole_groups():
    """Ten rows that agree within a group say no more than one row of each group."""
    rng = np.random.default_rng(0)
    each = (rng.random((60, 1)) < 0.6).astype(float)
    names = [f"r{i}" for i in range(60)]
    (alone,) = metrics.clustered(each, names)
    (tenfold,) = metrics.clustered(np.repeat(each, 10, axis=0), list(np.repeat(names, 10)))
    assert alone == pytest.approx(tenfold)
    uneven = metrics.clustered(np.array([[1.0], [1.0], [0.0]]), ["a", "a", "b"])[0]
    assert uneven.value == pytest.approx(2 / 3) and (uneven.low, uneven.high) == (0, 1)
    with pytest.raises(ValueError, match="1 rows in 2 groups"):
        metrics.clustered(np.ones((1, 1)), ["a", "b"])

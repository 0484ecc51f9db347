"""Pair metrics by hand, and an evaluation of a model that is known to look at the clip."""

import dataclasses
import json

import numpy as np
import pairs
import pytest

from jaxvid.eval import asking, metrics, run
from jaxvid.eval.run import Settings

CORRECT = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0]], bool)
READ = [("A", "B"), ("A", "A"), ("C", "B"), ("A", "B"), (None, None)]


def test_pair_metrics_by_hand():
    m = metrics.pair_metrics(CORRECT, READ)
    assert (m.pairs, m.real.value, m.counterfactual.value, m.both.value) == (5, 0.6, 0.6, 0.4)
    assert (m.unparsed, m.same) == (0.2, 0.2)
    for interval in (m.real, m.counterfactual, m.both):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_bootstrap_is_seeded_and_has_the_normal_width():
    rng = np.random.default_rng(0)
    values = (rng.random((600, 1)) < 0.6).astype(float)
    (a,), (b,), (c,) = (metrics.bootstrap(values, seed=s) for s in (1, 1, 2))
    assert a == b and a != c
    p = values.mean()
    width = 2 * 1.96 * np.sqrt(p * (1 - p) / 600)
    assert abs((a.high - a.low) / width - 1) < 0.1


def test_categories_add_up():
    names = ["x", "y", "x", "y", "y"]
    found = metrics.by_category(CORRECT, READ, names)
    assert list(found) == ["x", "y"] and [m.pairs for m in found.values()] == [2, 3]
    both = sum(m.pairs * m.both.value for m in found.values()) / 5
    assert both == pytest.approx(metrics.pair_metrics(CORRECT, READ).both.value)


def test_a_paired_difference_is_narrower_than_the_two_alone():
    rng = np.random.default_rng(1)
    before = rng.random((400, 2)) < 0.5
    after = before | (rng.random((400, 2)) < 0.1)
    found = metrics.difference(after, before)
    assert list(found) == ["real", "counterfactual", "both"]
    both = found["both"]
    assert 0 < both.low < both.value < both.high
    assert both.value == pytest.approx(after.all(1).mean() - before.all(1).mean())
    (alone,) = metrics.bootstrap(after.all(1)[:, None].astype(float))
    assert both.high - both.low < alone.high - alone.low
    same = metrics.difference(after, after)["both"]
    assert same == (0, 0, 0)


def test_metrics_refuse_what_does_not_match():
    with pytest.raises(ValueError, match="no pairs"):
        metrics.bootstrap(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="5 graded pairs but 4"):
        metrics.pair_metrics(CORRECT, READ[:4])
    with pytest.raises(ValueError, match="5 pairs after but 4 before"):
        metrics.difference(CORRECT, CORRECT[:4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval")
    pairs.write(path, [pairs.record(i) for i in range(4)] + [pairs.record(4, questions=2)])
    return path


def ask(folder, settings, **kw):
    builder = pairs.builder(folder)
    return run.evaluate(pairs.Watcher(builder.chat), builder, settings, **kw)


def test_a_model_that_looks_answers_both_sides(folder):
    found = ask(folder, Settings(max_tokens=16, rows=8))
    o = found.overall
    assert (o.pairs, o.both.value, o.unparsed, o.same) == (6, 1.0, 0.0, 0.0)
    assert (found.formatted, found.ended) == (1.0, 1.0)
    assert {n: m.pairs for n, m in found.categories.items()} == {"dark": 2, "light": 4}
    first, second = found.predictions[:2]
    assert (first.side, first.read) == ("real", "A")
    assert (second.side, second.read) == ("counterfactual", "B")
    assert first.reply == pairs.REPLIES[0]
    assert [p.question for p in found.predictions[-4:]] == [0, 0, 1, 1]


def test_controls_take_away_what_they_say(folder):
    blank = ask(folder, Settings(control="blank", max_tokens=16, rows=8)).overall
    assert (blank.both.value, blank.real.value, blank.same) == (0.0, 0.0, 1.0)
    hook = asking.Shuffled(3)
    frames = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    once, again = hook(frames, "pair 1"), hook(frames, "pair 1")
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, frames)
    np.testing.assert_array_equal(np.sort(once.ravel()), frames.ravel())
    orders = {hook(frames, f"pair {i}")[:, 0, 0, 0].tobytes() for i in range(20)}
    assert len(orders) > 5
    assert asking.Shuffled(4)(frames, "pair 1").shape == frames.shape


def test_a_cut_reply_is_unparsed_not_dropped(folder):
    found = ask(folder, Settings(max_tokens=2, rows=8))
    assert (found.overall.both.value, found.overall.unparsed, found.ended) == (0.0, 1.0, 0.0)


def test_files_say_everything_and_come_back(folder, tmp_path):
    settings = Settings(max_tokens=16, rows=8, limit=4)
    found = ask(folder, settings, out=tmp_path, about={"model": "m"})
    assert run.load(tmp_path) == found.predictions and found.overall.pairs == 4
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["overall"]["both"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert saved["settings"] == dataclasses.asdict(settings)
    assert saved["data"]["sampling"]["frames"] == 4 and saved["about"] == {"model": "m"}
    assert saved["versions"]["jax"] and not list(tmp_path.glob("*.partial"))
    assert run.grade(run.load(tmp_path)) == found
    assert run.scores(found)["eval_both"] == 1.0


def test_compare_wants_the_same_questions(folder):
    full = ask(folder, Settings(max_tokens=16, rows=8)).predictions
    cut = ask(folder, Settings(max_tokens=2, rows=8)).predictions
    assert run.compare(full, cut)["both"].value == 1.0
    with pytest.raises(ValueError, match="different questions"):
        run.compare(full, cut[:-2])
    with pytest.raises(ValueError, match="not pairs"):
        run.grade(full[1:])


def test_a_record_without_both_sides_is_named(tmp_path):
    pairs.write(tmp_path, [pairs.record(0), pairs.record(1, sides=(0,))])
    with pytest.raises(ValueError, match="'pair 1' asks its question of media"):
        ask(tmp_path, Settings())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="rows 1; want at least 2"):
        Settings(rows=1)

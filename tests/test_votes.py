"""Major@N, best of N and pass@N by hand, and several replies of a model that is known."""

import json

import numpy as np
import pairs
import pytest

from jaxvid.eval import run, votes
from jaxvid.eval.run import Settings
from jaxvid.eval.votes import Sample, choose


def samples(text, right="B", logp=None):
    """One sample a letter; "-" is one that states no answer."""
    logp = logp or [-float(i) for i in range(len(text))]
    return tuple(Sample(c, None if c == "-" else c, c == right, x, 1) for c, x in zip(text, logp))


@pytest.mark.parametrize(
    "drawn, answer, right",
    [
        ("ABB", "B", True),
        ("AAB", "A", False),
        ("---B", "B", True),  # what states nothing does not vote
        ("----", None, False),
        ("ABBA", "A", False),  # tied: A was drawn first
        ("BAAB", "B", True),
        ("-CABAB", "A", False),  # A and B are tied, C has one vote
    ],
)
def test_the_majority_by_hand(drawn, answer, right):
    assert choose(samples(drawn), "major") == (answer, right)


def test_best_and_pass_by_hand():
    drawn = samples("ABA-", logp=[-2.0, -0.5, -0.6, -3.0])
    assert choose(drawn, "best") == ("B", True)
    assert choose(drawn, "pass") == ("B", True)
    assert choose(samples("AB", logp=[-0.5, -0.5]), "best") == ("A", False)
    assert choose(samples("-AC"), "pass") == (None, False)


def test_scores_by_hand():
    """Two pairs: of the first both majorities are right, of the second the real one alone."""
    found = votes.score([samples(t) for t in ("BBA", "ABB", "BB-", "AAB")])
    assert (found["major"].real.value, found["major"].counterfactual.value) == (1.0, 0.5)
    assert found["major"].both.value == 0.5 and found["major"].unparsed == 0
    assert found["best"].both.value == 0.0 and found["best"].real.value == 1.0
    assert found["pass"].both.value == 1.0


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("votes")
    pairs.write(folder, [pairs.record(i) for i in range(3)])
    builder = pairs.builder(folder)
    model = pairs.Watcher(builder.chat)
    return lambda out=None, **kw: run.evaluate(
        model, builder, Settings(max_tokens=16, rows=8, **kw), out=out
    )


def test_samples_are_written_and_read_and_leave_the_greedy_replies_alone(asked, tmp_path):
    plain = asked(tmp_path / "plain")
    voted = asked(tmp_path / "voted", samples=3)
    assert [p._replace(samples=()) for p in voted.predictions] == plain.predictions
    assert (voted.overall, voted.categories) == (plain.overall, plain.categories)
    assert plain.votes == {} and set(voted.votes) == set(votes.CHOICES)
    assert voted.votes["major"].both.value == 1.0  # a sure model samples what it says greedily
    saved = {n: json.loads((tmp_path / n / "results.json").read_text()) for n in ("plain", "voted")}
    assert "votes" not in saved["plain"] and saved["voted"]["settings"]["samples"] == 3
    assert saved["voted"]["votes"]["major"]["both"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "samples" not in (tmp_path / "plain" / "predictions.jsonl").read_text()
    assert run.load(tmp_path / "plain") == plain.predictions
    assert run.load(tmp_path / "voted") == voted.predictions
    first = voted.predictions[0]
    assert len(first.samples) == 3 and first.samples[0].reply == pairs.REPLIES[0]
    assert first.samples[0].logp == pytest.approx(0, abs=1e-4)


def test_choices_are_compared_pair_by_pair(asked):
    predictions = asked(samples=3).predictions
    wrong = [p._replace(samples=samples("-C-", right="")) for p in predictions]
    gain = run.compare(votes.chosen(predictions, "major"), votes.chosen(wrong, "major"))
    assert gain["both"].value == 1.0
    with pytest.raises(ValueError, match="ask.samples above 0"):
        votes.chosen(asked().predictions, "major")


def test_a_question_draws_the_same_in_other_company(asked, monkeypatch):
    """What seeds a question's samples is its name alone."""
    seen = {}

    def generate_all(model, trees, chat, sampling, *, group, keys, rows, mesh):
        for tree, key in zip(trees, np.asarray(votes.jax.random.key_data(keys))):
            seen.setdefault(tree.name, []).append(key.tolist())
        return votes.sampler.Rollouts(
            *(np.zeros((len(trees), group, 4), kind) for kind in (np.int32, np.float32)),
            np.full((len(trees), group), 4),
            np.ones((len(trees), group), bool),
        )

    monkeypatch.setattr(votes.sampler, "generate_all", generate_all)
    for limit in (3, 1):
        asked(samples=2, limit=limit)
    greedy, two, greedy_alone, alone = (seen["pair 0"][i : i + 2] for i in (0, 2, 4, 6))
    assert two == alone and two[0] != two[1]


def test_settings_of_samples_are_checked():
    for wrong in (dict(samples=-1), dict(temperature=0.0), dict(top_p=0.0)):
        with pytest.raises(ValueError, match="samples"):
            Settings(**wrong)

"""The policy loop: who is kept, what the trees carry, and that an update learns and resumes."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pairs
import policies
import pyarrow.parquet as pq
import pytest
from flax import nnx
from policies import GROUP, Run

from jaxvid import rewards
from jaxvid.data import layout, pipeline
from jaxvid.objectives.advantages import Duality
from jaxvid.rollout import sampler
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import groups, loop, metrics, policy, state, table, telling
from jaxvid.train.groups import Settings


def replies(correct, total=None, ended=None, asked=None) -> groups.Replies:
    """Replies of two tokens with the given outcomes [pairs, 2, G]; question i is record i."""
    correct = np.asarray(correct, np.float32)
    total = correct if total is None else np.asarray(total, np.float32)
    n, _, group = shape = correct.shape
    asked = np.ones((n, 2), bool) if asked is None else np.asarray(asked)
    tree = layout.tree("t", np.arange(3), np.tile(np.arange(3), (3, 1)), pairs.VISION)
    questions = []
    for i in range(n):
        sides = [s for s in (0, 1) if asked[i, s]]
        record = pairs.record(i, sides=tuple(sides))
        questions.append(pipeline.Prompts(record, [tree] * len(sides), list(record.examples)))
    return groups.Replies(
        questions,
        np.arange(correct.size * 2, dtype=np.int32).reshape(*shape, 2),
        -np.arange(correct.size * 2, dtype=np.float32).reshape(*shape, 2),
        np.full(shape, 2),
        np.ones(shape, bool) if ended is None else np.asarray(ended, bool),
        [[[""] * group] * 2] * n,
        [[[{}] * group] * 2] * n,
        [[]] * n,
        total,
        np.ones_like(correct),
        correct,
        asked,
    )


def test_who_survives():
    correct = [[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]]
    total = [[[0, 1], [1, 2]], [[0, 0], [1, 2]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]]
    found = replies(correct, total)
    kept = lambda **kw: groups.survivors(found, Settings(**kw)).astype(int).tolist()
    assert kept() == [1, 0, 1, 1]
    assert kept(pair_filter="both") == [0, 0, 1, 0]
    assert kept(pair_filter="none") == [1, 1, 1, 1]
    assert kept(filter_on="reward") == [1, 1, 1, 1]
    assert kept(filter_on="reward", pair_filter="both") == [1, 0, 1, 0]


def test_a_masked_reply_gives_no_signal():
    found = replies([[[0, 1], [1, 1]]], ended=[[[0, 1], [1, 1]]])
    assert groups.survivors(found, Settings()).all()
    assert not groups.survivors(found, Settings(mask_truncated=True)).any()


def test_the_pair_reward_is_paid_to_both():
    """Of replies 0 and 1 to both videos, only the two replies 0 are right on both sides."""
    found, settings = replies([[[1, 1], [1, 0]]]), Settings(pair_reward=0.5, filter_on="reward")
    paid, right = groups.paid(found, settings), found.correct > 0
    assert paid.tolist() == [[[1.5, 1], [1.5, 0]]]
    both = dataclasses.replace(settings, pair_filter="both")
    assert groups.survivors(found, both).all()  # the real group differs by what the pair is paid
    assert not groups.survivors(found, dataclasses.replace(both, pair_reward=0.0)).any()
    assert telling.replies(found, settings)["reward"] == 1.0
    valid = groups.validity(found, settings)
    inside = Duality()(found.total, valid, right, 0.5)
    jax.tree.map(np.testing.assert_array_equal, inside, Duality()(paid, valid))


def test_a_reply_without_a_finite_reward_is_left_out():
    found = replies([[[1, 0], [1, 0]]], total=[[[1, np.nan], [1, 0]]])
    assert groups.validity(found, Settings()).tolist() == [[[True, False], [True, True]]]
    assert groups.survivors(found, Settings(filter_on="reward")).all()
    both = Settings(filter_on="reward", pair_filter="both")
    assert not groups.survivors(found, both).any()


def test_a_side_that_was_not_asked_is_no_dead_group():
    found = replies([[[0, 1], [0, 0]]], asked=[[True, False]])
    assert groups.survivors(found, Settings(pair_filter="both")).all()
    assert groups.validity(found, Settings()).tolist() == [[[True, True], [False, False]]]
    assert "rewards/correct/counterfactual" not in telling.replies(found, Settings())


def test_a_reply_without_a_finite_reward_leaves_group_and_loss():
    found = replies([[[0, 1, 1], [0, 0, 1]]])
    found.total[0, 0, 1] = np.nan
    valid = groups.validity(found, Settings())
    assert valid.tolist() == [[[True, False, True], [True, True, True]]]
    advantage = Duality()(found.total, valid).advantage
    assert np.isfinite(advantage).all() and not advantage[0, 0, 1]
    ((tree, _),) = groups.trees(found, np.asarray(advantage), valid)
    assert [b.weight for b in tree.branches] == [1, 0, 1]
    assert np.isnan(telling.replies(found, Settings())["reward"])


def test_metrics_by_hand():
    found = replies([[[0, 1], [1, 1]], [[0, 0], [0, 1]]], ended=[[[1, 1], [1, 0]]] * 2)
    m = telling.replies(found, Settings())
    assert m["reward"] == m["rewards/correct/mean"] == 0.5
    assert (m["rewards/correct/real"], m["rewards/correct/counterfactual"]) == (0.25, 0.75)
    assert m["pair/both_correct"] == 0.25  # of four matching replies, one has both right
    assert (m["frac_reward_zero_std"], m["completions/clipped_ratio"]) == (0.5, 0.25)
    assert m["reward_std"] == pytest.approx(np.sqrt(0.5) / 2)
    adv = Duality(std="population", eps=0.0)(found.total, groups.validity(found, Settings()))
    d = telling.pairs(jax.device_get(adv), groups.validity(found, Settings()))
    assert (d["pair/S_real"], d["pair/dead_real"]) == (1.0, 0.5)
    assert d["pair/alpha_real"] == 1.0
    assert (d["pair/dead"], d["pair/lonely"]) == (0.5, 1.0)  # one group lives in each pair
    one = groups.validity(replies([[[0, 1], [0, 0]]], asked=[[True, False]]), Settings())
    adv = jax.device_get(Duality()(found.total[:1], one))
    assert telling.pairs(adv, one)["pair/lonely"] == 1.0  # its mate was not asked
    assert telling.pairs(adv, one)["pair/dead"] == 0.0
    assert "pair/S_cf" not in telling.pairs(adv, one)


def test_trees_carry_what_belongs_to_them():
    found = replies(np.zeros((2, 2, 3)), asked=[[True, True], [False, True]])
    advantage = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    valid = groups.validity(found, Settings())
    valid[0, 1, 2] = False
    made = groups.trees(found, advantage, valid)
    assert [len(g) for g in made] == [2, 1]
    for i, group in enumerate(made):
        for tree, side in zip(group, (0, 1) if i == 0 else (1,)):
            for g, b in enumerate(tree.branches):
                assert (b.record, b.pair, b.side, b.branch) == (i, i, side, g)
                assert b.advantage == advantage[i, side, g] and b.scored.all()
                np.testing.assert_array_equal(b.tokens, found.tokens[i, side, g])
                np.testing.assert_array_equal(b.sampled, found.logp[i, side, g])
                assert b.weight == (0.0 if (i, side, g) == (0, 1, 2) else 1.0)


def test_joined_replies_are_in_order():
    a, b = replies([[[0, 1], [1, 1]]]), replies([[[1, 0], [0, 0]], [[1, 1], [1, 1]]])
    both = groups.join([a, b])
    assert len(both.questions) == 3 and both.correct[1, 0].tolist() == [1, 0]
    taken = both.take([2, 0])
    assert taken.correct[:, 0].tolist() == [[1, 1], [0, 1]]
    assert [q.record.id for q in taken.questions] == ["pair 1", "pair 0"]
    assert groups.join([both.take([])]).questions == []


def test_settings_are_checked():
    with pytest.raises(ValueError, match="greedy"):
        Settings(sampling=Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="group = 1, .* at least 2; minibatches = 0"):
        Settings(group=1, minibatches=0)
    with pytest.raises(ValueError, match="overlong.buffer = 300"):
        Settings(overlong=rewards.Overlong(buffer=300))


# With a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    policies.fill(path)
    return path


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder)


def test_the_loop_learns_and_logs(run, tmp_path):
    result = run.train(tmp_path, 12)
    lines = metrics.read(tmp_path)
    first, last = lines[0], lines[-1]
    assert last["reward"] > first["reward"] + 0.3
    assert int(result.state.skipped_total) == 0
    wanted = "reward reward_std frac_reward_zero_std entropy kl grad_norm loss learning_rate"
    wanted += " completions/mean_length completions/clipped_ratio pair/both_correct"
    wanted += " pair/S_real pair/S_cf pair/dead_real"
    wanted += " clip_ratio/low_mean clip_ratio/high_mean rollout/kept time/rollout time/reward"
    wanted += " time/layout time/score time/update perf/rollout_tokens_per_second pair/lonely"
    assert set(wanted.split()) <= set(first)
    for line in lines:
        # Sampler and trainer are one model: they may differ by rounding alone.
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["clip_ratio/region_mean"] == 0  # one step a rollout: the ratio is 1
        spent = sum(line[f"time/{x}"] for x in ("rollout", "reward", "layout", "score", "update"))
        assert spent <= line["step_time"]  # its own


def test_a_resumed_run_goes_on_bit_for_bit(run, tmp_path):
    whole = run.train(tmp_path / "whole", 3, updates=2)
    run.train(tmp_path / "cut", 1, updates=2)
    cut = run.train(tmp_path / "cut", 3, updates=2)
    assert int(whole.state.step) == int(cut.state.step) == 6
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(cut.state.params)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_killed_anywhere_goes_on_bit_for_bit(folder, tmp_path):
    """kill -9 in a rollout, in an update and in the writing of a checkpoint; metrics and weights
    are those of the run that was left alone."""
    script = [sys.executable, str(pathlib.Path(__file__).with_name("killed.py")), str(folder)]
    root = str(pathlib.Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start(workdir, *where):
        done = subprocess.run(
            [*script, str(tmp_path / workdir), *where], env=env, capture_output=True, text=True
        )
        wanted = -signal.SIGKILL if where else 0
        assert done.returncode == wanted, done.stderr[-3000:]

    start("whole")
    for where in (("rollout", "2"), ("update", "3"), ("save", "3"), ()):
        start("cut", *where)
    told = [metrics.read(tmp_path / name) for name in ("whole", "cut")]
    timed = ("time/", "perf/", "step_time")
    plain = lambda line: {k: x for k, x in line.items() if not k.startswith(timed)}
    assert [plain(x) for x in told[0]] == [plain(x) for x in told[1]] and len(told[0]) == 4
    a, b = (np.load(tmp_path / name / "end.npz") for name in ("whole", "cut"))
    assert a.files == b.files and all((a[k] == b[k]).all() for k in a.files)
    rows = [pq.read_table(tmp_path / name / "rollouts").to_pylist() for name in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_nothing_to_learn_from_changes_nothing(run):
    """Every reply right: all pairs are filtered out, refills are tried, the state stays."""
    parts = run.parts()._replace(reward=lambda example, text: rewards.Reward(1.0, 0.0, 1.0))
    before = state.create(loop.frozen(run.start), run.tx)
    with jax.set_mesh(run.mesh):
        after, m = policy.make_update(parts, 0)(before, next(parts.stream))
    assert after is before
    assert (m["rollout/kept"], m["rollout/refills"], m["num_tokens"]) == (0.0, 1.0, 0.0)
    assert np.isnan(m["loss"]) and m["reward"] == 1.0


def test_the_pair_reward_reaches_the_advantages(run):
    taken = []
    spy = lambda *args: taken.append(args) or Duality()(*args)
    parts = run.parts(pair_reward=0.5, pair_filter="none")._replace(advantages=spy)
    start = state.create(loop.frozen(run.start), run.tx)
    with jax.set_mesh(run.mesh):
        _, m = policy.make_update(parts, 0)(start, next(parts.stream))
    [(total, valid, right, weight)] = taken
    both = right.all(1, keepdims=True)
    assert valid.all() and weight == 0.5 and both.any()
    assert m["reward"] == pytest.approx((total + 0.5 * both).mean())


def test_replies_are_the_records_own(run):
    """The same questions in another order draw the same replies; another step draws others."""
    parts = run.parts()
    numbered = itertools.islice(pipeline.questions(run.builder.data, run.builder), 3)
    questions = [q for _, q in numbered]
    net = nnx.merge(run.graph, run.start)
    with jax.set_mesh(run.mesh):
        a, _ = groups.sample(net, questions, jax.random.key(0), parts.draw)
        b, _ = groups.sample(net, questions[::-1], jax.random.key(0), parts.draw)
        c, _ = groups.sample(net, questions, jax.random.key(1), parts.draw)
    with jax.set_mesh(run.mesh):
        engine = sampler.Local(net, run.builder.chat, rows=2, mesh=run.mesh)
        d, _ = groups.sample(net, questions, jax.random.key(0), parts.draw._replace(engine=engine))
    assert d.texts == a.texts and d.total.tolist() == a.total.tolist()
    np.testing.assert_array_equal(a.tokens, b.tokens[::-1])
    assert a.texts == b.texts[::-1] and not np.array_equal(a.tokens, c.tokens)
    assert not np.array_equal(a.tokens[:, 0], a.tokens[:, 1])


def update(run, parts, n=1):
    """The state and the metrics of the last of n updates from the start."""
    with jax.set_mesh(run.mesh):
        now = state.create(loop.frozen(run.start), run.tx)
        change = policy.make_update(parts, 0)
        for _ in range(n):
            now, values = change(now, next(parts.stream))
    return now, values


def test_minibatches_keep_the_log_probs_of_the_start(run, monkeypatch):
    """Two times three steps: every branch has, in each, what it had in the batch of all."""
    parts = run.parts(updates=2, minibatches=3, pair_filter="none")
    taken = []
    spy = lambda state, batch: (taken.append(jax.device_get(batch)), run.train_step(state, batch))[
        1
    ]
    whole = []
    score = lambda weights, batch: (whole.append(jax.device_get(batch)), run.score(weights, batch))[
        1
    ]
    after, m = update(run, parts._replace(train_step=spy, score=score))
    assert int(after.step) == len(taken) == 6 and len(whole) == 1
    first = jax.device_get(run.score(run.start, whole[0]).logp)

    def by_branch(batch, values):
        table, found = batch.branches, {}
        for at in zip(*np.nonzero(table.record >= 0)):
            mine = batch.tokens.slot[at[:2]] == at[2] + 1
            name = tuple(int(leaf[at]) for leaf in (table.pair, table.side, table.branch))
            found[name] = values[at[:2]][mine]
        return found

    wanted = by_branch(whole[0], first)
    for lap in (taken[:3], taken[3:]):  # each pair once a lap, in an order of the lap's own
        pairs_ = [sorted({i for i, _, _ in by_branch(b, b.old)}) for b in lap]
        assert sorted(sum(pairs_, [])) == [0, 1, 2]
        for batch in lap:
            for name, values in by_branch(batch, batch.old).items():
                np.testing.assert_array_equal(values, wanted[name])
            for name, values in by_branch(batch, batch.ref).items():
                np.testing.assert_allclose(values, wanted[name], atol=1e-5)  # ref: the start
    assert m["num_tokens"] == sum((b.tokens.end > 0).sum() for b in taken)
    assert m["optimizer_step"] == 6


def test_how_rows_are_cut_into_micro_batches_changes_nothing(run):
    """Accumulation is over tokens, not over micro-batches: 2 rows at a time as 8."""
    found = []
    for rows in (8, 2):
        parts = run.parts(pair_filter="none")
        budget = dataclasses.replace(parts.budget, rows=rows)
        found.append(update(run, parts._replace(budget=budget)))
    (a, first), (b, second) = found
    # Of the first step: what Adam's first moment holds. Adam itself blows rounding up.
    moments = [jax.tree.leaves(optax.tree.get(s.opt_state, "mu")) for s in (a, b)]
    for x, y in zip(*moments):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for name in ("loss", "grad_norm", "entropy", "ppo_kl"):
        assert first[name] == pytest.approx(second[name], abs=1e-5), name
    gaps = [m["sampling/sampling_logp_difference/max"] for m in (first, second)]
    assert 0 < gaps[1] < 1e-4 and gaps[0] == pytest.approx(gaps[1], abs=1e-6)  # not their mean


def test_a_reward_that_fails_costs_its_group(run, tmp_path):
    """It raises on one record's real side: that group leaves, the others learn, and it is told."""

    def pay(case, text):
        if case.id == "pair 1" and case.side == 0:
            raise KeyError("colour")
        return rewards.Reward(float("e" in text), 0.0, float("e" in text), {"length": len(text)})

    parts = run.parts(pair_filter="none", table_every=1)._replace(reward=pay, workdir=tmp_path)
    _, m = update(run, parts, 2)  # five records, three an update: it is met once or twice
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert {(x["record"], x["side"], x["reason"]) for x in lines} == {
        ("pair 1", "real", "KeyError: 'colour'")
    }
    assert m["rewards/faults"] == len(lines) / GROUP == parts.stream.counts["faults"] >= 1
    assert np.isfinite(m["loss"]) and np.isfinite(m["reward"]) and m["rewards/length/mean"] > 0
    seen = pq.read_table(tmp_path / "rollouts").to_pylist()
    assert {r["step"] for r in seen} == {1, 2} and len(seen) == 2 * 3 * 2 * GROUP
    for r in seen:
        assert r["paid"] == (not (r["record"] == "pair 1" and r["side"] == "real"))
        assert r["kept"] and (r["reward"] == float("e" in r["reply"]) or not r["paid"])
        assert np.isfinite(r["advantage"]) and (r["paid"] or r["advantage"] == 0)
        assert not r["paid"] or json.loads(r["parts"]) == {"length": len(r["reply"])}
    told = "record 'pair 1', question 'q0 of 0', real side, reply '.*': KeyError: 'colour'"
    with pytest.raises(ValueError, match=told):
        update(run, run.parts(max_faults=0)._replace(reward=pay), 2)
    for value in (np.nan, np.inf):
        broken = lambda case, text, value=value: rewards.Reward(value, 0.0, 0.0)
        parts = run.parts(max_faults=12)._replace(reward=broken)
        assert update(run, parts)[1]["rewards/faults"] == 2 * 2 * 3  # every group, of refills too


def test_faults_of_a_killed_run_are_written_once(tmp_path):
    fault = lambda i: groups.Fault(f"r{i}", "q", "real", "said", "ValueError: no")
    table.faults(tmp_path, 1, [])
    assert not (tmp_path / "faults.jsonl").exists()
    table.faults(tmp_path, 3, [fault(0)])
    table.faults(tmp_path, 5, [fault(1), fault(2)])
    table.faults(tmp_path, 4, [fault(3)])  # the run goes on from a checkpoint of update 3
    told = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(t["step"], t["record"]) for t in told] == [(3, "r0"), (4, "r3")]


def test_a_run_without_signal_stops_with_advice(run):
    same = lambda case, text: rewards.Reward(0.0, 0.0, 0.0)
    for pair_filter in ("any", "none"):
        parts = run.parts(max_dead=2, pair_filter=pair_filter)._replace(reward=same)
        with pytest.raises(ValueError, match="2 updates in a row.*0% were right.*temperature"):
            update(run, parts, 2)
        again = run.parts(max_dead=2)
        again.stream.set_state(parts.stream.get_state())  # the count is part of the place
        assert again.stream.counts == {"updates": 2, "dead": 2, "faults": 0}


def test_a_reward_that_says_not_what_is_right_needs_another_filter(run):
    silent = lambda case, text: rewards.Reward(float("e" in text), 0.0, np.nan)
    with pytest.raises(ValueError, match="--rollout.filter-on reward"):
        update(run, run.parts()._replace(reward=silent))
    _, m = update(run, run.parts(filter_on="reward")._replace(reward=silent))
    assert "rewards/correct/mean" not in m and np.isfinite(m["reward"])


def test_replies_that_might_not_fit_are_refused_before_they_are_drawn(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(groups.sampler, "generate_all", lambda *a, **k: drawn.append(a))
    for field, wanted in (("tokens", r"\d+ tokens; a row holds 40"), ("scored", "20 scored")):
        small = dataclasses.replace(run.builder.data.budget, tokens=40)
        small = (
            small if field == "tokens" else dataclasses.replace(run.builder.data.budget, scored=19)
        )
        with pytest.raises(ValueError, match=wanted + ".*rollout.group"):
            update(run, run.parts()._replace(budget=small))
    assert not drawn

"""The policy loop: who is kept, what the trees carry, and that an update learns and resumes."""

import dataclasses
import itertools

import jax
import numpy as np
import pairs
import pytest
from flax import nnx
from jax.sharding import AxisType

from jaxvid import rewards, sharding
from jaxvid.data import layout, pipeline
from jaxvid.models import hf
from jaxvid.objectives.advantages import Duality
from jaxvid.objectives.policy import Policy
from jaxvid.rollout import sampler
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import loop, metrics, policy, state, step
from jaxvid.train.optimizers import AdamW
from jaxvid.train.policy import Settings

GROUP, LONGEST = 4, 5


def replies(correct, total=None, ended=None, asked=None) -> policy.Replies:
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
    return policy.Replies(
        questions,
        np.arange(correct.size * 2, dtype=np.int32).reshape(*shape, 2),
        -np.arange(correct.size * 2, dtype=np.float32).reshape(*shape, 2),
        np.full(shape, 2),
        np.ones(shape, bool) if ended is None else np.asarray(ended, bool),
        [[[""] * group] * 2] * n,
        total,
        np.ones_like(correct),
        correct,
        asked,
    )


def test_who_survives():
    correct = [[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]]
    total = [[[0, 1], [1, 2]], [[0, 0], [1, 2]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]]
    found = replies(correct, total)
    kept = lambda **kw: policy.survivors(found, Settings(**kw)).astype(int).tolist()
    assert kept() == [1, 0, 1, 1]
    assert kept(pair_filter="both") == [0, 0, 1, 0]
    assert kept(pair_filter="none") == [1, 1, 1, 1]
    assert kept(filter_on="reward") == [1, 1, 1, 1]
    assert kept(filter_on="reward", pair_filter="both") == [1, 0, 1, 0]


def test_a_masked_reply_gives_no_signal():
    found = replies([[[0, 1], [1, 1]]], ended=[[[0, 1], [1, 1]]])
    assert policy.survivors(found, Settings()).all()
    assert not policy.survivors(found, Settings(mask_truncated=True)).any()


def test_the_pair_reward_is_paid_to_both():
    """Of replies 0 and 1 to both videos, only the two replies 0 are right on both sides."""
    found, settings = replies([[[1, 1], [1, 0]]]), Settings(pair_reward=0.5, filter_on="reward")
    paid, right = policy.paid(found, settings), found.correct > 0
    assert paid.tolist() == [[[1.5, 1], [1.5, 0]]]
    both = dataclasses.replace(settings, pair_filter="both")
    assert policy.survivors(found, both).all()  # the real group differs by what the pair is paid
    assert not policy.survivors(found, dataclasses.replace(both, pair_reward=0.0)).any()
    assert policy.reply_metrics(found, settings)["reward"] == 1.0
    valid = policy.validity(found, settings)
    inside = Duality()(found.total, valid, right, 0.5)
    jax.tree.map(np.testing.assert_array_equal, inside, Duality()(paid, valid))


def test_a_reply_without_a_finite_reward_is_left_out():
    found = replies([[[1, 0], [1, 0]]], total=[[[1, np.nan], [1, 0]]])
    assert policy.validity(found, Settings()).tolist() == [[[True, False], [True, True]]]
    assert policy.survivors(found, Settings(filter_on="reward")).all()
    both = Settings(filter_on="reward", pair_filter="both")
    assert not policy.survivors(found, both).any()


def test_a_side_that_was_not_asked_is_no_dead_group():
    found = replies([[[0, 1], [0, 0]]], asked=[[True, False]])
    assert policy.survivors(found, Settings(pair_filter="both")).all()
    assert policy.validity(found, Settings()).tolist() == [[[True, True], [False, False]]]
    assert "rewards/correct/counterfactual" not in policy.reply_metrics(found, Settings())


def test_a_reply_without_a_finite_reward_leaves_group_and_loss():
    found = replies([[[0, 1, 1], [0, 0, 1]]])
    found.total[0, 0, 1] = np.nan
    valid = policy.validity(found, Settings())
    assert valid.tolist() == [[[True, False, True], [True, True, True]]]
    advantage = Duality()(found.total, valid).advantage
    assert np.isfinite(advantage).all() and not advantage[0, 0, 1]
    ((tree, _),) = policy.trees(found, np.asarray(advantage), valid)
    assert [b.weight for b in tree.branches] == [1, 0, 1]
    assert np.isnan(policy.reply_metrics(found, Settings())["reward"])


def test_metrics_by_hand():
    found = replies([[[0, 1], [1, 1]], [[0, 0], [0, 1]]], ended=[[[1, 1], [1, 0]]] * 2)
    m = policy.reply_metrics(found, Settings())
    assert m["reward"] == m["rewards/correct/mean"] == 0.5
    assert (m["rewards/correct/real"], m["rewards/correct/counterfactual"]) == (0.25, 0.75)
    assert m["rewards/correct/both"] == 0.25  # of four matching replies, one has both right
    assert (m["frac_reward_zero_std"], m["completions/clipped_ratio"]) == (0.5, 0.25)
    assert m["reward_std"] == pytest.approx(np.sqrt(0.5) / 2)
    adv = Duality(std="population", eps=0.0)(found.total, policy.validity(found, Settings()))
    d = policy.duality_metrics(jax.device_get(adv))
    assert (d["duality/signal_real"], d["duality/dead_real"]) == (1.0, 0.5)
    assert d["duality/alpha_real"] == 1.0


def test_trees_carry_what_belongs_to_them():
    found = replies(np.zeros((2, 2, 3)), asked=[[True, True], [False, True]])
    advantage = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    valid = policy.validity(found, Settings())
    valid[0, 1, 2] = False
    groups = policy.trees(found, advantage, valid)
    assert [len(g) for g in groups] == [2, 1]
    for i, group in enumerate(groups):
        for tree, side in zip(group, (0, 1) if i == 0 else (1,)):
            for g, b in enumerate(tree.branches):
                assert (b.record, b.pair, b.side, b.branch) == (i, i, side, g)
                assert b.advantage == advantage[i, side, g] and b.scored.all()
                np.testing.assert_array_equal(b.tokens, found.tokens[i, side, g])
                np.testing.assert_array_equal(b.sampled, found.logp[i, side, g])
                assert b.weight == (0.0 if (i, side, g) == (0, 1, 2) else 1.0)


def test_joined_replies_are_in_order():
    a, b = replies([[[0, 1], [1, 1]]]), replies([[[1, 0], [0, 0]], [[1, 1], [1, 1]]])
    both = policy.join([a, b])
    assert len(both.questions) == 3 and both.correct[1, 0].tolist() == [1, 0]
    taken = both.take([2, 0])
    assert taken.correct[:, 0].tolist() == [[1, 1], [0, 1]]
    assert [q.record.id for q in taken.questions] == ["pair 1", "pair 0"]
    assert policy.join([both.take([])]).questions == []


def test_settings_are_checked():
    with pytest.raises(ValueError, match="greedy"):
        Settings(sampling=Sampling(temperature=0.0))
    with pytest.raises(ValueError, match="group 1"):
        Settings(group=1)


# With a model ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HasE:
    """Pays a reply for the letter e: easily learnt, seldom said by chance."""

    def __call__(self, example, text: str) -> rewards.Reward:
        return rewards.Reward(float("e" in text), 0.0, float("e" in text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    pairs.write(path, [pairs.record(i, split="train") for i in range(5)], split="train")
    return path


def one_device():
    kinds = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=kinds, devices=jax.devices()[:1])


class Run:
    """A policy run on the pairs of `folder`; step and scoring are compiled once for all."""

    def __init__(self, folder):
        self.folder, self.builder = folder, pairs.builder(folder, "train")
        self.mesh, self.cfg = one_device(), pairs.config(folder)
        loaded = hf.initialise(self.cfg, 0)
        self.graph, self.start = loaded.graph, loaded.params
        self.optimizer = AdamW(lr=2e-2, schedule="constant", weight_decay=0.0)
        self.tx = self.optimizer.build(100, loaded.params)
        self.train_step = step.make_step(self.graph, Policy(kl_coef=1e-3), self.tx)
        self.score = step.make_score(self.graph)

    def parts(self, **settings) -> policy.Parts:
        stream = iter(pipeline.prompts(self.builder.data, self.builder, 0))
        sampling = Sampling(max_tokens=LONGEST)
        return policy.Parts(
            Settings(group=GROUP, sampling=sampling, max_refills=1, **settings),
            self.graph,
            self.builder.chat,
            policy.Questions(stream, self.builder.data.pairs),
            self.train_step,
            self.score,
            HasE(),
            Duality(),
            self.builder.data.budget,
            self.mesh,
            loop.fixed(self.score, self.start),
        )

    def train(self, workdir, steps, **settings):
        parts = self.parts(**settings)
        with jax.set_mesh(self.mesh):
            start = state.create(loop.frozen(self.start), self.tx, self.mesh)
            return loop.train(
                start,
                policy.make_update(parts, 0),
                parts.stream,
                loop.Settings(steps=steps, log_every=1),
                workdir,
                rate=self.optimizer.rate(100),
                describe=lambda n, item: [q.record.id for q in item],
            )


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
    wanted += " completions/mean_length completions/clipped_ratio rewards/correct/both"
    wanted += " duality/signal_real duality/signal_counterfactual duality/dead_real"
    wanted += " clip_ratio/low_mean clip_ratio/high_mean rollout/kept time/rollout time/update"
    assert set(wanted.split()) <= set(first)
    for line in lines:
        # Sampler and trainer are one model: they may differ by rounding alone.
        assert line["sampling/sampling_logp_difference/max"] < 1e-3
        assert line["clip_ratio/region_mean"] == 0  # one step a rollout: the ratio is 1


def test_a_resumed_run_goes_on_bit_for_bit(run, tmp_path):
    whole = run.train(tmp_path / "whole", 3, updates=2)
    run.train(tmp_path / "cut", 1, updates=2)
    cut = run.train(tmp_path / "cut", 3, updates=2)
    assert int(whole.state.step) == int(cut.state.step) == 6
    for a, b in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(cut.state.params)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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
    questions = list(itertools.islice(pipeline.questions(run.builder.data, run.builder), 3))
    net = nnx.merge(run.graph, run.start)
    with jax.set_mesh(run.mesh):
        a = policy.sample(net, questions, jax.random.key(0), parts)
        b = policy.sample(net, questions[::-1], jax.random.key(0), parts)
        c = policy.sample(net, questions, jax.random.key(1), parts)
    np.testing.assert_array_equal(a.tokens, b.tokens[::-1])
    assert a.texts == b.texts[::-1] and not np.array_equal(a.tokens, c.tokens)
    assert not np.array_equal(a.tokens[:, 0], a.tokens[:, 1])


def test_eight_devices_sample_as_one(run):
    """Rows over the mesh's data axis and weights over fsdp and tensor: the same replies."""
    questions = list(itertools.islice(pipeline.questions(run.builder.data, run.builder), 2))
    trees = [t for q in questions for t in q.trees]
    keys, out = jax.random.split(jax.random.key(0), len(trees)), []
    for mesh in (one_device(), sharding.make_mesh(fsdp=4, tensor=2)):
        with jax.set_mesh(mesh):
            loaded = hf.initialise(run.cfg, 0, mesh=mesh)
            model = nnx.merge(loaded.graph, loaded.params)
            drawn = sampler.generate_all(
                model,
                trees,
                run.builder.chat,
                Sampling(max_tokens=LONGEST),
                group=GROUP,
                keys=keys,
                mesh=mesh,
            )
            out.append(drawn)
    np.testing.assert_array_equal(out[0].tokens, out[1].tokens)
    np.testing.assert_allclose(out[0].logp, out[1].logp, atol=1e-4)

"""A policy run on a few pairs, for the tests of the loop and for runs that are killed."""

import dataclasses

import jax
import pairs
from jax.sharding import AxisType

from jaxvid import rewards, sharding
from jaxvid.data import pipeline
from jaxvid.models import hf
from jaxvid.objectives.advantages import Duality
from jaxvid.objectives.policy import Policy
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import loop, policy, state, step
from jaxvid.train.groups import Settings
from jaxvid.train.optimizers import AdamW

GROUP, LONGEST = 4, 5


@dataclasses.dataclass(frozen=True)
class HasE:
    """Pays a reply for the letter e: easily learnt, seldom said by chance."""

    def __call__(self, example, text: str) -> rewards.Reward:
        return rewards.Reward(float("e" in text), 0.0, float("e" in text))


def fill(path) -> None:
    pairs.write(path, [pairs.record(i, split="train") for i in range(5)], split="train")


def one_device():
    kinds = (AxisType.Auto,) * 4
    return jax.make_mesh((1,) * 4, sharding.AXES, axis_types=kinds, devices=jax.devices()[:1])


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

    def train(self, workdir, steps, every=0, parts=None, **settings):
        parts = parts or self.parts(**settings)
        with jax.set_mesh(self.mesh):
            start = state.create(loop.frozen(self.start), self.tx, self.mesh)
            return loop.train(
                start,
                policy.make_update(parts, 0),
                parts.stream,
                loop.Settings(steps=steps, log_every=1, checkpoint_every=every),
                workdir,
                rate=self.optimizer.rate(100),
                describe=lambda n, item: [q.record.id for q in item],
            )

"""The policy loop: sample replies to both videos of a pair, pay them, weigh them, learn.

One update of `loop.train`, on `pairs` questions (a question is asked of both videos):
  1. sample G replies to each of the two prompts with the present parameters, pay them (`rewards`;
     what a pair earns together: ops.duality), and drop pairs without signal, asking further
     questions in their place at most `max_refills` times; the two sides of a pair stay or go
     together (groups.py);
  2. advantages over [pairs, 2, G], both sides of a pair in one computation;
  3. lay out prompt and replies as trees, a pair in one micro-batch;
  4. if several steps follow, or steps with dropout, log-probs at the start of the update, by the
     trainer's own scoring, and the reference's where there is a KL term;
  5. `updates` times over the rollout, each cut into `minibatches` optimizer steps in a drawn order.

GRPO, DAPO, Dr.GRPO, GSPO, CISPO and DNA-Train are settings of this one path: an advantage function
(objectives.advantages), a loss with its aggregation (objectives.policy), a filter.
Everything drawn comes from (seed, step, record, question, side), so a resumed run samples what the
run would have sampled.

In a run of several processes each draws and lays out its own part of the questions. What was
replied and paid is told to all, so that the filter, the advantages and the counts are the same
everywhere, and the same as in one process.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool

from jaxvid import hosts, rewards, sharding
from jaxvid.batch import Batch
from jaxvid.data import layout
from jaxvid.data.chat import Chat
from jaxvid.data.pipeline import Prompts
from jaxvid.ops.duality import Advantages
from jaxvid.rollout import sampler
from jaxvid.train import groups, loop, table, telling
from jaxvid.train.groups import Replies, Settings
from jaxvid.train.state import TrainState

COUNTS = ("updates", "dead", "faults")


class Parts(NamedTuple):
    """What an update is made of. `train_step` and `score` run at the sampling temperature."""

    settings: Settings
    graph: nnx.GraphDef
    chat: Chat
    stream: "Questions"
    train_step: loop.Update
    score: Callable[..., Any]
    reward: Callable[[Any, str], rewards.Reward]
    advantages: Callable[..., Advantages]
    budget: layout.Budget
    mesh: Mesh
    reference: loop.Reference | None = None  # for objectives with a KL term
    dropout: bool = False  # whether steps drop: `old` is then scored apart, without
    workdir: pathlib.Path | None = None  # where tables of rollouts and faults go
    engine: sampler.Engine | None = None  # what draws in place of the model in this process

    @property
    def draw(self) -> groups.Draw:
        return groups.Draw(*(getattr(self, name) for name in groups.Draw._fields))


class Questions:
    """A stream of lists of `pairs` questions, those of this process. Its place is that of the
    stream it reads, with the counts of the loop: updates made, updates in a row without signal,
    groups lost to faults."""

    def __init__(self, stream: loop.Stream, pairs: int):
        self.stream, self.pairs = stream, pairs
        self.counts = dict.fromkeys(COUNTS, 0)

    def __next__(self) -> list[Prompts]:
        return [next(self.stream) for _ in range(self.pairs)]

    def get_state(self) -> Any:
        return {"stream": self.stream.get_state(), "counts": dict(self.counts)}

    def set_state(self, state: Any) -> None:
        self.stream.set_state(state["stream"])
        self.counts = dict(state["counts"])


def make_update(parts: Parts, seed: int) -> loop.Update:
    """The update for `loop.train`: (state, list of questions) -> (state, metrics)."""
    settings = parts.settings

    def update(state: TrainState, questions: list[Prompts]):
        parts.stream.counts["updates"] += 1
        n, clock = parts.stream.counts["updates"], _Clock()
        model = nnx.merge(parts.graph, state.weights)
        key = jax.random.fold_in(jax.random.key(seed), n)
        more = lambda: next(parts.stream)
        drawn = groups.collect(model, questions, key, parts.draw, more)
        clock.add(drawn.seconds)
        kept = drawn.seen.take(drawn.kept)
        valid = groups.validity(kept, settings)
        found = _advantages(parts, kept, valid)
        metrics = telling.replies(drawn.seen, settings) | telling.pairs(found, valid)
        metrics["rollout/kept"] = len(drawn.kept) / len(drawn.seen.questions)
        metrics["rollout/refills"] = float(drawn.refills)
        _record(parts, n, drawn, found)
        _count(parts, drawn.seen, found, metrics)
        if len(drawn.kept):
            trees = groups.trees(kept, found.advantage, valid)
            like = next(t for q in drawn.seen.questions for t in q.trees)
            steps = _steps(parts, state, trees, like, seed, clock)
            laps = []
            for batch in steps:
                state, values = parts.train_step(state, batch)
                laps.append(jax.device_get(values))
                clock.lap("update")
            metrics |= _over_laps(laps)
        else:
            metrics |= _nothing(state)
        tokens = drawn.seen.length.sum() / max(drawn.seconds["rollout"], 1e-9)
        return state, metrics | clock.times() | {"perf/rollout_tokens_per_second": float(tokens)}

    return update


def _advantages(parts: Parts, kept: Replies, valid: Bool[np.ndarray, "n 2 G"]) -> Advantages:
    """Of the pairs kept, on the host."""
    if not len(valid):  # nothing to compute
        sides = np.zeros((0, 2), np.float32)
        return Advantages(np.zeros(valid.shape, np.float32), sides, sides, sides > 0)
    correct = np.nan_to_num(kept.correct) > 0
    weight = parts.settings.pair_reward
    return jax.device_get(parts.advantages(kept.total, valid, correct, weight))


def _steps(
    parts: Parts,
    state: TrainState,
    trees: list[list[layout.Tree]],
    like: layout.Tree,
    seed: int,
    clock: "_Clock",
) -> Iterator[Batch]:
    """The batches of an update's optimizer steps, in order, with `old` and `ref` in them.

    All log-probs are of the state given: they are computed before the first batch is handed out.
    """
    settings, several = parts.settings, min(parts.settings.minibatches, len(trees))
    whole = _batch(parts, trees, like)
    clock.lap("layout")
    if settings.updates * several == 1 and not parts.dropout:  # the step itself scores at its start
        whole = whole._replace(old=jnp.full_like(whole.old, jnp.nan))
    else:
        whole = whole._replace(old=parts.score(state.weights, whole).logp)
    if parts.reference is not None:
        whole = whole._replace(ref=parts.reference(state, whole))
    clock.lap("score")
    if several == 1:
        for _ in range(settings.updates):
            yield whole
        return
    trees = _scored(trees, whole)
    step = int(state.step)
    for lap in range(settings.updates):
        order = np.random.default_rng((seed, step, lap)).permutation(len(trees))
        for part in np.array_split(order, several):
            batch = _batch(parts, [trees[i] for i in sorted(part)], like)
            clock.lap("layout")
            yield batch


def _batch(parts: Parts, trees: list[list[layout.Tree]], like: layout.Tree) -> Batch:
    """The trees of this process, with as many micro-batches as any process needs; padding is as of
    the family of `like`."""
    processes, mine = jax.process_count(), [group for group in trees if group]
    budget = dataclasses.replace(parts.budget, rows=parts.budget.rows // processes)
    packed = layout.pack(mine, budget, shards=sharding.data_shards(parts.mesh) // processes)
    (count,) = hosts.most(len(packed))
    packed = packed or [layout.empty(budget, like)]
    return loop.place(layout.stack(packed, 1 << (count - 1).bit_length()), parts.mesh)


def _scored(trees: list[list[layout.Tree]], whole: Batch) -> list[list[layout.Tree]]:
    """The trees with each branch's `old` and `ref`, read from the batch that holds all of them."""
    table, slot, old, ref = jax.tree.map(
        lambda x: hosts.local(x, 1), (whole.branches, whole.tokens.slot, whole.old, whole.ref)
    )
    where = {}
    for a, row, column in np.argwhere(table.record >= 0):
        at = a, row, column
        name = int(table.pair[at]), int(table.side[at]), int(table.branch[at])
        where[name] = a, row, np.flatnonzero(slot[a, row] == column + 1)

    def read(branch: layout.Branch) -> layout.Branch:
        at = where[branch.pair, branch.side, branch.branch]
        return branch._replace(old=old[at], ref=ref[at])

    return [
        [tree._replace(branches=tuple(map(read, tree.branches))) for tree in group]
        for group in trees
    ]


def _record(parts: Parts, n: int, drawn: groups.Drawn, found: Advantages) -> None:
    """Write the faults of an update and, where it is due, its table of rollouts; process 0 does."""
    if parts.workdir is None or jax.process_index():
        return
    table.faults(parts.workdir, n, [f for faults in drawn.seen.faults for f in faults])
    every = parts.settings.table_every
    if every and n % every == 0:
        table.write(parts.workdir, n, drawn.seen, drawn.kept, found.advantage, parts.settings)


def _count(parts: Parts, seen: Replies, found: Advantages, metrics: dict[str, float]) -> None:
    """Count faults and updates without signal; raise ValueError where a limit is reached."""
    settings, counts = parts.settings, parts.stream.counts
    lost = [faults[0] for faults in seen.faults if faults]
    counts["faults"] += sum(len({f.side for f in faults}) for faults in seen.faults)
    metrics["rewards/faults"] = float(counts["faults"])
    if lost and counts["faults"] > settings.max_faults:
        f = lost[-1]
        raise ValueError(
            f"the reward failed for {counts['faults']} groups of replies, more than "
            f"rollout.max_faults {settings.max_faults}. The last: record {f.record!r}, question "
            f"{f.question!r}, {f.side} side, reply {f.reply!r}: {f.reason}. All of them are in "
            f"faults.jsonl of the work folder; mend the reward or the records."
        )
    alive = bool(len(found.signal) and found.signal.sum() > 0)
    counts["dead"] = 0 if alive else counts["dead"] + 1
    if settings.max_dead and counts["dead"] >= settings.max_dead:
        right = metrics.get("rewards/correct/mean", np.nan)
        raise ValueError(
            f"no group carried signal in {counts['dead']} updates in a row (rollout.max_dead): all "
            f"replies to a prompt earn the same. Of the last ones {right:.0%} were right and "
            f"{metrics['rewards/format/mean']:.0%} well formed. If few are well formed, start from "
            f"an SFT model that answers in that form; if all are right or all wrong, choose other "
            f"questions, more replies (rollout.group) or a higher rollout.sampling.temperature; "
            f"read some in the tables of rollouts (rollout.table_every)."
        )


def _over_laps(laps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps of one update; counters give their last value, tokens and FLOPs
    their sum, and what is named .../max its largest."""
    over = lambda name: np.max if name.endswith("/max") else np.mean
    means = {name: float(over(name)([lap[name] for lap in laps])) for name in laps[0]}
    last = ("skipped", "skipped_total", "optimizer_step")
    means |= {name: float(laps[-1][name]) for name in last}
    summed = means.keys() & {"num_tokens", "flops"}
    return means | {name: float(sum(lap[name] for lap in laps)) for name in summed}


def _nothing(state: TrainState) -> dict[str, float]:
    """What an update reports that found no pair with signal and changed nothing."""
    counters = {"skipped": float(state.skipped), "skipped_total": float(state.skipped_total)}
    return {"loss": np.nan, "grad_norm": np.nan, "num_tokens": 0.0} | counters


class _Clock:
    """Seconds of each phase of an update."""

    def __init__(self):
        self.since, self.spent = time.perf_counter(), {}

    def add(self, seconds: dict[str, float]) -> None:
        """What was measured elsewhere, up to now."""
        for name, s in seconds.items():
            self.spent[name] = self.spent.get(name, 0.0) + s
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        self.add({name: time.perf_counter() - self.since})

    def times(self) -> dict[str, float]:
        return {f"time/{name}": s for name, s in self.spent.items()}

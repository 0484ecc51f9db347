"""The policy loop: sample replies to both videos of a pair, pay them, weigh them, learn.

One update of `loop.train`, on `pairs` questions (a question is asked of both videos):
  1. sample G replies to each of the two prompts with the present parameters;
  2. pay them (`rewards`; what a pair earns together: ops.duality), and drop pairs without signal,
     asking further questions in their place at most `max_refills` times; the two sides of a pair
     stay or go together;
  3. advantages over [pairs, 2, G], both sides of a pair in one computation;
  4. lay out prompt and replies as trees, a pair in one micro-batch;
  5. if several steps follow, or steps with dropout, log-probs at the start of the update, by the
     trainer's own scoring;
  6. `updates` steps on the same batch.

Everything drawn comes from (seed, step, record, question, side), so a resumed run samples what the
run would have sampled. Left out: several processes, minibatches of one rollout.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvid import rewards
from jaxvid.data import layout
from jaxvid.data.chat import Chat
from jaxvid.data.pipeline import Prompts
from jaxvid.ops.duality import Advantages, pair_reward
from jaxvid.rollout import sampler
from jaxvid.train import loop
from jaxvid.train.state import TrainState

SIDES = ("real", "counterfactual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How replies are drawn, paid and filtered."""

    group: int = 8  # replies to each prompt
    sampling: sampler.Sampling = sampler.Sampling(max_tokens=256)
    pair_filter: Literal["any", "both", "none"] = "any"  # which sides of a pair must carry signal
    filter_on: Literal["accuracy", "reward"] = "accuracy"  # what the signal is judged on
    max_refills: int = 3  # further draws of questions to replace the pairs filtered out
    updates: int = 1  # steps on one rollout
    mask_truncated: bool = False  # leave replies that hit max_tokens out of group and loss
    overlong: rewards.Overlong = rewards.Overlong()
    pair_reward: float = 0.0  # to both replies i of a pair where both are right (FADE); 0 is off
    rows: int = 0  # prompts sampled at a time; 0 is all of an update

    def __post_init__(self):
        if self.sampling.temperature <= 0:
            raise ValueError(
                "sampling.temperature is 0 (greedy): a group of equal replies carries no signal. "
                "Set it above 0; the usual value is 1."
            )
        if self.group < 2 or self.updates < 1 or self.max_refills < 0 or self.rows < 0:
            raise ValueError(
                f"group {self.group}, updates {self.updates}, max_refills {self.max_refills}, rows "
                f"{self.rows}: wanted are at least 2, 1, 0 and 0"
            )


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


class Questions:
    """A stream of lists of `pairs` questions. Its place is that of the stream it reads."""

    def __init__(self, stream: loop.Stream, pairs: int):
        self.stream, self.pairs = stream, pairs

    def __next__(self) -> list[Prompts]:
        return [next(self.stream) for _ in range(self.pairs)]

    def get_state(self) -> Any:
        return self.stream.get_state()

    def set_state(self, state: Any) -> None:
        self.stream.set_state(state)


class Replies(NamedTuple):
    """The replies to some questions and what they earned. Side 0 is real, 1 counterfactual.

    A question asked of one video alone leaves the other side's `asked` False.
    """

    questions: list[Prompts]
    tokens: np.ndarray  # [pairs, 2, G, R]
    logp: Float[np.ndarray, "pairs 2 G R"]  # the sampler's
    length: np.ndarray  # [pairs, 2, G]
    ended: Bool[np.ndarray, "pairs 2 G"]
    texts: list[list[list[str]]]  # of pair, side, branch
    total: Float[np.ndarray, "pairs 2 G"]  # each by itself; `paid` adds the pair's
    format: Float[np.ndarray, "pairs 2 G"]
    correct: Float[np.ndarray, "pairs 2 G"]
    asked: Bool[np.ndarray, "pairs 2"]

    def take(self, which: Sequence[int] | Int[np.ndarray, "n"]) -> "Replies":
        rows = list(which)
        lists = {name: [getattr(self, name)[i] for i in rows] for name in ("questions", "texts")}
        arrays = {n: getattr(self, n)[rows] for n in self._fields if n not in lists}
        return Replies(**lists, **arrays)


def join(parts: Sequence[Replies]) -> Replies:
    """Several as one, in order."""
    joined = []
    for field in zip(*parts):
        lists = isinstance(field[0], list)
        joined.append([x for part in field for x in part] if lists else np.concatenate(field))
    return Replies(*joined)


def make_update(parts: Parts, seed: int) -> loop.Update:
    """The update for `loop.train`: (state, list of questions) -> (state, metrics)."""
    if jax.process_count() > 1:
        raise ValueError(
            f"the policy loop runs in one process and there are {jax.process_count()}; start it on "
            f"one host, with as many devices as that has"
        )
    settings, shards = parts.settings, sampler.data_shards(parts.mesh)

    def update(state: TrainState, questions: list[Prompts]):
        clock = _Clock()
        model = nnx.merge(parts.graph, state.weights)
        key = jax.random.fold_in(jax.random.key(seed), int(state.step))
        seen, kept = collect(model, questions, key, parts)
        metrics = reply_metrics(seen, settings)
        metrics["rollout/kept"] = len(kept.questions) / len(seen.questions)
        metrics["rollout/refills"] = len(seen.questions) / len(questions) - 1
        clock.lap("time/rollout")
        if not kept.questions:
            return state, metrics | _nothing(state)
        valid = validity(kept, settings)
        found = jax.device_get(
            parts.advantages(kept.total, valid, kept.correct > 0, settings.pair_reward)
        )
        groups = trees(kept, found.advantage, valid)
        batch = layout.stack(layout.pack(groups, parts.budget, shards=shards))
        batch = loop.place(batch, parts.mesh)
        if settings.updates == 1 and not parts.dropout:  # the step itself scores at its start
            batch = batch._replace(old=jnp.full_like(batch.old, jnp.nan))
        else:
            batch = batch._replace(old=parts.score(state.weights, batch).logp)
        if parts.reference is not None:
            batch = batch._replace(ref=parts.reference(state, batch))
        laps = []
        for _ in range(settings.updates):
            state, values = parts.train_step(state, batch)
            laps.append(values)
        metrics |= duality_metrics(found) | _over_laps(jax.device_get(laps))
        clock.lap("time/update")
        return state, metrics | clock.laps

    return update


def collect(
    model: nnx.Module,
    questions: list[Prompts],
    key: Key[Array, ""],
    parts: Parts,
) -> tuple[Replies, Replies]:
    """(all replies sampled, those of the pairs kept): at most as many pairs as `questions`.

    Pairs without signal are replaced from the stream; after `max_refills` the batch stays short.
    """
    settings, wanted, seen, kept = parts.settings, len(questions), [], []
    for refill in range(settings.max_refills + 1):
        if refill:
            questions = next(parts.stream)
        replies = sample(model, questions, jax.random.fold_in(key, refill), parts)
        seen.append(replies)
        kept.append(replies.take(np.flatnonzero(survivors(replies, settings))))
        if sum(len(k.questions) for k in kept) >= wanted:
            break
    every = join(kept)
    return join(seen), every.take(range(min(wanted, len(every.questions))))


def sample(
    model: nnx.Module,
    questions: list[Prompts],
    key: Key[Array, ""],
    parts: Parts,
) -> Replies:
    """Draw and pay the replies to both videos of each question."""
    settings = parts.settings
    places = [(i, e.media) for i, q in enumerate(questions) for e in q.examples]
    for i, side in places:
        if side not in (0, 1):
            raise ValueError(
                f"record {questions[i].record.id!r} asks a policy question of media {side}; a pair "
                f"has media 0 (real) and 1 (counterfactual)"
            )
    asked = [(q.record.id, t, e) for q in questions for t, e in zip(q.trees, q.examples)]
    names = [zlib.crc32(f"{name}\0{e.name}\0{e.media}".encode()) for name, _, e in asked]
    out = sampler.generate_all(
        model,
        [t for _, t, _ in asked],
        parts.chat,
        settings.sampling,
        group=settings.group,
        keys=jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.asarray(names, jnp.uint32)),
        rows=settings.rows,
        mesh=parts.mesh,
    )
    at = tuple(np.array(places).T)

    def sides(values: np.ndarray) -> np.ndarray:  # [prompts, ...] -> [pairs, 2, ...]
        grid = np.zeros((len(questions), 2, *values.shape[1:]), values.dtype)
        grid[at] = values
        return grid

    texts: list[list[list[str]]] = [[[], []] for _ in questions]
    earned = np.zeros((len(asked), settings.group, 3), np.float32)
    for row, ((i, side), (_, _, example)) in enumerate(zip(places, asked)):
        for g in range(settings.group):
            text = parts.chat.decode(out.tokens[row, g, : out.length[row, g]])
            earned[row, g] = parts.reward(example, text)
            texts[i][side].append(text)
    total, well_formed, correct = np.moveaxis(sides(earned), -1, 0)
    length = sides(out.length)
    total = total + settings.overlong(length, settings.sampling.max_tokens)
    ended, given = sides(out.ended), sides(np.ones(len(asked), bool))
    return Replies(
        questions,
        sides(out.tokens),
        sides(out.logp),
        length,
        ended,
        texts,
        total,
        well_formed,
        correct,
        given,
    )


def validity(replies: Replies, settings: Settings) -> Bool[np.ndarray, "pairs 2 G"]:
    """Which replies count in their group and in the loss: not those that have no finite reward."""
    valid = replies.asked[..., None] & np.isfinite(replies.total)
    return valid & replies.ended if settings.mask_truncated else valid


def paid(replies: Replies, settings: Settings) -> Float[np.ndarray, "pairs 2 G"]:
    """Rewards as the advantages are made of them."""
    valid = validity(replies, settings)
    return replies.total + pair_reward(replies.correct > 0, valid, settings.pair_reward)


def survivors(replies: Replies, settings: Settings) -> Bool[np.ndarray, "pairs"]:
    """Dynamic sampling (DAPO, arXiv 2503.14476) of whole pairs: a group carries signal if its
    replies differ, in accuracy or in reward; a pair stays if either of its groups, or both, do.

    A pair asked of one video alone has that one group.
    """
    judged = replies.correct if settings.filter_on == "accuracy" else paid(replies, settings)
    valid = validity(replies, settings)
    low = np.where(valid, judged, np.inf).min(-1)
    high = np.where(valid, judged, -np.inf).max(-1)
    signal = high > low
    match settings.pair_filter:
        case "none":
            return np.ones(len(judged), bool)
        case "any":
            return signal.any(1)
        case "both":
            return (signal | ~replies.asked).all(1)
    raise ValueError(f"pair_filter is {settings.pair_filter!r}; choose any, both or none")


def trees(
    replies: Replies,
    advantage: Float[np.ndarray, "pairs 2 G"],
    valid: Bool[np.ndarray, "pairs 2 G"],
) -> list[list[layout.Tree]]:
    """Each prompt with its replies as branches; the trees of a pair are one group."""
    groups = []
    for i, question in enumerate(replies.questions):
        group = []
        for tree, example in zip(question.trees, question.examples):
            side, branches = example.media, []
            for g, n in enumerate(replies.length[i, side]):
                branches.append(
                    layout.Branch(
                        replies.tokens[i, side, g, :n],
                        np.ones(n, bool),
                        record=i,
                        pair=i,
                        side=side,
                        branch=g,
                        weight=float(valid[i, side, g]),
                        advantage=float(advantage[i, side, g]),
                        sampled=replies.logp[i, side, g, :n],
                    )
                )
            group.append(tree._replace(branches=tuple(branches)))
        groups.append(group)
    return groups


# Metrics ----------------------------------------------------------------------------------------


def reply_metrics(seen: Replies, settings: Settings) -> dict[str, float]:
    """Rewards and lengths of every reply sampled, before the filter: the filter would flatter."""
    asked = seen.asked
    groups = paid(seen, settings)[asked]  # [groups, G]
    length, ended = seen.length[asked], seen.ended[asked]
    out = {
        "reward": groups.mean(),
        "reward_std": groups.std(-1, ddof=1).mean(),
        "frac_reward_zero_std": (groups.max(-1) == groups.min(-1)).mean(),
        "completions/mean_length": length.mean(),
        "completions/min_length": length.min(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": 1 - ended.mean(),
    }
    if ended.any():
        out["completions/mean_terminated_length"] = length[ended].mean()
    for name in ("format", "correct"):
        values = getattr(seen, name)
        out[f"rewards/{name}/mean"] = values[asked].mean()
        out[f"rewards/{name}/std"] = values[asked].std()
        for side, label in enumerate(SIDES):
            if asked[:, side].any():
                out[f"rewards/{name}/{label}"] = values[asked[:, side], side].mean()
    if asked.all(1).any():
        out["rewards/correct/both"] = seen.correct[asked.all(1)].min(1).mean()
    return {name: float(x) for name, x in out.items()}


def duality_metrics(found: Advantages) -> dict[str, float]:
    """Signal, scale and dead groups of the pairs kept. alpha is over the groups that take part."""
    out = {}
    for side, label in enumerate(SIDES):
        alpha = found.alpha[:, side]
        out[f"duality/signal_{label}"] = float(found.signal[:, side].mean())
        out[f"duality/dead_{label}"] = float(found.dead[:, side].mean())
        if (alpha > 0).any():
            out[f"duality/alpha_{label}"] = float(alpha[alpha > 0].mean())
            out[f"duality/alpha_{label}_max"] = float(alpha.max())
    return out


def _over_laps(laps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps of one update; counters give their last value."""
    means = {name: float(np.mean([lap[name] for lap in laps])) for name in laps[0]}
    counters = {name: float(laps[-1][name]) for name in ("skipped", "skipped_total")}
    return means | counters


def _nothing(state: TrainState) -> dict[str, float]:
    """What an update reports that found no pair with signal and changed nothing."""
    counters = {"skipped": float(state.skipped), "skipped_total": float(state.skipped_total)}
    return {"loss": np.nan, "grad_norm": np.nan, "num_tokens": 0.0} | counters


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self):
        self.since, self.laps = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.since = now - self.since, now

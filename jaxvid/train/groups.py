"""Groups of replies: drawn for both videos of each question, paid, and filtered by pairs.

A group is paid on the host as soon as it has ended, while the device draws on. A reward that
raises, or gives no finite number, costs its group (all replies to that prompt) its place in the
update; what was asked and answered is kept as a `Fault`. This is the one place where any exception
is caught: a reward may be a function of the user's own.

Everything drawn comes from (key, record, question, side), whatever else is asked beside it.
"""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxvid import hosts, rewards
from jaxvid.data import layout, records
from jaxvid.data.chat import Chat
from jaxvid.data.pipeline import Prompts
from jaxvid.ops.duality import pair_reward
from jaxvid.rollout import sampler

SIDES = ("real", "counterfactual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How replies are drawn, paid, filtered and learned from."""

    group: int = 8  # replies to each prompt
    sampling: sampler.Sampling = sampler.Sampling(max_tokens=256)
    pair_filter: Literal["any", "both", "none"] = "any"  # which sides of a pair must carry signal
    filter_on: Literal["accuracy", "reward"] = "accuracy"  # what the signal is judged on
    max_refills: int = 3  # further draws of questions to replace the pairs filtered out
    updates: int = 1  # times that one rollout is gone through (mu)
    minibatches: int = 1  # optimizer steps of each time, on so many equal parts of its pairs
    mask_truncated: bool = False  # leave replies that hit max_tokens out of group and loss
    overlong: rewards.Overlong = rewards.Overlong()
    pair_reward: float = 0.0  # to both replies i of a pair where both are right (FADE); 0 is off
    rows: int = 0  # prompts sampled at a time; 0 is all of an update
    max_faults: int = 10  # groups lost to a failing reward that stop the run
    max_dead: int = 20  # updates in a row without any signal that stop the run; 0 is never
    table_every: int = 10  # updates from one table of rollouts to the next; 0 is never

    def __post_init__(self):
        if self.sampling.temperature <= 0:
            raise ValueError(
                "sampling.temperature is 0 (greedy): a group of equal replies carries no signal. "
                "Set it above 0; the usual value is 1."
            )
        least = {"group": 2, "updates": 1, "minibatches": 1, "max_refills": 0, "rows": 0}
        least |= {"max_faults": 0, "max_dead": 0, "table_every": 0}
        bad = [f"{n} = {vars(self)[n]}, wanted at least {m}" for n, m in least.items()]
        bad = [text for text, (n, m) in zip(bad, least.items()) if vars(self)[n] < m]
        if bad:
            raise ValueError("rollout: " + "; ".join(bad))
        self.overlong(np.zeros(1, int), self.sampling.max_tokens)  # says if its buffer is no part


class Fault(NamedTuple):
    """A reply that could not be paid."""

    record: str
    question: str
    side: str
    reply: str
    reason: str


class Draw(NamedTuple):
    """What draws and pays replies."""

    settings: Settings
    chat: Chat
    reward: Callable[[Any, str], rewards.Reward]
    budget: layout.Budget
    mesh: Mesh
    engine: sampler.Engine | None = None  # what draws in place of the model in this process


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
    parts: list[list[list[dict[str, float]]]]  # values that a reward names, likewise
    faults: list[list[Fault]]  # of pair
    total: Float[np.ndarray, "pairs 2 G"]  # each by itself; `paid` adds the pair's
    format: Float[np.ndarray, "pairs 2 G"]
    correct: Float[np.ndarray, "pairs 2 G"]
    asked: Bool[np.ndarray, "pairs 2"]  # and paid: a group with a fault takes no part

    def take(self, which: Sequence[int] | Int[np.ndarray, "n"]) -> "Replies":
        rows, taken = list(which), []
        for field in self:
            taken.append([field[i] for i in rows] if _listed(field) else field[rows])
        return Replies(*taken)


def join(parts: Sequence[Replies]) -> Replies:
    """Several as one, in order."""
    joined = []
    for field in zip(*parts):
        lists = _listed(field[0])
        joined.append([x for part in field for x in part] if lists else np.concatenate(field))
    return Replies(*joined)


class Drawn(NamedTuple):
    """All replies of an update, the pairs of them that are kept, and where the time went."""

    seen: Replies
    kept: Int[np.ndarray, "n"]  # indices of pairs
    refills: int
    seconds: dict[str, float]  # rollout, reward


def collect(
    model: nnx.Module,
    questions: list[Prompts],
    key: Key[Array, ""],
    draw: Draw,
    more: Callable[[], list[Prompts]],
) -> Drawn:
    """Draw until as many pairs are kept as there are `questions`, or refills are used up.

    Pairs without signal are replaced by `more()`; after `max_refills` the batch stays short. In a
    run of several processes each asks `questions` of its own, and what is returned is of all.
    """
    settings, wanted = draw.settings, len(questions) * jax.process_count()
    seen, kept = [], []
    seconds = {"rollout": 0.0, "reward": 0.0}
    for refill in range(settings.max_refills + 1):
        if refill:
            questions = more()
        replies, spent = sample(model, questions, jax.random.fold_in(key, refill), draw)
        replies = of_all(replies)
        before = sum(len(r.questions) for r in seen)
        seen.append(replies)
        kept += (before + np.flatnonzero(survivors(replies, settings))).tolist()
        seconds = {name: seconds[name] + s for name, s in spent.items()}
        if len(kept) >= wanted:
            break
    return Drawn(join(seen), np.array(kept[:wanted], int), len(seen) - 1, seconds)


def of_all(replies: Replies) -> Replies:
    """The replies of all processes, in the order of the stream. Questions of another process come
    without their media and trees."""
    if jax.process_count() == 1:
        return replies
    told = [
        {
            "record": q.record.id,
            "split": q.record.split,
            "examples": [dataclasses.asdict(e) for e in q.examples],
            "lists": [replies.texts[i], replies.parts[i], [f._asdict() for f in replies.faults[i]]],
        }
        for i, q in enumerate(replies.questions)
    ]
    merged, lists = [], []
    for i, row in enumerate(zip(*hosts.gather(told))):
        for process, other in enumerate(row):
            examples = tuple(records.example(e) for e in other["examples"])
            stub = records.Record(other["record"], other["split"], (), examples)
            mine = process == jax.process_index()
            merged.append(replies.questions[i] if mine else Prompts(stub, [], list(examples)))
            texts, named, faults = other["lists"]
            lists.append((texts, named, [Fault(**f) for f in faults]))
    texts, named, faults = map(list, zip(*lists))
    numbers = {n: hosts.interleave(v) for n, v in replies._asdict().items() if not _listed(v)}
    return Replies(questions=merged, texts=texts, parts=named, faults=faults, **numbers)


def _listed(field: Any) -> bool:
    return isinstance(field, list)


def sample(
    model: nnx.Module, questions: list[Prompts], key: Key[Array, ""], draw: Draw
) -> tuple[Replies, dict[str, float]]:
    """Draw and pay the replies to both videos of each question; and the seconds it took.

    Raises ValueError for a question of other media than a pair's, and for a prompt whose replies
    might not fit in a row: before anything is drawn.
    """
    settings = draw.settings
    for q in questions:
        for tree, example in zip(q.trees, q.examples):
            check(q, tree, example, draw)
    asked = [(q, t, e) for q in questions for t, e in zip(q.trees, q.examples)]
    keys = sampler.named_keys(key, [f"{q.record.id}\0{e.name}\0{e.media}" for q, _, e in asked])
    paid: list[concurrent.futures.Future[_Paid] | None] = [None] * len(asked)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as payer:

        def done(i: int, out: sampler.Rollouts) -> None:
            question, _, example = asked[i]
            paid[i] = payer.submit(_pay, question, example, out, draw)

        out = _drawn(model, asked, keys, draw, done)
        ready = time.perf_counter()
        paid = [p.result() for p in paid]
    seconds = {"rollout": ready - start, "reward": time.perf_counter() - ready}
    return _by_pairs(questions, out, paid, settings), seconds


def _drawn(model, asked, keys, draw: Draw, done) -> sampler.Rollouts:
    settings = draw.settings
    if draw.engine is None:
        return sampler.generate_all(
            model,
            [t for _, t, _ in asked],
            draw.chat,
            settings.sampling,
            group=settings.group,
            keys=keys,
            rows=settings.rows,
            mesh=draw.mesh,
            done=done,
        )
    clip = lambda question, example: question.record.media[example.media]
    prompts = [sampler.Prompt(t, e.prompt, (clip(q, e),)) for q, t, e in asked]
    out = draw.engine(prompts, settings.sampling, group=settings.group, keys=keys)
    for i in range(len(asked)):
        done(i, sampler.Rollouts(*(leaf[i : i + 1] for leaf in out)))
    return out


def check(question: Prompts, tree: layout.Tree, example: Any, draw: Draw) -> None:
    """Raise ValueError unless the question is of a pair, and its longest replies would fit a row
    beside it."""
    settings = draw.settings
    if example.media not in (0, 1):
        raise ValueError(
            f"record {question.record.id!r} asks a policy question of media {example.media}; a "
            f"pair has media 0 (real) and 1 (counterfactual)"
        )
    most = settings.group * settings.sampling.max_tokens
    need = layout.size(tree)
    need = need._replace(tokens=need.tokens + most, scored=most, branches=settings.group)
    for name, wanted, limit in zip(need._fields, need, draw.budget.row):
        if wanted > limit:
            raise ValueError(
                f"record {question.record.id!r}: its prompt of {len(tree.prompt)} tokens with "
                f"{settings.group} replies of up to {settings.sampling.max_tokens} may take "
                f"{wanted} {name}; a row holds {limit}. Set budget.{name} to at least {wanted}, or "
                f"fewer replies (rollout.group), shorter ones (rollout.sampling.max_tokens), fewer "
                f"or smaller frames (data.sampling)."
            )


class _Paid(NamedTuple):
    texts: list[str]
    earned: list[rewards.Reward]
    faults: list[Fault]


def _pay(question: Prompts, example: Any, out: sampler.Rollouts, draw: Draw) -> _Paid:
    """The replies [1, G, R] of one group as text, with what they earn."""
    record, side, case = question.record, example.media, rewards.case(question.record, example)
    texts, earned, faults = [], [], []
    for tokens, n in zip(out.tokens[0], out.length[0]):
        text = draw.chat.decode(tokens[:n])
        texts.append(text)
        try:
            found = draw.reward(case, text)
            if not math.isfinite(found.total):
                raise ValueError(f"the reward is {found.total}; wanted is a finite number")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            faults.append(Fault(record.id, example.name, SIDES[side], text, reason))
            found = rewards.Reward(math.nan, math.nan, math.nan)
        earned.append(found)
    return _Paid(texts, earned, faults)


def _by_pairs(
    questions: list[Prompts], out: sampler.Rollouts, paid: list[_Paid], settings: Settings
) -> Replies:
    """Rows of prompts as [pairs, 2, ...]."""
    places = [(i, e.media) for i, q in enumerate(questions) for e in q.examples]
    at = tuple(np.array(places).T)

    def sides(values: np.ndarray) -> np.ndarray:
        grid = np.zeros((len(questions), 2, *values.shape[1:]), values.dtype)
        grid[at] = values
        return grid

    texts: list[list[list[str]]] = [[[], []] for _ in questions]
    parts: list[list[list[dict[str, float]]]] = [[[], []] for _ in questions]
    faults: list[list[Fault]] = [[] for _ in questions]
    for (i, side), p in zip(places, paid):
        texts[i][side], parts[i][side] = p.texts, [r.parts for r in p.earned]
        faults[i] += p.faults
    numbers = np.array([[r[:3] for r in p.earned] for p in paid], np.float32)
    total, well_formed, correct = np.moveaxis(sides(numbers), -1, 0)
    length = sides(out.length)
    return Replies(
        questions,
        sides(out.tokens),
        sides(out.logp),
        length,
        sides(out.ended),
        texts,
        parts,
        faults,
        total + settings.overlong(length, settings.sampling.max_tokens),
        well_formed,
        correct,
        sides(np.array([not p.faults for p in paid])),
    )


def validity(replies: Replies, settings: Settings) -> Bool[np.ndarray, "pairs 2 G"]:
    """Which replies count in their group and in the loss: not those of a group with a fault."""
    valid = replies.asked[..., None] & np.isfinite(replies.total)
    return valid & replies.ended if settings.mask_truncated else valid


def paid(replies: Replies, settings: Settings) -> Float[np.ndarray, "pairs 2 G"]:
    """Rewards as the advantages are made of them."""
    valid = validity(replies, settings)
    return replies.total + pair_reward(replies.correct > 0, valid, settings.pair_reward)


def survivors(replies: Replies, settings: Settings) -> Bool[np.ndarray, "pairs"]:
    """Dynamic sampling (DAPO, arXiv 2503.14476) of whole pairs: a group carries signal if its
    replies differ, in accuracy or in reward; a pair stays if either of its groups, or both, do.

    A pair asked of one video alone has that one group. Raises ValueError for a judgement by
    accuracy where the reward does not say what is right.
    """
    valid = validity(replies, settings)
    unsaid = (np.isnan(replies.correct) & valid).any()
    by_accuracy = settings.pair_filter != "none" and settings.filter_on == "accuracy"
    if unsaid and (by_accuracy or settings.pair_reward):
        raise ValueError(
            "the reward does not say which replies are right (no 'correct' among its values), and "
            "rollout.filter_on='accuracy' or rollout.pair_reward asks for it. Return 'correct', or "
            "set --rollout.filter-on reward and --rollout.pair-reward 0."
        )
    judged = replies.correct if settings.filter_on == "accuracy" else paid(replies, settings)
    low = np.where(valid, judged, np.inf).min(-1)
    high = np.where(valid, judged, -np.inf).max(-1)
    signal = high > low
    match settings.pair_filter:
        case "none":
            return replies.asked.any(1)
        case "any":
            return signal.any(1)
        case "both":
            return (signal | ~replies.asked).all(1) & replies.asked.any(1)
    raise ValueError(f"pair_filter is {settings.pair_filter!r}; choose any, both or none")


def trees(
    replies: Replies,
    advantage: Float[np.ndarray, "pairs 2 G"],
    valid: Bool[np.ndarray, "pairs 2 G"],
) -> list[list[layout.Tree]]:
    """Each prompt with its replies as branches; the trees of a pair are one group, an empty one
    where its question is another process's."""
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

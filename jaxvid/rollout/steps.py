"""Pairs of steps for pDPO: which steps of a reply hang on what is seen, and what they lead to.

For each policy question, on its own clip (video-SALMONN-o1, https://arxiv.org/abs/2502.11775):

  1. sample `paths` replies; go on with the questions that the model fails;
  2. cut a reply into its steps, and take the `top` steps that change most when the clip is
     slightly perturbed: d(s) = mean over the step's tokens y of
     KL(P(y | before, clip) || P(y | before, clip~))
  3. behind each of these steps' prefix, sample alternatives of the step;
  4. p of an alternative is the share right of `rollouts` replies that go on from it.

    question | step 1 \\n | step 2 \\n                  a path: steps, then the answer
                        | another step 2 \\n          alternatives behind one prefix, with their p
                                          | ... answer    its rollouts

Alternatives become preferences behind their prefix; right and wrong paths become preferences of
whole replies. What stands after the last separator is the answer, and no step; the paper asks for
it in a turn of its own. A path is compared if it ended by itself. Everything drawn comes from the
seed and names, so a record gives the same pairs whatever stands beside it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxvid.data import layout, pipeline
from jaxvid.data.layout import Tree
from jaxvid.data.records import Example, Record, Response
from jaxvid.rollout import contrast, sampler
from jaxvid.rollout.sampler import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is sampled, and what is made of it. Where the paper is silent the numbers are ours."""

    separator: str = "<end_of_step>"  # the text that ends a step; it belongs to the step
    paths: int = 10  # replies to each question
    # Which questions are kept: those whose greedy reply is not right, or with any path not right.
    keep: Literal["failed", "any_wrong"] = "failed"
    stepped: int = 1  # paths of a question whose steps are compared; wrong ones are taken first
    top: int = 3  # steps of such a path, by d
    alternatives: int = 4  # of a step, the path's own among them
    rollouts: int = 6  # from each alternative
    path_pairs: int = 4  # most pairs of a right and a wrong path of a question
    ties: bool = False  # keep pairs of equal p, which soft labels can learn from
    noise: int = 100  # step of the diffusion whose noise perturbs the clip; 0 to 999
    sampling: Sampling = Sampling(max_tokens=256)  # of paths and rollouts
    step_tokens: int = 64  # most tokens of an alternative
    rows: int = 32  # prompts at a time
    records: int = 16  # records at a time; a kill loses at most these
    limit: int = 0  # only the first so many records; 0 is all

    def __post_init__(self):
        if not self.separator:
            raise ValueError("steps.separator is empty; give the text that ends a step")
        if self.keep not in ("failed", "any_wrong"):
            raise ValueError(f"steps.keep is {self.keep!r}; choose failed or any_wrong")
        least = {"paths": 2, "alternatives": 2, "path_pairs": 0, "noise": 0, "limit": 0}
        least |= dict.fromkeys(("stepped", "top", "rollouts", "step_tokens", "rows", "records"), 1)
        bad = [f"{k} {vars(self)[k]}, want at least {n}" for k, n in least.items()]
        bad = [text for text, (k, n) in zip(bad, least.items()) if vars(self)[k] < n]
        if self.noise >= contrast.DIFFUSION:
            bad.append(f"noise {self.noise}, want less than {contrast.DIFFUSION}")
        if self.sampling.temperature <= 0:
            bad.append("sampling.temperature 0 (greedy), want above 0: replies must differ")
        if bad:
            raise ValueError("steps: " + "; ".join(bad))


Right = Callable[[Record, Example, str], bool]  # whether a reply to a record's question is right


class Parts(NamedTuple):
    """What pairs are made with. `perturb` is a hook of `pipeline.Builder.frames`."""

    model: nnx.Module
    builder: pipeline.Builder
    perturb: Callable[[UInt8[np.ndarray, "F h w 3"], str], UInt8[np.ndarray, "F h w 3"]]
    right: Right
    settings: Settings
    seed: int
    mesh: Mesh | None = None


class Made(NamedTuple):
    """What became of a record: its preferences, what is known of each by name, and counts."""

    record: str
    examples: list[Example]
    notes: dict[str, Any]
    tally: Counter


class Reply(NamedTuple):
    text: str
    ended: bool  # by a stop token, not by the limit
    right: bool


class _Asked(NamedTuple):
    record: Record
    example: Example
    tree: Tree

    @property
    def name(self) -> str:
        return f"{self.record.id}\0{self.example.name}"


class _Step(NamedTuple):
    """A step of a path that is to be compared."""

    asked: _Asked
    path: int
    index: int
    prefix: str
    text: str
    divergence: float
    tree: Tree  # whose prompt ends with the prefix

    @property
    def name(self) -> str:
        return f"{self.asked.name}\0{self.path}\0{self.index}"


# The text of a reply ------------------------------------------------------------------------------


def split(text: str, separator: str) -> tuple[list[str], str]:
    """(steps, each with its separator; what stands after the last one)."""
    *steps, rest = text.split(separator)
    return [step + separator for step in steps], rest


def cut(text: str, separator: str) -> tuple[str, bool]:
    """The text up to and with its first separator, and whether there is one."""
    step, found, _ = text.partition(separator)
    return step + found, bool(found)


# Pairs --------------------------------------------------------------------------------------------


def check(found: Sequence[Record], right: Right) -> None:
    """Raise ValueError for a question that no pair can be made of, before anything is sampled."""
    for record in found:
        asked = [e for e in record.examples if e.task == "policy"]
        if not asked:
            raise ValueError(
                f"record {record.id!r} has no policy question; name shards that hold examples of "
                "task 'policy'"
            )
        for e in asked:
            if e.media < 0 or record.media[e.media].kind == "audio":
                raise ValueError(
                    f"record {record.id!r}, example {e.name!r}: there is no picture to perturb. "
                    "Steps are chosen by what is seen; leave such questions out of these shards"
                )
            right(record, e, "")  # a reward says here that it cannot read the right answer


def make(parts: Parts, found: Sequence[Record]) -> list[Made]:
    """The pairs of some records, in their order. See the head of this file."""
    builder, tally = parts.builder, {r.id: Counter() for r in found}
    asked = [_Asked(r, q.examples[0], q.trees[0]) for r in found for q in builder.alone(r)]
    kept = _failed(parts, asked, tally)
    steps = _steps(parts, kept, tally)
    examples: dict[str, list[Example]] = {r.id: [] for r in found}
    notes: dict[str, dict[str, Any]] = {r.id: {} for r in found}
    for question, paths in kept:
        pairs = path_examples(question.example, paths, parts.settings, tally[question.record.id])
        examples[question.record.id] += pairs
    for step, weighed in zip(steps, _weighed(parts, steps, tally)):
        name, count = step.asked.record.id, tally[step.asked.record.id]
        made = step_example(step, weighed, parts.settings, count)
        if made is not None:
            examples[name].append(made)
            notes[name][made.name] = {
                "divergence": step.divergence,
                "rollouts": parts.settings.rollouts,
            }
    return [Made(r.id, examples[r.id], notes[r.id], tally[r.id]) for r in found]


def _failed(
    parts: Parts, asked: list[_Asked], tally: dict[str, Counter]
) -> list[tuple[_Asked, list[Reply]]]:
    """The questions that are kept, with their paths."""
    settings, trees = parts.settings, [q.tree for q in asked]
    failed = [True] * len(asked)
    if settings.keep == "failed":
        greedy = dataclasses.replace(settings.sampling, temperature=0.0)
        replies = _draw(parts, asked, trees, [f"{q.name}\0greedy" for q in asked], greedy, 1)
        failed = [not reply.right for (reply,) in replies]
    for question, wrong in zip(asked, failed):
        tally[question.record.id]["questions"] += 1
        if not wrong:
            tally[question.record.id]["left out: greedy reply right"] += 1
    asked = [q for q, wrong in zip(asked, failed) if wrong]
    names = [f"{q.name}\0paths" for q in asked]
    trees = [q.tree for q in asked]
    kept = []
    drawn = _draw(parts, asked, trees, names, settings.sampling, settings.paths)
    for question, paths in zip(asked, drawn):
        count = tally[question.record.id]
        count["paths"] += len(paths)
        count["paths right"] += sum(p.right for p in paths)
        if all(p.right for p in paths):
            count["left out: every path right"] += 1
            continue
        count["kept"] += 1
        kept.append((question, paths))
    return kept


def _draw(
    parts: Parts,
    asked: Sequence[_Asked],
    trees: Sequence[Tree],
    names: Sequence[str],
    sampling: Sampling,
    group: int,
    before: Sequence[str] = (),
) -> list[list[Reply]]:
    """`group` replies from each tree, graded with what was said `before` them."""
    if not trees:
        return []
    out = sampler.generate_all(
        parts.model,
        trees,
        parts.builder.chat,
        sampling,
        group=group,
        keys=sampler.named_keys(jax.random.key(parts.seed), names),
        rows=parts.settings.rows,
        mesh=parts.mesh,
    )
    found = []
    for i, question in enumerate(asked):
        texts = [parts.builder.chat.decode(t[:n]) for t, n in zip(out.tokens[i], out.length[i])]
        whole = [(before[i] if before else "") + text for text in texts]
        right = [parts.right(question.record, question.example, text) for text in whole]
        found.append([Reply(*r) for r in zip(texts, map(bool, out.ended[i]), right)])
    return found


def _steps(
    parts: Parts, kept: list[tuple[_Asked, list[Reply]]], tally: dict[str, Counter]
) -> list[_Step]:
    """The steps to compare: of each question's `stepped` paths, the `top` by divergence."""
    settings, chat = parts.settings, parts.builder.chat
    noisy = dataclasses.replace(parts.builder, frames=parts.perturb)
    records = {q.record.id: q.record for q, _ in kept}
    other = {
        (name, q.examples[0].name): q.trees[0]
        for name, r in records.items()
        for q in noisy.alone(r)
    }
    cuts, clean, noised = [], [], []
    for question, paths in kept:
        chosen = usable(paths, settings)
        if not chosen:
            tally[question.record.id]["left out: no finished path in steps"] += 1
        for g in chosen:
            texts, rest = split(paths[g].text, settings.separator)
            pieces = [chat.response(t, after=k > 0, ends=False) for k, t in enumerate(texts)]
            tokens = np.concatenate([*pieces, chat.response(rest, after=True)])
            branch = layout.Branch(tokens, np.ones(len(tokens), bool))
            cuts.append((question, g, texts, pieces))
            clean.append(question.tree._replace(branches=(branch,)))
            there = other[question.record.id, question.example.name]
            noised.append(there._replace(branches=(branch,)))
    found = contrast.divergences(parts.model, clean, noised, rows=settings.rows, mesh=parts.mesh)
    steps = []
    for (question, g, texts, pieces), values in zip(cuts, found):
        ends = np.cumsum([len(p) for p in pieces])
        means = [float(values[e - len(p) : e].mean()) for p, e in zip(pieces, ends)]
        told = [k for k, text in enumerate(texts) if text.removesuffix(settings.separator).strip()]
        tally[question.record.id]["steps"] += len(told)
        for i in contrast.select([means[k] for k in told], settings.top):
            k = told[i]
            prefix = "".join(texts[:k])
            tree = _after(parts, question.tree, prefix)
            steps.append(_Step(question, g, k, prefix, texts[k], means[k], tree))
    return steps


def usable(paths: Sequence[Reply], settings: Settings) -> list[int]:
    """Which paths' steps are compared: finished ones that have a step, wrong ones first."""
    fit = [i for i, p in enumerate(paths) if p.ended and _starts(p.text)]
    fit = [i for i in fit if split(paths[i].text, settings.separator)[0]]
    return sorted(fit, key=lambda i: (paths[i].right, i))[: settings.stepped]


def _starts(text: str) -> bool:
    """Whether a reply may start so: with a word, since the template's pieces are cut there."""
    return bool(text) and text == text.lstrip()


def _after(parts: Parts, tree: Tree, said: str) -> Tree:
    return layout.extend(tree, parts.builder.chat.response(said, ends=False)) if said else tree


def _weighed(parts: Parts, steps: list[_Step], tally: dict[str, Counter]) -> list[list[Response]]:
    """The alternatives of each step with their expected correctness."""
    settings = parts.settings
    short = dataclasses.replace(settings.sampling, max_tokens=settings.step_tokens)
    asked, trees = [s.asked for s in steps], [s.tree for s in steps]
    names = [f"{s.name}\0alternatives" for s in steps]
    drawn = _draw(
        parts, asked, trees, names, short, settings.alternatives - 1, [s.prefix for s in steps]
    )
    found: list[list[Response]] = [[] for _ in steps]
    going: list[tuple[int, int]] = []  # (step, alternative) that must be rolled out
    for i, (step, replies) in enumerate(zip(steps, drawn)):
        count = tally[step.asked.record.id]
        told = {step.text}
        found[i].append(Response(step.text, ends=False))
        going.append((i, 0))
        for reply in replies:
            text, whole = cut(reply.text, settings.separator)
            fault = ""
            if not (whole or reply.ended):
                fault = "longer than step_tokens"
            elif not text.removesuffix(settings.separator).strip():
                fault = "blank"
            elif not step.prefix and not _starts(text):
                fault = "starts with white space"
            elif text in told:
                fault = "drawn before"
            if fault:
                count[f"alternatives left out: {fault}"] += 1
                continue
            told.add(text)
            if whole:
                going.append((i, len(found[i])))
            # A reply that ends without a separator is finished: nothing is left to roll out.
            value = None if whole else float(reply.right)
            found[i].append(Response(text, value=value, ends=not whole))
    going = [(i, a) for i, a in going if len(found[i]) > 1]
    said = [steps[i].prefix + found[i][a].text for i, a in going]
    trees = [_after(parts, steps[i].asked.tree, text) for (i, _), text in zip(going, said)]
    names = [f"{steps[i].name}\0{a}" for i, a in going]
    asked = [steps[i].asked for i, _ in going]
    rolled = _draw(parts, asked, trees, names, settings.sampling, settings.rollouts, said)
    for (i, a), replies in zip(going, rolled):
        value = sum(r.right for r in replies) / len(replies)
        found[i][a] = dataclasses.replace(found[i][a], value=value)
        tally[steps[i].asked.record.id]["rolled out"] += 1
        tally[steps[i].asked.record.id]["p"] += value
    return found


def step_example(
    step: _Step, weighed: list[Response], settings: Settings, tally: Counter
) -> Example | None:
    """The best alternative against the others; None where there is nothing to compare."""
    if len(weighed) < 2:
        tally["steps left out: no other alternative"] += 1
        return None
    best = max(weighed, key=lambda r: r.value)
    others = [r for r in weighed if r is not best and (settings.ties or r.value < best.value)]
    if not others:
        tally["steps left out: alternatives equally good"] += 1
        return None
    tally["step pairs"] += len(others)
    tally["steps compared"] += 1
    as_ = lambda r, role: dataclasses.replace(r, role=role)
    return _preference(
        step.asked.example,
        f"path {step.path} step {step.index}",
        (as_(best, "chosen"), *(as_(r, "rejected") for r in others)),
        step.prefix,
    )


def path_examples(
    question: Example, paths: Sequence[Reply], settings: Settings, tally: Counter
) -> list[Example]:
    """Right replies against wrong ones: the i-th different right one and the i-th wrong one."""
    fit = [p for p in paths if p.ended and p.text.strip() and _starts(p.text)]
    tally["paths left out: cut off, blank or after white space"] += len(paths) - len(fit)
    right = list(dict.fromkeys(p.text for p in fit if p.right))
    wrong = list(dict.fromkeys(p.text for p in fit if not p.right))
    pairs = list(zip(right, wrong))[: settings.path_pairs]
    tally["path pairs"] += len(pairs)
    return [
        _preference(question, f"paths {i}", (Response(a, "chosen"), Response(b, "rejected")))
        for i, (a, b) in enumerate(pairs)
    ]


def _preference(
    question: Example, name: str, responses: tuple[Response, ...], prefix: str = ""
) -> Example:
    return dataclasses.replace(
        question,
        name=f"{question.name}/{name}",
        task="preference",
        responses=responses,
        prefix=prefix,
    )

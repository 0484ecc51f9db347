"""What a row of benchmarks/gpu.py is: a model, trees of tokens, and the useful work in them.

Useful is what either side has to do: each prompt once with its replies, in tokens and in FLOPs. A
side that repeats a prompt for each reply does more, and is not paid for it; nor is recomputation.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks import rollout
from benchmarks.rollout import Job
from jaxvid.batch import Batch
from jaxvid.data import layout
from jaxvid.models import decoder, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.models.lora import LoRA
from launch.ahead import published

KINDS = ("sft", "dpo", "dna", "rollout")
BETA = 0.1  # of DPO
RATE, CLIP, BETAS = 1e-5, 1.0, (0.9, 0.95)  # of AdamW, without decay
LOW, HIGH = 0.2, 0.28  # clips of the policy's ratio


class Model(NamedTuple):
    base: str  # the published model whose shapes it has; "" is the tiny one
    rank: int  # of LoRA on the decoder; 0 trains all of the decoder
    dtype: str  # of what is computed and of what is frozen; what is trained is float32


class Sizes(NamedTuple):
    job: Job
    rows: int  # of SFT
    prompts: int  # of DPO; DNA has the two of a pair, a rollout one


MODELS = {
    "3b": Model("Qwen/Qwen2.5-VL-3B-Instruct", 0, "bfloat16"),
    "7b": Model("Qwen/Qwen2.5-VL-7B-Instruct", 16, "bfloat16"),
    "tiny": Model("", 0, "float32"),
    "tiny-lora": Model("", 4, "float32"),
    "tiny-half": Model("", 0, "bfloat16"),
    "tiny-half-lora": Model("", 4, "bfloat16"),
}
LARGE = Sizes(Job((8, 32, 32), 64, 8, 256), 4, 2)  # 16 frames of 448 x 448: 2,048 tokens of video
TINY = Sizes(Job((2, 8, 8), 8, 4, 3), 2, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures."""

    model: str
    kind: str
    side: str
    repeats: int
    micro: int  # sequences in one forward pass of torch

    @property
    def of(self) -> Model:
        return MODELS[self.model]

    @property
    def sizes(self) -> Sizes:
        return LARGE if self.of.base else TINY

    @property
    def lora(self) -> LoRA:
        return LoRA(rank=self.of.rank, alpha=2.0 * self.of.rank) if self.of.rank else LoRA()


def config(case: Case) -> qwen25vl.Config:
    """Every layer is computed again in the backward pass."""
    if case.of.base:
        cfg = published.read("", case.of.base)
    else:
        text = decoder.Config(
            layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=96, rope_sections=(1, 1, 2)
        )
        sees = {"patch": 4, "window": 16}  # four windows a frame
        tower = vision.Config(layers=2, width=32, ffn=48, heads=2, out=32, full=(1,), **sees)
        cfg = rollout.made(text, tower, case.of.dtype)
    return dataclasses.replace(cfg, compute=Compute(dtype=case.of.dtype, remat="full"))


# ---- tokens


def trees(case: Case, cfg: qwen25vl.Config) -> list[layout.Tree]:
    """The prompts of a step with their replies: one, a chosen and a rejected, or a group. Each has
    a clip of its own. The old log-probs of a policy are those of a model that knows nothing."""
    job, many = case.sizes.job, {"sft": case.sizes.rows, "dpo": case.sizes.prompts, "dna": 2}
    replies = {"sft": 1, "dpo": 2, "dna": job.group, "rollout": 0}[case.kind]
    old = np.full(job.reply, -np.log(cfg.text.vocab), np.float32)
    rng, out = np.random.default_rng(1), []
    for i in range(many.get(case.kind, 1)):
        branches = tuple(
            layout.Branch(
                rng.integers(6, 64, job.reply).astype(np.int32),
                np.ones(job.reply, bool),
                branch=g,
                mate=int(case.kind == "dpo" and g == 1),
                advantage=float(rng.normal()),
                old=old,
            )
            for g in range(replies)
        )
        tree = rollout.prompt(job, cfg, seed=i)._replace(branches=branches)
        out.append(layout.numbered(tree, record=i, pair=0))
    return out


def batch(grown: list[layout.Tree]) -> Batch:
    """A tree a row, in one micro-batch without a place to spare."""
    need, rows = layout.size(grown[0]), len(grown)
    budget = layout.Budget(
        rows=rows,
        tokens=need.tokens,
        scored=need.scored,
        branches=need.branches,
        frames=need.frames,
        patches=layout.most_patches(grown[0]),
    )
    return layout.stack([layout.rows(grown, budget)])


def tokens(case: Case, grown: list[layout.Tree]) -> int:
    """Useful tokens of a step: prompts once, and replies. Of a rollout: those drawn."""
    if case.kind == "rollout":
        return case.sizes.job.group * case.sizes.job.reply
    return sum(layout.size(t).tokens for t in grown)


# ---- FLOPs of matrix products


def seen(tree: layout.Tree) -> int:
    """Pairs of a token and one that it sees: those before it on its own path, and itself."""
    p, pairs = len(tree.prompt), 0
    for start, n in [(0, p), *((s.depth, s.end - s.start) for s in layout.spans(tree))]:
        pairs += n * start + n * (n + 1) // 2
    return pairs


def decoder_flops(text: decoder.Config, tokens: int, pairs: int, scored: int) -> int:
    """Forward; the table of words meets scored tokens alone."""
    heads = (text.heads + text.kv_heads) * text.head
    products = 2 * text.width * heads + 3 * text.width * text.ffn
    layer = 2 * tokens * products + 4 * pairs * text.heads * text.head
    return text.layers * layer + 2 * scored * text.width * text.vocab


def tower_flops(cfg: vision.Config, tree: layout.Tree) -> int:
    """Forward, of the tree's clips."""
    total, W, inner = 0, cfg.width, cfg.width * cfg.merge**2
    for clip in tree.clips:
        frames, q, values = clip.patches.shape
        window, full = (np.bincount(clip.window) ** 2).sum(), len(cfg.full)
        pairs = int(full * q**2 + (cfg.layers - full) * window)
        patch = values * W + cfg.layers * (4 * W**2 + 3 * W * cfg.ffn)
        merged = q // cfg.merge**2 * inner * (inner + cfg.out)
        total += frames * (2 * q * patch + 4 * pairs * W + 2 * merged)
    return total


def flops(case: Case, cfg: qwen25vl.Config, grown: list[layout.Tree]) -> int | None:
    """Useful FLOPs of a step. Of what is trained the backward pass is two forward passes, of frozen
    weights behind something trained one (no gradient of the weights), of the frozen tower none. A
    reference is one more forward pass of the decoder. Adapters are not counted. None for rollouts,
    where reading weights takes the time."""
    if case.kind == "rollout":
        return None
    forward = 0
    for t in grown:
        need = layout.size(t)
        forward += decoder_flops(cfg.text, need.tokens, seen(t), need.scored)
    passes = (2 if case.of.rank else 3) + (case.kind == "dpo")
    return passes * forward + sum(tower_flops(cfg.vision, t) for t in grown)

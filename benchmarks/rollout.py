"""Rollouts of one video prompt against `transformers`' generate: tokens per second, cache memory.

    python -m benchmarks.rollout                   about 10 minutes and 10 GB

A Qwen2.5-VL of random weights with Qwen2.5-0.5B's text stack and a small tower, in the same dtype
on both sides; a prompt of P tokens, most of them a video's; G replies of R tokens, which nothing
ends early. Ours is `rollout.sampler.generate` (prefill once, one cache for the group). Theirs is
`generate` with `num_return_sequences`: a batch of G, with the dynamic and with the static cache, of
which the faster counts. Both draw at temperature 1 from all words. Every run is whole: tower,
prefill, R tokens. Runs go in turns in one process. Needs torch and transformers.

Cache memory is the bytes of keys and values that each side holds when the replies are done.
"""

import argparse
import functools
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks import measure
from benchmarks.measure import MIB, Row
from jaxvid.data import layout
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.models.layers import DTYPES, Compute
from jaxvid.rollout import groups, sampler
from jaxvid.rollout.sampler import Sampling

VIDEO = 5  # id that stands for a token of video


class Job(NamedTuple):
    """A prompt of a clip of `grid` patches (time, height, width) and `text` tokens; its replies."""

    grid: tuple[int, int, int]
    text: int
    group: int
    reply: int


def published(dtype: str) -> qwen25vl.Config:
    """Qwen2.5-0.5B's text stack behind a tower of 6 layers of 512."""
    text = decoder.Config(
        layers=24,
        width=896,
        ffn=4864,
        heads=14,
        kv_heads=2,
        vocab=151_936,
        rope_sections=(8, 12, 12),
    )
    tower = vision.Config(layers=6, width=512, ffn=1536, heads=8, out=896, full=(2, 5))
    return made(text, tower, dtype)


def small(dtype: str) -> qwen25vl.Config:
    """What a test runs."""
    text = decoder.Config(
        layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
    )
    tower = vision.Config(layers=1, width=32, ffn=48, heads=2, out=32, full=(0,))
    return made(text, tower, dtype)


def made(text: decoder.Config, tower: vision.Config, dtype: str) -> qwen25vl.Config:
    return qwen25vl.Config(
        text=text,
        vision=tower,
        tied=True,
        image_token_id=4,
        video_token_id=VIDEO,
        vision_start_token_id=2,
        vision_end_token_id=3,
        bos_token_id=0,
        eos_token_id=1,
        compute=Compute(dtype=dtype, remat="none"),
    )


def prompt(job: Job, cfg: qwen25vl.Config, seed: int = 0) -> layout.Tree:
    """A random clip between the marks of a video, then text."""
    rng, (t, h, w) = np.random.default_rng(seed), job.grid
    words, pads = rng.integers(6, 64, job.text - 2), [cfg.video_token_id] * (t * h * w // 4)
    marks = [cfg.vision_start_token_id], pads, [cfg.vision_end_token_id]
    ids = np.concatenate([words[:1], *marks, words[1:]])
    patches = rng.integers(0, 256, (t, h * w, cfg.vision.patch_values)).astype(np.uint8)
    return layout.tree(
        "benchmark",
        ids,
        qwen25vl.positions(ids, [job.grid], [1.0], cfg),
        cfg.prompting.vision,
        clips=[layout.Clip(patches, job.grid)],
        seen=layout.in_order(ids == cfg.video_token_id),
    )


# ---- ours


def ours(job: Job, model: nnx.Module, tree: layout.Tree):
    """(run, bytes of the caches). The model's weights are in the type it computes in."""
    graph, kept = nnx.split(model)
    how = Sampling(max_tokens=job.reply)
    budget = layout.Budget(
        rows=1,
        tokens=len(tree.prompt),
        scored=0,
        branches=0,
        frames=job.grid[0],
        patches=job.grid[1] * job.grid[2],
    )
    inputs, keys = layout.prompts([tree], budget), jax.random.split(jax.random.key(0), 1)
    never = (model.cfg.text.vocab,)  # an id that is no word

    def run():
        out = sampler.generate(
            model, *inputs, group=job.group, sampling=how, stop_ids=never, keys=keys
        )
        assert int(out.length.min()) == job.reply
        return out.tokens

    setup = groups.Setup(graph, job.group, how, never, ())
    fill = lambda p, k: groups.begin(setup, 0, p, inputs, k)
    slots = jax.eval_shape(fill, kept, keys)
    return run, sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((slots.prompt, slots.branch))
    )


def whole(cfg: qwen25vl.Config) -> nnx.Module:
    """Random weights, in the type that the model computes in."""
    loaded = hf.initialise(cfg, 0)
    return nnx.merge(
        loaded.graph, jax.tree.map(lambda x: x.astype(cfg.compute.dtype), loaded.params)
    )


def compare(job: Job, cfg: qwen25vl.Config, repeats: int) -> list[Row]:
    from benchmarks import peer  # the other functions of this file need no torch

    tree = prompt(job, cfg)
    mine, bytes_mine = ours(job, whole(cfg), tree)
    their, held = peer.sampled(job, peer.build(cfg, cfg.compute.dtype), cfg, tree)
    kinds = ("dynamic", "static")
    runs = {"ours": mine} | {kind: functools.partial(their, kind) for kind in kinds}
    mine()
    for kind in kinds:
        their(kind, 1, 2)  # to warm up; all of it takes minutes
    took = measure.seconds(runs, repeats, warm=0)
    best = min(kinds, key=took.__getitem__)
    count, bytes_theirs = job.group * job.reply, held[best]
    speed = {name: count / t for name, t in took.items()}
    sizes = f"P = {len(tree.prompt)}, G = {job.group}, R = {job.reply}, {cfg.compute.dtype}"
    sides = "ours / theirs, dynamic cache / static cache"
    each = " / ".join(f"{speed[name]:.2f}" for name in ("ours", *kinds))
    held_by = f"{bytes_mine / MIB:.2f} / {bytes_theirs / MIB:.2f}"
    return [
        Row(f"{sizes}: tokens per second, {sides}", each),
        measure.at_least(f"times faster than {best}", speed["ours"] / speed[best], 2.0),
        Row(f"cache, MiB, ours / theirs ({best})", held_by),
        measure.at_most("cache, ours / theirs", bytes_mine / bytes_theirs, 1 / 3),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a model and a clip for tests")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--reply", type=int, default=64, help="R")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="", help="file to write the table to")
    args = parser.parse_args(argv)
    # 960 tokens of video and 64 of text; a test has 18 and 8
    grid, text = ((2, 6, 6), 8) if args.tiny else ((15, 16, 16), 64)
    cfg = small(args.dtype) if args.tiny else published(args.dtype)
    rows = compare(Job(grid, text, args.group, args.reply), cfg, args.repeats)
    measure.table(rows, args.out)


if __name__ == "__main__":
    main()

"""A whole DNA-Train step (sample, pay, weigh, learn) against the same step without prompt sharing.

    python -m benchmarks.dna               about 5 minutes on two cores

Pairs of questions on a clip: a prompt of P tokens, nearly all of them video; G replies of R tokens,
to both clips of each pair. Both steps run train/policy.py. Shared: a prompt is encoded once, its
cache is one copy, and it is laid out once with its G replies. Not shared: it is sampled as G
prompts and trained as G sequences, each with its own clip. A small Qwen2.5-VL of the real classes,
float32.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks import measure
from benchmarks.measure import Row
from jaxvid import rewards
from jaxvid.data import chat, layout, pipeline, records
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.objectives.advantages import Duality
from jaxvid.objectives.policy import Policy
from jaxvid.rollout import sampler
from jaxvid.train import groups, policy, state, step

SIDE = 16  # tokens of a frame, high and wide
TEXT = 64  # tokens of a prompt that are not video


@dataclasses.dataclass(frozen=True)
class Sizes:
    prompt: int = 1024
    reply: int = 64
    group: int = 8
    pairs: int = 1
    layers: int = 4
    width: int = 256


def config(folder: pathlib.Path, sizes: Sizes) -> qwen25vl.Config:
    """The real classes; the tokenizer's own ids."""
    ids = hf.tiny_config("qwen2_5_vl", folder)
    W, heads = sizes.width, 4
    eighth = W // heads // 8
    text = decoder.Config(
        layers=sizes.layers,
        width=W,
        ffn=W * 11 // 4,
        heads=heads,
        kv_heads=2,
        vocab=ids.text.vocab,
        rope_sections=(eighth, eighth + eighth // 2, 2 * eighth - eighth // 2),
    )
    tower = vision.Config(layers=2, width=W // 2, ffn=W, heads=4, out=W, full=(1,))
    return dataclasses.replace(ids, text=text, vision=tower)


def question(i: int, cfg: qwen25vl.Config, sizes: Sizes) -> pipeline.Prompts:
    """A pair's two prompts on random clips."""
    rng, look = np.random.default_rng(i), cfg.prompting.vision
    frames = (sizes.prompt - TEXT) // SIDE**2
    grid = (frames, SIDE * look.merge, SIDE * look.merge)
    text = rng.integers(300, 400, sizes.prompt - frames * SIDE**2)
    prompt = np.concatenate([text[:4], np.full(frames * SIDE**2, cfg.video_token_id), text[4:]])
    examples = [records.Example(f"q {s}", "policy", s, "?", ("a", "b"), "A") for s in (0, 1)]
    trees = []
    for _ in examples:
        size = (frames, grid[1] * grid[2], 3 * look.temporal * look.patch**2)
        patches = rng.integers(0, 256, size, np.uint8)
        trees.append(
            layout.tree(
                f"pair {i}",
                prompt.astype(np.int32),
                qwen25vl.positions(prompt, [grid], [1.0], cfg),
                look,
                clips=[layout.Clip(patches, grid)],
                seen=layout.in_order(prompt == cfg.video_token_id),
            )
        )
    record = records.Record(f"pair {i}", "train", (), tuple(examples), licence="-")
    return pipeline.Prompts(record, trees, examples)


class Endless:
    """The same questions again and again."""

    def __init__(self, questions: list[pipeline.Prompts]):
        self.each: Iterator[pipeline.Prompts] = itertools.cycle(questions)

    def __next__(self) -> pipeline.Prompts:
        return next(self.each)

    def get_state(self) -> None:
        return None

    def set_state(self, state: None) -> None:
        raise NotImplementedError("a benchmark does not resume")


def vowels(case: rewards.Case, text: str) -> rewards.Reward:
    """Something that differs between replies."""
    share = sum(c in "aeiou" for c in text) / max(len(text), 1)
    return rewards.Reward(share, 0.0, float(share > 0.2))


def drawn_apart(draw, model, trees, words, sampling, *, group, keys, rows=0, mesh=None, done):
    """`sampler.generate_all` where every reply is a prompt of its own."""
    many = [t for t in trees for _ in range(group)]
    own = jax.vmap(lambda k: jax.random.split(k, group))(keys).reshape(-1)
    how = {"group": 1, "keys": own, "rows": rows, "mesh": mesh}
    out = draw(model, many, words, sampling, **how)
    out = sampler.Rollouts(*(x.reshape(len(trees), group, *x.shape[2:]) for x in out))
    for i in range(len(trees)):
        done(i, sampler.Rollouts(*(x[i : i + 1] for x in out)))
    return out


def grown_apart(grow, replies, advantage, valid):
    """`groups.trees` where every reply is a sequence of its own."""
    made = grow(replies, advantage, valid)
    return [[t._replace(branches=(b,)) for t in group for b in t.branches] for group in made]


@contextlib.contextmanager
def apart():
    """Inside, nothing is shared."""
    draw, grow, check = sampler.generate_all, groups.trees, groups.check
    sampler.generate_all = functools.partial(drawn_apart, draw)
    groups.trees = functools.partial(grown_apart, grow)
    groups.check = lambda *args: None  # it counts on rows that hold a group
    try:
        yield
    finally:
        sampler.generate_all, groups.trees, groups.check = draw, grow, check


def parts(loaded: hf.Loaded, tx, words: chat.Chat, sizes: Sizes, mesh: Mesh, shared: bool):
    """A policy run; rows without a place to spare."""
    cfg, g = loaded.cfg, sizes.group if shared else 1
    questions = [question(i, cfg, sizes) for i in range(sizes.pairs)]
    need = layout.size(questions[0].trees[0])
    budget = layout.Budget(
        rows=2 if shared else 2 * sizes.group,
        tokens=sizes.prompt + g * sizes.reply,
        scored=g * sizes.reply,
        branches=g,
        frames=need.frames,
        patches=layout.most_patches(questions[0].trees[0]),
    )
    settings = groups.Settings(
        group=sizes.group,
        sampling=sampler.Sampling(max_tokens=sizes.reply),
        pair_filter="none",
        max_refills=0,
        table_every=0,
    )
    return policy.Parts(
        settings,
        loaded.graph,
        words,
        policy.Questions(Endless(questions), sizes.pairs),
        step.make_step(loaded.graph, Policy(), tx),
        step.make_score(loaded.graph),
        vowels,
        Duality(),
        budget,
        mesh,
    )


class Run:
    """A state of its own that updates move on."""

    def __init__(self, loaded: hf.Loaded, words: chat.Chat, sizes: Sizes, shared: bool):
        tx, self.shared, self.mesh = optax.adamw(1e-5), shared, measure.one_device()
        self.parts = parts(loaded, tx, words, sizes, self.mesh, shared)
        self.update = policy.make_update(self.parts, 0)
        params = jax.tree.map(lambda x: x.copy(), loaded.params)
        self.state = state.create(params, tx, self.mesh)
        self.laps: list[dict[str, float]] = []

    def __call__(self):
        with contextlib.nullcontext() if self.shared else apart(), jax.set_mesh(self.mesh):
            self.state, metrics = self.update(self.state, next(self.parts.stream))
        self.laps.append(metrics)
        return self.state.step


def compare(sizes: Sizes, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        text = [" ".join(f"word{i}" for i in range(400))]
        chat.build_tokenizer(text, 640, folder)
        loaded = hf.initialise(config(folder, sizes), 0)
        words = chat.Chat(folder, loaded.cfg.prompting.markers)
        runs = {n: Run(loaded, words, sizes, n == "shared") for n in ("shared", "apart")}
        took = measure.seconds(runs, repeats)
    sizes_ = f"P = {sizes.prompt}, R = {sizes.reply}, G = {sizes.group}, {sizes.pairs} pair(s)"
    rows = [
        Row(
            f"{sizes_}: seconds of a DNA step, shared / not shared",
            f"{took['shared']:.2f} / {took['apart']:.2f}",
        ),
        measure.at_least("times faster", took["apart"] / took["shared"], 3.0),
    ]
    for phase in ("rollout", "update"):
        of = {n: np.median([lap[f"time/{phase}"] for lap in r.laps[1:]]) for n, r in runs.items()}
        rows.append(Row(f"{phase}, s", f"{of['shared']:.2f} / {of['apart']:.2f}"))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="", help="file to write the table to")
    args = vars(parser.parse_args(argv))
    repeats, out = args.pop("repeats"), args.pop("out")
    measure.table(compare(Sizes(**args), repeats), out)


if __name__ == "__main__":
    main()

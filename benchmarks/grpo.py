"""A GRPO step of ours against google-tunix's, on a text-only model of equal size and tokens.

    python -m venv /tmp/tunix && /tmp/tunix/bin/pip install google-tunix==0.1.7
    python -m benchmarks.grpo --tunix /tmp/tunix/bin/python         about 10 minutes on two cores

Two prompts of P tokens with G replies of R tokens each: sample, pay, weigh, one AdamW step;
float32, no reference model, every tensor of the same shape. Each side runs in a process of its own,
in turns; a figure is the median of all its steps but the first, which compiles. Memory is the most
that was resident, less what was before the first step (imports and weights).
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import dna, measure
from benchmarks.measure import MIB, Row
from benchmarks.tree import config
from jaxvid.data import chat, layout, media, pipeline, records
from jaxvid.models import hf
from jaxvid.models.layers import Compute
from jaxvid.objectives.advantages import GRPO
from jaxvid.objectives.policy import Policy
from jaxvid.rollout import sampler
from jaxvid.train import groups, policy, state, step

TEXT = {"layers": 4, "width": 256, "ffn": 704, "heads": 4, "kv_heads": 2, "vocab": 4096}
TUNIX = pathlib.Path(__file__).with_name("_tunix_worker.py")


def question(i: int, sizes: dict[str, Any]) -> pipeline.Prompts:
    """Two prompts of text, as the two sides of a pair."""
    rng, trees, P = np.random.default_rng(i), [], sizes["prompt"]
    for _ in range(2):
        ids = rng.integers(300, 400, P).astype(np.int32)
        positions = np.broadcast_to(np.arange(P)[None], (3, P))
        trees.append(layout.tree(f"pair {i}", ids, positions, media.Vision()))
    examples = [records.Example(f"q {s}", "policy", s, "?", ("a", "b"), "A") for s in (0, 1)]
    record = records.Record(f"pair {i}", "train", (), tuple(examples), licence="-")
    return pipeline.Prompts(record, trees, examples)


def ours(sizes: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and memory."""
    P, R, G = sizes["prompt"], sizes["reply"], sizes["group"]
    eighth = sizes["text"]["width"] // sizes["text"]["heads"] // 8
    cfg = config(**sizes["text"], rope_sections=(eighth, eighth, 2 * eighth))
    cfg = dataclasses.replace(cfg, tied=True, compute=Compute(remat="none"))
    with tempfile.TemporaryDirectory() as made:
        chat.build_tokenizer(["some words"], 320, made)
        words = chat.Chat(pathlib.Path(made))
    loaded, tx, mesh = hf.initialise(cfg, 0), optax.adamw(1e-5), measure.one_device()
    text = loaded.params["decoder"]
    stream = policy.Questions(dna.Endless([question(0, sizes)]), 1)
    parts = policy.Parts(
        groups.Settings(
            group=G,
            sampling=sampler.Sampling(max_tokens=R),
            pair_filter="none",
            max_refills=0,
            table_every=0,
        ),
        loaded.graph,
        words,
        stream,
        step.make_step(
            loaded.graph, Policy(clip_high=0.2, dual_clip=None, aggregation="sequence"), tx
        ),
        step.make_score(loaded.graph),
        dna.vowels,
        GRPO(),
        layout.Budget(rows=2, tokens=P + G * R, scored=G * R, branches=G, frames=0, patches=4),
        mesh,
    )
    update, laps = policy.make_update(parts, 0), []
    count = sum(x.size for x in jax.tree.leaves(text))
    with jax.set_mesh(mesh):
        now = state.create(loaded.params, tx, mesh)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with jax.set_mesh(mesh):
        for _ in range(sizes["repeats"] + 1):
            start = time.perf_counter()
            now, _ = update(now, next(stream))
            jax.block_until_ready(now.step)
            laps.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"seconds": laps[1:], "peak": peak * 1024, "before": before * 1024}
    return told | {"parameters": int(count)}


def run(command: list[str], sizes: dict[str, Any]) -> dict[str, Any]:
    """What a worker told in its last line."""
    done = subprocess.run([*command, json.dumps(sizes)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(tunix: str, sizes: dict[str, Any], turns: int) -> list[Row]:
    commands = {
        "ours": [sys.executable, "-m", "benchmarks.grpo", "--worker"],
        "tunix": [tunix, str(TUNIX)],
    }
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(turns):
        for name, command in commands.items():
            told[name].append(run(command, sizes))
    counts = {name: runs[0]["parameters"] for name, runs in told.items()}
    if counts["ours"] != counts["tunix"]:
        raise RuntimeError(f"the two models are not of one size: {counts}")
    took = {n: statistics.median(s for r in runs for s in r["seconds"]) for n, runs in told.items()}
    held = {n: min(r["peak"] - r["before"] for r in runs) / MIB for n, runs in told.items()}
    P, R, G = sizes["prompt"], sizes["reply"], sizes["group"]
    return [
        Row(
            f"P = {P}, R = {R}, G = {G}, 2 prompts, {counts['ours'] / 1e6:.1f} M parameters: "
            "seconds of a GRPO step, ours / tunix",
            f"{took['ours']:.2f} / {took['tunix']:.2f}",
        ),
        measure.at_least("times faster", took["tunix"] / took["ours"], 1.0),
        Row("memory of the steps, MiB, ours / tunix", f"{held['ours']:.0f} / {held['tunix']:.0f}"),
        measure.at_most("memory, ours / tunix", held["ours"] / held["tunix"], 1.0),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help="JSON of the sizes: run our side alone")
    parser.add_argument("--tunix", default=sys.executable, help="a Python that has google-tunix")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", default="", help="file to write the table to")
    args = parser.parse_args(argv)
    if args.worker:
        with contextlib.redirect_stdout(sys.stderr):
            told = ours(json.loads(args.worker))
        print(json.dumps(told))
        return
    sizes = {"text": TEXT, "prompts": 2, "prompt": args.prompt, "reply": args.reply}
    sizes |= {"group": args.group, "repeats": args.repeats}
    measure.table(compare(args.tunix, sizes, args.turns), args.out)


if __name__ == "__main__":
    main()

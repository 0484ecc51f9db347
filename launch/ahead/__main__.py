"""The process of `jaxvid-launch preflight`: libtpu reads its settings as it is loaded, and a
compiler that stops hard must not take the command with it.

    python -m launch.ahead '{"config": "dna_7b_sft", ...}'
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxvid import config, runs, sharding
from launch.ahead import chips, programs, published, tell, weigh
from launch.preflight import Preflight


def check(asked: Preflight) -> dict[str, Any]:
    """Compile and weigh what is asked for; the result as plain JSON.

    Raises ValueError for what no slice could run, ImportError without libtpu.
    """
    module = runs.recipe(asked.config.partition(":")[0])
    told = vars(module)
    flags = [word for pair in asked.set for word in _flag(pair)]
    run = runs.load_config(asked.config, flags, "jaxvid-launch preflight")
    if not isinstance(run, config.Run):
        raise ValueError(f"{asked.config} is no recipe of training; preflight takes those alone")
    named = asked.topology or told.get("TOPOLOGY", "")
    if not named:
        raise ValueError("the recipe names no TOPOLOGY; give --topology, such as v5p:4x4x4")
    # A slice of the command line is one, whatever the recipe's are.
    slices = asked.slices or (1 if asked.topology else told.get("SLICES", 1))
    topology = chips.read(named, slices)
    cfg = published.read(run.model, asked.base or told.get("BASE", ""))
    plan = programs.plan(run, cfg, topology)
    weights = []
    for program in _programs(plan, asked.programs):
        weights.append(w := weigh.weigh(program, topology, plan.mesh))
        print(f"{w.program} compiled in {w.compiled:.0f} s", flush=True)
    about = {
        "recipe": pathlib.Path(asked.config.partition(":")[0]).stem,
        "set": list(asked.set),
        "topology": str(topology),
        "chips": topology.size,
        "mesh": dict(plan.mesh.shape),
        "model": run.model,
        "rows": run.data.budget.rows,
        "tokens": run.data.budget.tokens,
        "programs": [_plain(run, w, topology) for w in weights],
        "arrays": weigh.arrays(plan),
        "search": {},
        "versions": chips.versions(),
    }
    if asked.search:
        about["search"][asked.search] = _search(run, cfg, topology, asked.search, weights)
    return about


def _programs(plan: programs.Plan, names: Sequence[str]):
    """Those asked for, lowered one by one as they are taken."""
    if "train" in names:
        yield programs.train(plan)
    if "rollout" in names and isinstance(plan.run, config.PolicyRun) and not plan.run.server.url:
        yield from programs.rollout(plan)


def _plain(run: config.Run, w: weigh.Weight, topology: chips.Topology) -> dict[str, Any]:
    out = dataclasses.asdict(w) | {"knobs": [] if w.fits else weigh.knobs(run, w, topology)}
    if w.seconds:
        out |= {"bound": w.bound, "least": w.least, "most": w.most}
        out |= {"mfu_best": w.mfu(w.least), "mfu_worst": w.mfu(w.most)}
    return out


def _search(run, cfg, topology, what: str, weights: list[weigh.Weight]):
    """(largest, what was tried), of rows of a micro-batch or of tokens of a row."""
    budget = run.data.budget
    start = budget.rows if what == "rows" else budget.tokens
    sizes = chips.sizes(topology, {a: vars(run)[a] for a in sharding.AXES})
    step = sizes["replica"] * sizes["fsdp"] if what == "rows" else 512

    def need(n: int) -> float:
        if n == start and weights and weights[0].program == "train":
            return weights[0].need
        changed = {"rows": n} if what == "rows" else _longer(budget, n)
        data = dataclasses.replace(run.data, budget=dataclasses.replace(budget, **changed))
        other = programs.plan(dataclasses.replace(run, data=data), cfg, topology)
        found = weigh.weigh(programs.train(other), topology, other.mesh)
        print(f"{what} {n}: {found.need / chips.GIB:.2f} GiB a chip", flush=True)
        return found.need

    best, tried = weigh.search(need, start, step, topology.chip.hbm)
    return best, sorted(tried.items())


def _longer(budget, tokens: int) -> dict[str, int]:
    """A row of so many tokens, its frames and sound in proportion."""
    grown = lambda n: -(-n * tokens // budget.tokens)
    return {"tokens": tokens, "frames": grown(budget.frames), "chunks": grown(budget.chunks)}


def _flag(pair: str) -> list[str]:
    name, given, value = pair.partition("=")
    if not given:
        raise ValueError(f"--set {pair}: write it as NAME=VALUE, such as data.budget.rows=16")
    return [f"--{name}", *value.split(",")]


def main(words: list[str]) -> int:
    """One argument, the request as JSON. Exit code 3: something does not fit."""
    asked = Preflight(**json.loads(words[0]))
    try:
        found = check(asked)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"jaxvid-launch preflight: {error}", file=sys.stderr)
        return 1
    print(tell.report(found))
    if asked.out:
        out = pathlib.Path(asked.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwrote {out}")
    return 0 if all(w["fits"] for w in found["programs"]) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Arms of one recipe over seeds, from one start, on the same pairs: is the difference real?

Every arm and seed is a run of its own in WORKDIR/<arm>-<seed>, with its evaluation; finished
ones are kept, so an interrupted ablation goes on. The difference of two arms is taken pair by pair,
averaged over seeds, and its interval is a bootstrap over pairs.
"""

import dataclasses
import json
import pathlib

import numpy as np
from jaxtyping import Float

from jaxvid import runs
from jaxvid.config import EvalRun, PolicyRun
from jaxvid.eval import run as evaluation

RESAMPLES = 10_000


def run(recipe: str, overrides: list[str], seeds: int, workdir: pathlib.Path) -> str:
    """Train and evaluate all arms; writes WORKDIR/ablation.json and returns its table.

    Raises ValueError if the recipe names no arms or there are fewer than two seeds.
    """
    path, *variants = recipe.split(":")
    arms = runs.arms_of(runs.recipe(path))
    if not arms:
        raise ValueError(f"{path} has no ARMS; name a recipe that compares some, as ablation_dna")
    if seeds < 2:
        raise ValueError(f"--seeds {seeds}: a difference over seeds needs at least 2")
    both: dict[str, list] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            name = ":".join([path, *variants, arm])
            out = workdir / f"{arm}-{seed}"
            both[arm].append(_one(name, [*overrides, "--seed", str(seed)], out))
    result = summary({arm: np.array(rows, np.float64) for arm, rows in both.items()})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    return table(result)


def _one(name: str, overrides: list[str], out: pathlib.Path) -> list[bool]:
    """Train and evaluate one arm with one seed: whether both sides of each pair were right."""
    if not (out / "eval" / "none" / "results.json").exists():
        print(f"--- {name} {overrides[-1]}", flush=True)
        run = runs.load_config(name, overrides, "jaxvid ablate")
        if not isinstance(run, PolicyRun):
            raise ValueError(f"{name} is a {type(run).__name__}; an ablation wants a PolicyRun")
        runs.train(run, out)
        test = EvalRun(
            model=str(out / "model"),
            compute=run.compute,
            data=dataclasses.replace(run.data, split="test"),
            ask=evaluation.Settings(max_tokens=run.rollout.sampling.max_tokens, rows=100),
        )
        runs.evaluate(test, out / "eval")
    correct, _ = evaluation.outcomes(evaluation.load(out / "eval" / "none"))
    return correct.all(axis=1).tolist()


def summary(both: dict[str, Float[np.ndarray, "seeds pairs"]], *, seed: int = 0) -> dict:
    """Mean, spread over seeds, and paired differences of every two arms with 95 % intervals."""
    rng = np.random.default_rng(seed)
    (count, pairs), *_ = {b.shape for b in both.values()}
    picks = rng.integers(pairs, size=(RESAMPLES, pairs))
    arms = {
        arm: {
            "both": float(b.mean()),
            "seeds": b.mean(axis=1).tolist(),
            "std_over_seeds": float(b.mean(axis=1).std(ddof=1)),
        }
        for arm, b in both.items()
    }
    differences = []
    names = list(both)
    for i, before in enumerate(names):
        for after in names[i + 1 :]:
            apart = (both[after] - both[before]).mean(axis=0)
            low, high = np.quantile(apart[picks].mean(axis=1), [0.025, 0.975])
            row = {"after": after, "before": before, "difference": float(apart.mean())}
            differences.append(row | {"low": float(low), "high": float(high)})
    return {"seeds": count, "pairs": pairs, "arms": arms, "differences": differences}


def table(result: dict) -> str:
    """The summary as Markdown."""
    lines = [f"Both on {result['pairs']} held-out pairs, {result['seeds']} seeds.", ""]
    lines += ["| arm | Both, mean | std over seeds | by seed |", "|---|---|---|---|"]
    percent = lambda xs: ", ".join(f"{x:.1%}" for x in xs)
    for arm, a in result["arms"].items():
        spread = f"{a['std_over_seeds']:.1%}"
        lines.append(f"| {arm} | {a['both']:.1%} | {spread} | {percent(a['seeds'])} |")
    lines += ["", "| difference | points | 95 % interval over pairs |", "|---|---|---|"]
    for d in result["differences"]:
        told = f"| {d['after']} - {d['before']} | {d['difference'] * 100:+.1f} "
        lines.append(f"{told}| {d['low'] * 100:+.1f} to {d['high'] * 100:+.1f} |")
    return "\n".join(lines)

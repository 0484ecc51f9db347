"""The stages of the local pipeline: what each runs, how it is known to be done, what it found."""

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from launch.local import Local

CONTROLS = ("none", "blank", "shuffled")
BASE = "@checkpoints/tiny_base"
SIZES = {False: (1200, 60, 300), True: (16, 8, 8)}  # fast -> train, validation, test pairs
TRAIN = {
    "sft": "SFT on both sides of each pair",
    "dpo": "DPO on three axes of statements",
    "dna": "RL with duality-normalised advantages",
}


class Stage(NamedTuple):
    name: str
    what: str
    commands: list[list[str]]  # arguments of `python -m`
    done: pathlib.Path  # exists once the stage is finished
    finding: Callable[[], str] | None = None  # a line on what it found


def stages(args: "Local") -> list[Stage]:
    work = args.workdir
    train, validation, test = SIZES[args.fast]
    forge = [
        "data_gen.build",
        "procedural",
        "--out",
        str(work / "shards"),
        "--train",
        str(train),
        "--validation",
        str(validation),
        "--test",
        str(test),
        "--seed",
        str(args.seed),
        "--workers",
        str(0 if args.fast else args.workers),  # a process takes longer to start than 16 pairs
    ]
    plan = [
        Stage(
            "forge",
            f"{train} + {validation} + {test} pairs of the laptop world",
            [forge],
            work / "shards" / "forged.json",
            lambda: _counts(work / "shards"),
        )
    ]
    if args.videos is not None:
        footage = [
            "data_gen.build",
            "visual",
            "--videos",
            str(args.videos),
            "--out",
            str(work / "footage"),
            "--seed",
            str(args.seed),
        ]
        plan.append(
            Stage(
                "footage",
                f"visual edits of the clips in {args.videos}",
                [footage],
                work / "footage" / "forged.json",
                lambda: _counts(work / "footage"),
            )
        )
    plan.append(_evaluation(args, "base", BASE))
    for name, start in (("sft", BASE), ("dpo", f"{work}/sft/model"), ("dna", f"{work}/sft/model")):
        plan.append(_training(args, name, start))
        plan.append(_evaluation(args, name, f"{work}/{name}/model"))
    report = ["jaxvid.main", "report", str(work)]
    plan.append(Stage("report", "one HTML file", [report], work / "report.html"))
    return plan


def _training(args: "Local", name: str, start: str) -> Stage:
    work = args.workdir
    config = f"tiny_{name}:runlocal" if args.fast else f"tiny_{name}"
    shards = [str(work / "shards")]
    if args.videos is not None and name == "sft":  # footage has questions, no preferences
        shards.append(str(work / "footage"))
    command = [
        "jaxvid.main",
        "train",
        config,
        "--workdir",
        str(work / name),
        "--model",
        start,
        "--seed",
        str(args.seed),
        "--data.shards",
        *shards,
        "--data.cache",
        str(work / "frames"),
        "--validation.shards",
        str(work / "shards"),
    ]
    return Stage(
        name,
        TRAIN[name],
        [command],
        work / name / "model" / "config.json",
        lambda: _last_line(work / name / "metrics.jsonl"),
    )


def _evaluation(args: "Local", name: str, model: str) -> Stage:
    out = args.workdir / name / "eval"
    command = [
        *("jaxvid.main", "eval", "tiny_eval:runlocal" if args.fast else "tiny_eval"),
        *("--workdir", str(out), "--model", model, "--controls", *CONTROLS),
        *("--data.shards", str(args.workdir / "shards")),
        *("--data.cache", str(args.workdir / "frames")),
    ]
    what = "held-out pairs, with blank and shuffled frames"
    done = out / CONTROLS[-1] / "results.json"
    return Stage(f"{name}: evaluation", what, [command], done, lambda: _accuracy(out))


def _counts(folder: pathlib.Path) -> str:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    told = [f"{sum(e['records'] for e in files)} {split}" for split, files in splits.items()]
    size = sum(e["bytes"] for files in splits.values() for e in files) / 1e6
    return f"{', '.join(told)} records, {size:.0f} MB"


def _last_line(log: pathlib.Path) -> str:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    names = ("loss", "reward", "rewards/accuracies", "eval_loss", "eval_both")
    last = {n: r[n] for r in rows for n in names if r.get(n) is not None}
    return f"step {rows[-1]['step']}: " + ", ".join(f"{n} {x:.3f}" for n, x in last.items())


def _accuracy(out: pathlib.Path) -> str:
    told = []
    for control in CONTROLS:
        overall = json.loads((out / control / "results.json").read_text())["overall"]
        told.append(f"{control} {overall['both']['value']:.1%}")
    return "Both: " + ", ".join(told)

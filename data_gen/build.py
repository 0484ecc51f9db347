"""jaxvid-forge: one verb per pipeline that makes training data.

    jaxvid-forge procedural --out DIR [--train 3000 --validation 100 --test 300 --seed 0]
    jaxvid-forge sound --out DIR [--train 1500 --validation 60 --test 200 --mix.show intervened]
    jaxvid-forge visual --videos DIR --out DIR [--edits 4]
    jaxvid-forge pasta --shards DIR --out DIR [--adversaries bend --across]
    jaxvid-forge practice --out DIR [--train 12000]
    jaxvid-forge utr --shards DIR --out DIR [--scale 100]
    jaxvid-forge steps --shards DIR --out DIR
    jaxvid-forge tokenizer --shards DIR --out MODEL_DIR [--vocab 512]

Every record is a function of seed, split and index, so workers may render in any order and an
interrupted run continues with the first shard that is missing.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Iterator
from typing import Literal

import tyro
from tqdm import tqdm

from data_gen import pasta, practice, sources, steps, utr, visual
from data_gen.procedural import hear
from data_gen.procedural.make import CHUNK, Mix, chunk
from data_gen.procedural.scene import Settings
from jaxvid.data import chat, media, shards
from jaxvid.data.records import Record

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Procedural:
    """Render duality pairs of the laptop world, with their questions and preferences."""

    out: pathlib.Path  # folder of shards to write
    train: int = 3000  # records per split; 0 leaves a split out
    validation: int = 100
    test: int = 300
    seed: int = 0
    workers: int = 2  # processes that render; 0 renders in this one
    settings: Settings = Settings()
    mix: Mix = Mix()

    def __post_init__(self):
        for split in SPLITS:
            if vars(self)[split] < 0:
                raise ValueError(f"--{split} {vars(self)[split]}: give at least 0 records")


@dataclasses.dataclass(frozen=True)
class Sound:
    """Clips whose sound is shifted, muted or swapped, with probes, answers and preferences."""

    out: pathlib.Path  # folder of shards to write
    train: int = 1500  # records per split; 0 leaves a split out
    validation: int = 60
    test: int = 200
    seed: int = 0
    workers: int = 2  # processes that render; 0 renders in this one
    settings: hear.Picture = hear.Picture()
    mix: hear.Mix = hear.Mix()

    def __post_init__(self):
        for split in SPLITS:
            if vars(self)[split] < 0:
                raise ValueError(f"--{split} {vars(self)[split]}: give at least 0 records")


def rendered(args: Procedural | Sound, split: str, done: int = 0) -> Iterator[Record]:
    """Records of a split in order from number `done` on, rendered by a pool of processes."""
    count = vars(args)[split]
    bounds = [(i, min(i + CHUNK, count)) for i in range(done - done % CHUNK, count, CHUNK)]
    with tqdm(total=count, initial=done, desc=f"forge {split}", unit="record") as bar:
        number = done - done % CHUNK
        for records in _in_order(args, split, bounds):
            for record in records:
                if number >= done:
                    bar.update()
                    yield record
                number += 1


def _in_order(args: Procedural | Sound, split: str, bounds: list) -> Iterator[list[Record]]:
    make = chunk if isinstance(args, Procedural) else hear.chunk
    tasks = [(args.seed, split, *b, args.settings, args.mix) for b in bounds]
    if not args.workers:
        yield from (make(*t) for t in tasks)
        return
    # Fresh interpreters: forking a process that has started threads (JAX, PyAV) can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        waiting = [pool.submit(make, *t) for t in tasks[: 2 * args.workers]]
        for i in range(len(tasks)):
            yield waiting.pop(0).result()
            if i + 2 * args.workers < len(tasks):
                waiting.append(pool.submit(make, *tasks[i + 2 * args.workers]))


def procedural(args: Procedural | Sound) -> None:
    """Writes the splits that are missing. Raises SystemExit if the folder is of other settings."""
    made = _plain({k: v for k, v in vars(args).items() if k not in ("out", "workers")})
    path = args.out / "forge.json"
    if path.exists() and (before := json.loads(path.read_text())) != made:
        changed = [
            f"{k}: {before.get(k)} there, {made[k]} now" for k in made if before.get(k) != made[k]
        ]
        raise SystemExit(
            f"{args.out} was made with other settings ({'; '.join(changed)}). Give another --out, "
            "or the settings of before."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1))
    for split in SPLITS:
        if made[split] == 0:
            continue
        if split in shards.splits(args.out):
            print(f"{split}: {made[split]} records are there")
            continue
        resume = json.dumps(made, sort_keys=True)
        done = shards.resumable(args.out, split=split, resume=resume)
        shards.write(args.out, rendered(args, split, done), split=split, resume=resume)
    (args.out / "forged.json").write_text(json.dumps(made, indent=1))
    told = ", ".join(f"{made[s]} {s}" for s in SPLITS)
    print(f"wrote {told} records to {args.out}")


def _plain(value):
    """JSON of settings: dataclasses as objects, tuples as lists."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


@dataclasses.dataclass(frozen=True)
class Visual:
    """Duality pairs of your own clips: one visual edit each, by OpenCV; the sound stays."""

    videos: pathlib.Path  # folder of clips, read with all that lies below it
    out: pathlib.Path
    edits: int = 4  # pairs made of each clip
    seed: int = 0
    licence: str = "unstated"  # of the clips; written into every record
    max_pixels: int = 65_536  # most pixels of a stored frame; 0 keeps the size

    def __post_init__(self):
        if self.edits < 1:
            raise ValueError(f"--edits {self.edits}: make at least one pair of a clip")


def footage(args: Visual) -> None:
    """Writes the train split. A clip that cannot be used goes to unreadable.jsonl with its reason.

    Raises SystemExit if no clip can be used.
    """
    if (args.out / "forged.json").exists():
        print(f"{args.out} is there")
        return
    faults: list[dict[str, str]] = []
    try:
        written = shards.write(args.out, _edited(args, faults), split="train", replace=True)
    except (FileNotFoundError, shards.ShardError) as error:
        told = "".join(f"\n  {f['clip']}: {f['reason']}" for f in faults[:5])
        raise SystemExit(f"jaxvid-forge visual: {error}{told}") from error
    if faults:
        lines = "".join(json.dumps(f) + "\n" for f in faults)
        (args.out / "unreadable.jsonl").write_text(lines)
        print(f"{len(faults)} clips cannot be used; reasons in {args.out / 'unreadable.jsonl'}")
    (args.out / "forged.json").write_text(json.dumps(_plain(_texts(args)), indent=1))
    print(f"wrote {written.records} pairs to {args.out}")


def _texts(args: "Visual | Pasta") -> dict:
    return {k: str(v) for k, v in vars(args).items()}


def _edited(args: Visual, faults: list[dict[str, str]]) -> Iterator[Record]:
    found = list(sources.named(args.videos))
    for name, path in tqdm(found, desc="forge visual", unit="clip"):
        try:
            data = path.read_bytes()
            for i in range(args.edits):
                record_id = f"footage/{name}-{i}"
                yield visual.record(
                    args.seed,
                    record_id,
                    data,
                    split="train",
                    licence=args.licence,
                    max_pixels=args.max_pixels,
                )
        except (media.MediaError, ValueError, OSError) as error:
            faults.append({"clip": str(path), "reason": str(error)})


@dataclasses.dataclass(frozen=True)
class Pasta:
    """Adversarial preferences and probes on the clips of the laptop world (VideoPASTA)."""

    shards: pathlib.Path  # that `jaxvid-forge procedural` wrote
    out: pathlib.Path
    adversaries: Literal["swap", "bend"] = "swap"  # true of another clip, or the truth bent
    specific: bool = True  # also a preference on each axis, between two replies
    across: bool = False  # also the chosen words about the pair's other clip, as a rejected reply
    train: int = 0  # records per split at most; 0 is all there are
    validation: int = 0
    test: int = 0
    seed: int = 0


def adversarial(args: Pasta) -> None:
    """Writes the splits that the shards have. Raises SystemExit if the folder is made already."""
    if (args.out / "forged.json").exists():
        raise SystemExit(f"{args.out} is there; give another --out, or remove it")
    how = pasta.How(args.seed, args.adversaries, args.specific, args.across)
    for split in shards.splits(args.shards):
        source = shards.Source(str(args.shards), split)
        count = vars(args)[split] if split in SPLITS else 0
        some = [source[i] for i in range(min(count, len(source)))] if count else source
        written = shards.write(args.out, pasta.records(some, how), split=split, replace=True)
        print(f"wrote {written.records} {split} records to {args.out}")
    (args.out / "forged.json").write_text(json.dumps(_texts(args), indent=1))


@dataclasses.dataclass(frozen=True)
class Practice:
    """Reading practice without clips, for a base model trained from nothing."""

    out: pathlib.Path
    train: int = 12000  # records
    seed: int = 0


def reading(args: Practice) -> None:
    written = shards.write(
        args.out, practice.records(args.seed, "train", args.train), split="train", replace=True
    )
    print(f"wrote {written.records} records to {args.out}")


@dataclasses.dataclass(frozen=True)
class Steps:
    """The laptop world's questions of choice with replies in steps, on the same clips."""

    shards: pathlib.Path  # of `procedural`
    out: pathlib.Path


def stepwise(args: Steps) -> None:
    """Writes the splits that are missing. Raises SystemExit for shards of another kind."""
    for split in shards.splits(args.shards):
        if split in shards.splits(args.out):
            print(f"{split} is there")
            continue
        source = shards.Source(str(args.shards), split)
        made = steps.records(source[i] for i in range(len(source)))
        try:
            written = shards.write(args.out, made, split=split)
        except ValueError as error:
            raise SystemExit(f"jaxvid-forge steps: {error}") from error
        print(f"wrote {written.records} {split} records to {args.out}")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Train a ChatML tokenizer on the texts of some shards, for a model trained from nothing."""

    shards: pathlib.Path
    out: pathlib.Path
    vocab: int = 512  # tokens at most, special ones included
    records: int = 500  # how many records are read


def tokenizer(args: Tokenizer) -> None:
    source = shards.Source(str(args.shards), "train")
    texts = [
        text
        for i in range(min(len(source), args.records))
        for example in source[i].examples
        for text in (example.prompt, *(r.text for r in example.responses))
    ]
    chat.build_tokenizer(texts, args.vocab, args.out)
    print(f"wrote a tokenizer of {chat.Chat(args.out).size} tokens to {args.out}")


@dataclasses.dataclass(frozen=True)
class Utr:
    """Video-UTR's dialogues of the trajectories that some shards carry, both ways."""

    shards: pathlib.Path  # records with meta["tracks"], or of the laptop world; every split is read
    out: pathlib.Path
    seed: int = 0
    asking: tyro.conf.OmitArgPrefixes[utr.Asking] = utr.Asking()


def trajectories(args: Utr) -> None:
    """Writes every split. A record without tracks goes to untracked.jsonl with the reason.

    Raises SystemExit if a split is there, or none of its records has tracks.
    """
    lines, count = [], 0
    for split in shards.splits(args.shards):
        source, faults = shards.Source(str(args.shards), split), []
        known = utr.pool((source[i] for i in range(len(source))), args.asking, args.seed)
        bar = tqdm(range(len(source)), f"forge utr {split}", unit="record")
        made = utr.records((source[i] for i in bar), known, args.asking, args.seed, faults)
        try:
            count += shards.write(args.out, made, split=split).records
        except shards.ShardError as error:
            raise SystemExit(f"jaxvid-forge utr: {error}\n{''.join(faults[:5])}") from error
        lines += faults
    if not count:
        raise SystemExit(f"jaxvid-forge utr: {args.shards} has no finished split; make it first")
    if lines:
        (args.out / "untracked.jsonl").write_text("".join(lines))
        print(f"{len(lines)} records left out; reasons in {args.out / 'untracked.jsonl'}")
    print(f"wrote {count} records to {args.out}")


VERBS = {
    Procedural: procedural,
    Sound: procedural,
    Visual: footage,
    Pasta: adversarial,
    Practice: reading,
    Utr: trajectories,
    Steps: stepwise,
    Tokenizer: tokenizer,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `jaxvid-forge`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {kind.__name__.lower(): kind for kind in VERBS},
        prog="jaxvid-forge",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    VERBS[type(command)](command)


if __name__ == "__main__":
    main()

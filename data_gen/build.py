"""jaxvid-forge: one verb per pipeline that makes training data.

    jaxvid-forge procedural --out DIR [--train 3000 --validation 100 --test 300 --seed 0]
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

import tyro
from tqdm import tqdm

from data_gen.procedural.make import CHUNK, Mix, chunk
from data_gen.procedural.scene import Settings
from jaxvid.data import chat, shards
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


def rendered(args: Procedural, split: str, done: int = 0) -> Iterator[Record]:
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


def _in_order(args: Procedural, split: str, bounds: list) -> Iterator[list[Record]]:
    tasks = [(args.seed, split, *b, args.settings, args.mix) for b in bounds]
    if not args.workers:
        yield from (chunk(*t) for t in tasks)
        return
    # Fresh interpreters: forking a process that has started threads (JAX, PyAV) can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        waiting = [pool.submit(chunk, *t) for t in tasks[: 2 * args.workers]]
        for i in range(len(tasks)):
            yield waiting.pop(0).result()
            if i + 2 * args.workers < len(tasks):
                waiting.append(pool.submit(chunk, *tasks[i + 2 * args.workers]))


def procedural(args: Procedural) -> None:
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


VERBS = {Procedural: procedural, Tokenizer: tokenizer}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `jaxvid-forge`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {verb.__name__: kind for kind, verb in VERBS.items()},
        prog="jaxvid-forge",
        description=__doc__,
        args=sys.argv[1:] if argv is None else argv,
    )
    VERBS[type(command)](command)


if __name__ == "__main__":
    main()

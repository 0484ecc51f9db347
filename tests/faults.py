"""Runs of `jaxvid train` that are killed, starved and lied to, and must end as if they were not.

This file is the recipe of the runs (arms sft, dpo and rl), the process that is harmed, and the
harness that harms it. Kinds of faults:

  kill     SIGKILL at a random moment, also while the process starts
  save     SIGKILL while a checkpoint is being written
  term     SIGTERM at a random moment; the process must save, say at which step, and exit 143
  disk     the disk is full from a random moment on; the process must end with an error
  shard    a shard is cut off while it is read; the process must end with an error that names it,
           as must one that is started while the shard is broken
  clock    the clock jumps by up to a day before every update, until SIGKILL

python tests/faults.py ROOT   reads commands and makes a process of each, which writes to said.txt.
It has imported what they need, and has not started JAX: a process is a fork, and begins at once.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pairs

from jaxvid import config, main, runs
from jaxvid.data import chat, layout, pipeline, records, shards
from jaxvid.models import hf
from jaxvid.models.layers import Compute
from jaxvid.objectives.policy import Policy
from jaxvid.rewards import Function
from jaxvid.rollout.sampler import Sampling
from jaxvid.train import metrics
from jaxvid.train.optimizers import AdamW

ARMS = ("sft", "dpo", "rl")
KINDS = ("kill", "save", "term", "disk", "shard", "clock")
STEPS, EVERY, RECORDS, UPDATE = 12, 2, 7, 0.05  # UPDATE: seconds that an update lasts at least
HERE = pathlib.Path(__file__).resolve()


# The recipe ---------------------------------------------------------------------------------------


def get_config(runlocal: bool = False, arm: str = "sft"):
    kind = {"sft": config.SFTRun, "dpo": config.PreferenceRun, "rl": config.PolicyRun}[arm]
    task = {"sft": "sft", "dpo": "preference", "rl": "policy"}[arm]
    budget = layout.Budget(rows=2, tokens=192, scored=48, branches=8, frames=4, patches=16)
    more = {}
    if arm == "rl":
        more = {
            "reward": Function(path="faults:paid"),
            "objective": Policy(kl_coef=0.01),
            "rollout": config.Rollout(
                group=2,
                sampling=Sampling(max_tokens=3),
                pair_filter="any",
                filter_on="reward",
                max_refills=1,
                max_dead=0,
                table_every=1,
            ),
            "ask": None,
        }
    return kind(
        model="",
        compute=Compute(remat="none"),
        data=pipeline.Data(
            shards=("",), tasks=(task,), budget=budget, pairs=3, sampling=pairs.SAMPLING
        ),
        optimizer=AdamW(lr=1e-2),
        steps=STEPS,
        log_every=1,
        checkpoint_every=EVERY,
        **more,
    )


def paid(case, reply: str) -> float:
    """A reward that a random model earns now and then."""
    return float(sum(map(ord, reply)) % 3)


def make(root: pathlib.Path) -> None:
    """The model and the shards that all runs read."""
    say = records.Response

    def record(i: int) -> records.Record:
        examples = []
        for side, (right, wrong) in enumerate((pairs.OPTIONS[:2], pairs.OPTIONS[1::-1])):
            answers = (say(wrong, "rejected", "spatial"), say(right, "chosen"))
            examples += [
                records.Example(f"s{side}", "sft", side, "What happens?", responses=(say(right),)),
                records.Example(f"d{side}", "preference", side, "And now?", responses=answers),
                records.Example(f"p{side}", "policy", side, pairs.ASKED, pairs.OPTIONS, "AB"[side]),
            ]
        clips = (pairs.clip(160 - 5 * i, 10), pairs.clip(90 + 5 * i, -10))
        held = tuple(records.Media(f"m{j}", "video", c, 1.0) for j, c in enumerate(clips))
        # Larger than what a reader keeps, so that a shard that is cut is missed at once.
        meta = {"noise": random.Random(i).randbytes(60_000).hex()}
        return records.Record(f"pair {i}", "train", held, tuple(examples), meta, {}, "CC0-1.0")

    found = (record(i) for i in range(RECORDS))
    shards.write(root / "shards", found, split="train", shard_records=RECORDS // 2 + 1)
    texts = [pairs.ASKED, *pairs.REPLIES, "What happens? And now?"]
    chat.build_tokenizer(texts, 320, root / "model")
    base = hf.initialise(pairs.config(root), 0)
    shutil.move(root / "model", root / "words")
    hf.save(root / "model", base.cfg, base.params, like=root / "words", dtype="float32")


# The process --------------------------------------------------------------------------------------


def child(root: str, clock: str, limit: str, *stages: str) -> int:
    """Train each (workdir, arm) to its end by the command; says what each update was given."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", f"{root}/cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    train, honest = runs.loop.train, time.time
    drawn = random.Random(int(clock))

    def watched(state, update, stream, settings, workdir, **options):
        seen = pathlib.Path(workdir) / "seen.jsonl"
        if seen.exists():  # a full disk cuts a line off
            seen.write_bytes(b"".join(x for x in seen.open("rb") if x.endswith(b"\n")))

        def slow(state, item):
            start = time.perf_counter()
            if int(clock):
                jump = drawn.uniform(-86400, 86400)
                time.time = lambda: honest() + jump
            line = {"place": stream.get_state(), "item": digest(item)}
            state, values = update(state, item)
            jax.block_until_ready(state)
            with seen.open("a") as file:
                file.write(json.dumps(line) + "\n")
            time.sleep(max(0.0, UPDATE - (time.perf_counter() - start)))
            return state, values

        result = train(state, slow, stream, settings, workdir, **options)
        if not result.interrupted:
            leaves = jax.device_get(jax.tree.leaves(result.state))
            np.savez(pathlib.Path(workdir) / "end.npz", *leaves)
        return result

    runs.loop.train = watched
    given = ["--model", f"{root}/model", "--data.shards", f"{root}/shards"]
    for workdir, arm in zip(stages[::2], stages[1::2]):
        code = main.main(["train", f"{HERE}:{arm}", "--workdir", workdir, *given])
        if code:
            return code
    return 0


def digest(item) -> str:
    """What an update was given: the content of a batch, or the questions."""
    if isinstance(item, list):
        return "; ".join(f"{q.record.id} {[e.name for e in q.examples]}" for q in item)
    sums = hashlib.sha256()
    for leaf in jax.tree.leaves(item):
        sums.update(leaf.tobytes())
    return sums.hexdigest()


def nursery(root: str) -> None:
    """For every line, which is a command, fork a process; tell its id, and its exit code."""
    said = f"{root}/said.txt"
    chat.Chat(f"{root}/model")  # imports what reads it
    runs.load_config(f"{HERE}:sft", [])
    for line in sys.stdin:
        if not (number := os.fork()):
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.exit(child(*json.loads(line)))
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


class Process:
    """One of a nursery's processes; a nursery has one at a time."""

    def __init__(self, nursery: subprocess.Popen, command: list[str]):
        self.nursery, self.code = nursery, None
        nursery.stdin.write(json.dumps(command).encode() + b"\n")
        self.number = int(nursery.stdout.readline())

    def poll(self) -> int | None:
        if self.code is None and select.select([self.nursery.stdout], [], [], 0)[0]:
            self.code = int(self.nursery.stdout.readline())
        return self.code

    def send(self, kind: int) -> None:
        if self.poll() is None:
            os.kill(self.number, kind)

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        until(lambda: self.poll() is not None or time.monotonic() > end, 0.005)
        assert self.code is not None, f"process {self.number} hangs"
        return self.code


# The harness --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Told:
    """One fault: what was done, and how the process ended."""

    arm: str
    kind: str
    code: int
    updates: int  # that the process had made when it ended


class Harm:
    """Runs below `root`, one for each arm, that are harmed in turn and go on after each fault."""

    def __init__(self, root: pathlib.Path, seed: int, *, mount: bool = True):
        self.root, self.random, self.mount = root, random.Random(seed), mount
        self.told: list[Told] = []
        self.finished = dict.fromkeys(ARMS, 0)  # runs that were compared with the whole one
        make(root)

    def __enter__(self) -> "Harm":
        env = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE.parent}"}
        self.nursery = subprocess.Popen(
            [sys.executable, str(HERE), str(self.root)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what was not yet asked for stays where `select` sees it
        )
        return self

    def __exit__(self, *error) -> None:
        with self.nursery:
            self.nursery.kill()

    def whole(self) -> None:
        """The runs that nothing happens to."""
        self.wait(self.start({arm: self.root / "whole" / arm for arm in ARMS}), 0)

    def start(self, stages: dict[str, pathlib.Path], clock: int = 0, limit: int = 0) -> Process:
        for workdir in stages.values():
            workdir.mkdir(parents=True, exist_ok=True)
        named = [str(x) for arm, workdir in stages.items() for x in (workdir, arm)]
        return Process(self.nursery, [str(self.root), str(clock), str(limit), *named])

    def said(self) -> str:
        return (self.root / "said.txt").read_text()

    def wait(self, process, *codes: int) -> int:
        code = process.wait()
        assert not codes or code in codes, f"exit {code}, wanted {codes}:\n{self.said()[-4000:]}"
        return code

    def harm(self, arm: str, kind: str) -> None:
        """Let the run of an arm go on until this fault has struck it; a run that ends first is
        compared with the whole one, and another is begun."""
        while True:
            workdir = self.root / f"{arm}-{self.finished[arm]}"
            with self.disk(workdir, kind) as place:
                count = lines(place / "seen.jsonl")
                hurt, code = vars(Harm)[f"_{kind}"](self, arm, place, count)
                updates = lines(place / "seen.jsonl") - count
            if code == 0:
                self.compare(arm, workdir)
                self.finished[arm] += 1
            if hurt:
                self.told.append(Told(arm, kind, code, updates))
                return

    def end(self) -> None:
        """Let every run that was begun go on to its end, and compare."""
        left = {arm: self.root / f"{arm}-{n}" for arm, n in self.finished.items()}
        left = {arm: folder for arm, folder in left.items() if folder.exists()}
        self.wait(self.start(left), 0)
        for arm, workdir in left.items():
            self.compare(arm, workdir)
            self.finished[arm] += 1

    def compare(self, arm: str, workdir: pathlib.Path) -> None:
        """The run has the parameters, the metrics and the data of the one left alone."""
        whole = self.root / "whole" / arm
        a, b = (np.load(folder / "end.npz") for folder in (whole, workdir))
        assert a.files == b.files and all((a[k] == b[k]).all() for k in a.files), workdir
        model = "model/model.safetensors"
        assert (whole / model).read_bytes() == (workdir / model).read_bytes(), workdir
        timed = ("time/", "perf/", "step_time", "learning_rate/")
        plain = lambda line: {k: x for k, x in line.items() if not k.startswith(timed)}
        logs = [[plain(x) for x in metrics.read(folder)] for folder in (whole, workdir)]
        assert logs[0] == logs[1] and [x["step"] for x in logs[0]] == [*range(1, STEPS + 1)]
        wanted = [json.loads(x) for x in (whole / "seen.jsonl").read_text().splitlines()]
        seen = [json.loads(x) for x in (workdir / "seen.jsonl").read_text().split("\n") if x]
        # In order; after a fault it goes back, never forward, and each time meets the same.
        at = -1
        for line in seen:
            here = wanted.index(line)
            assert here <= at + 1, f"{workdir}: from update {at + 1} to {here + 1}"
            at = here
        assert at == STEPS - 1

    # Each gives (whether the fault struck, exit code).

    def _kill(self, arm, workdir, count, kind=signal.SIGKILL, clock=0):
        process = self.start({arm: workdir}, clock)
        if kind == signal.SIGKILL and not clock and self.random.random() < 0.2:
            self.sleep(process, 3.0)  # while it starts
        elif self.begun(process, workdir, count):
            self.sleep(process, 20 * UPDATE)
        process.send(kind)
        code = process.wait()
        return code != 0, code

    def _save(self, arm, workdir, count):
        process = self.start({arm: workdir})
        writing = lambda: list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        if self.begun(process, workdir, count):
            until(lambda: process.poll() is not None or writing(), 0.0005)
        process.send(signal.SIGKILL)
        code = process.wait()
        return code != 0, code

    def _term(self, arm, workdir, count):
        _, code = self._kill(arm, workdir, count, signal.SIGTERM)
        if code == 0:  # it came too late: the last update was done
            return False, 0
        assert code == 143, self.said()[-4000:]
        step = int(re.search(r"stopped and saved at step (\d+)", self.said())[1])
        assert (workdir / "checkpoints" / str(step)).is_dir() and 0 < step < STEPS
        return True, code

    def _clock(self, arm, workdir, count):
        return self._kill(arm, workdir, count, clock=self.random.randrange(1, 10**6))

    def _disk(self, arm, workdir, count):
        if not self.mount:  # no file may grow beyond: a checkpoint cannot be written
            process = self.start({arm: workdir}, limit=self.random.randrange(2_000, 20_000))
            code = self.wait(process)
            return code != 0, code
        process = self.start({arm: workdir})
        if self.begun(process, workdir, count):
            self.sleep(process, 6 * UPDATE)
        with contextlib.suppress(OSError), (workdir / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        code = self.wait(process)
        (workdir / "ballast").unlink()
        return code != 0, code

    def _shard(self, arm, workdir, count):
        path = self.random.choice(sorted((self.root / "shards").glob("*.array_record*")))
        content = path.read_bytes()
        process = self.start({arm: workdir})
        if self.begun(process, workdir, count):
            self.sleep(process, 3 * UPDATE)
        os.truncate(path, self.random.randrange(len(content) // 3))
        try:
            code = self.wait(process)
            if code:
                self.named(path)
                assert self.wait(self.start({arm: workdir}), 1)
                self.named(path)
        finally:
            path.write_bytes(content)
        return code != 0, code

    def named(self, path: pathlib.Path) -> None:
        said = self.said()
        assert path.name in said and "Traceback" not in said, said[-4000:]

    @contextlib.contextmanager
    def disk(self, workdir: pathlib.Path, kind: str):
        """The work folder; for `disk`, where that can be, moved onto a small disk of its own."""
        workdir.mkdir(exist_ok=True)
        if kind != "disk" or not self.mount:
            yield workdir
            return
        kept = workdir.with_name(f"{workdir.name}.kept")
        workdir.rename(kept)
        workdir.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", workdir], check=True)
        try:
            shutil.copytree(kept, workdir, dirs_exist_ok=True)
            yield workdir
            shutil.rmtree(kept)
            shutil.copytree(workdir, kept)
        finally:
            subprocess.run(["umount", workdir], check=True)
            workdir.rmdir()
            kept.rename(workdir)

    def begun(self, process, workdir: pathlib.Path, count: int) -> bool:
        """Wait until the process has made an update; whether it did."""
        seen = workdir / "seen.jsonl"
        until(lambda: process.poll() is not None or lines(seen) > count, 0.005)
        return process.poll() is None

    def sleep(self, process, most: float) -> None:
        """For a random time, or until the process ends."""
        end = time.monotonic() + self.random.uniform(0, most)
        until(lambda: process.poll() is not None or time.monotonic() > end, 0.002)

    def table(self) -> str:
        """Faults by kind and arm."""
        rows = ["| fault | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
        for kind in KINDS:
            counts = [sum((t.arm, t.kind) == (arm, kind) for t in self.told) for arm in ARMS]
            rows.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
        done = ", ".join(f"{n} {arm}" for arm, n in self.finished.items())
        return "\n".join([*rows, "", f"{len(self.told)} faults; runs ended as the whole: {done}"])


def lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def until(done, pause: float) -> None:
    while not done():
        time.sleep(pause)


def can_mount(folder: pathlib.Path) -> bool:
    """Whether a small disk can be had, to be filled."""
    folder.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True)
    except OSError:
        return False
    return made.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


if __name__ == "__main__":
    nursery(sys.argv[1])

"""The loop of every kind of training: take an item, update, log, validate, save.

What an item is and what an update does with it are arguments: `supervised` and `preference` below
make updates from batches; the policy loop makes its own from prompts.

The order, once per update n:
  1. take item n;
  2. dispatch update n;
  3. read the metrics of update n - 1 (the device is busy with n meanwhile) and log them;
  4. where due, validate and save, with the data stream standing after item n;
  5. on SIGTERM or Ctrl-C, save and stop.
A resumed run takes item n + 1 next, so it goes on bit for bit.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvid import sharding
from jaxvid.batch import Batch, Loss
from jaxvid.train import metrics, step, watch
from jaxvid.train.checkpoint import Checkpoints, Meta, code_version, say
from jaxvid.train.optimizers import Rates
from jaxvid.train.state import TrainState

Update = Callable[[TrainState, Any], tuple[TrainState, step.Metrics]]
Evaluate = Callable[[TrainState], dict[str, float]]
Reference = Callable[[TrainState, Batch], Any]  # log-probs of the reference, in the batch's shape


@runtime_checkable
class Stream(Protocol):
    """Items, and where it stands: what a Grain iterator is."""

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long, and what happens how often (in updates; 0 = never)."""

    steps: int
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2  # last checkpoints kept, beside the best
    patience: int = 5  # non-finite steps in a row that stop the run
    best: str = "eval_loss"
    best_mode: Literal["min", "max"] = "min"
    checkpoints: str = ""  # a URL that they are written to; "" is the work folder
    rates: Rates = ()  # factors of the learning rate by part, for the log
    profile: tuple[int, int] = (0, 0)  # first and last update that the profiler traces
    stall_minutes: float = 60.0  # without an update that end the run; 0 = never


class Result(NamedTuple):
    state: TrainState
    step: int
    interrupted: bool  # stopped by a signal, with its state saved


class NonFinite(FloatingPointError):
    """Too many steps in a row without a finite loss and gradient."""


def train(
    state: TrainState,
    update: Update,
    stream: Stream,
    settings: Settings,
    workdir: pathlib.Path,
    *,
    rate: Callable[[Any], Any],
    evaluate: Evaluate | None = None,
    config: dict[str, Any] | None = None,
    describe: Callable[[int, Any], list[str]] | None = None,
    also: Callable[[int, dict[str, float]], None] | None = None,
) -> Result:
    """Run to `settings.steps`, from the last whole checkpoint if there is one, of those in
    `workdir` or at the URL `settings.checkpoints`.

    rate: learning rate by optimizer step, for the log. evaluate: validation metrics of a state,
    named eval_*. describe: names of the records in item n, for the error that stops a run. also:
    gets every line of the log.
    """
    where = settings.checkpoints or workdir / "checkpoints"
    saver = Checkpoints(where, keep=settings.keep, best=settings.best, mode=settings.best_mode)
    with contextlib.closing(saver):
        start = 0
        if saver.latest() is not None:
            start, state, meta = saver.restore(state, config=config)
            stream.set_state(meta.data)
            if meta.code != code_version():
                say(f"changed since step {start}: jaxvid {meta.code} -> {code_version()}")
        meta = lambda: Meta(settings.seed, stream.get_state(), config or {})
        with (
            _Log(workdir, settings, start, rate, describe or record_numbers, also) as log,
            _Stop() as stop,
            watch.Trace(workdir, *settings.profile) as trace,
            watch.Watchdog(settings.stall_minutes) as dog,
        ):
            for bad in saver.passed:
                log.writer.write(start, {"checkpoint/damaged": float(bad)})
            done = start
            for n in range(start + 1, settings.steps + 1):
                trace.before(n)
                item, waited = _take(stream, n, settings.steps)
                state, values = update(state, item)
                log.add(n, values, item, waited)
                trace.after(n, state.step)
                dog.heard()
                done, last = n, n == settings.steps
                scores = None
                if evaluate and (last or _due(n, settings.eval_every)):
                    dog.rest()
                    scores = log.evaluated(n, evaluate, state)
                stopped = stop.requested(n)
                improved = scores is not None and log.is_best(scores)
                if last or stopped or improved or _due(n, settings.checkpoint_every):
                    log.flush()  # a run that is to stop for non-finite steps must not be saved
                    saver.save(n, state, meta(), scores)
                    log.pause("checkpoint")
                if stopped and not last:
                    break
        saver.wait()
    return Result(state, done, done < settings.steps)


def supervised(train_step: Update, mesh: Mesh) -> Update:
    """The update of objectives that need nothing beside the batch."""
    return lambda state, batch: train_step(state, place(batch, mesh))


def preference(train_step: Update, reference: Reference, mesh: Mesh) -> Update:
    """The update of objectives that compare with a reference, whose log-probs come first."""

    def update(state, batch):
        batch = place(batch, mesh)
        return train_step(state, batch._replace(ref=reference(state, batch)))

    return update


def fixed(score: Callable[..., Any], weights: nnx.State) -> Reference:
    """The reference of these weights. They must not share memory with the state, which every step
    donates: see `frozen`."""
    return lambda state, batch: score(weights, batch).logp


def start(score: Callable[..., Any], params: nnx.State) -> Reference:
    """The reference that the run starts from: of `params`, which are to be trained, a copy is kept;
    what is frozen is the state's own."""
    kept = frozen(params)
    return lambda state, batch: score(nnx.merge_state(kept, state.frozen), batch).logp


def base(score: Callable[..., Any]) -> Reference:
    """The reference that a LoRA run starts from, in no memory: the model without its adapters,
    which are all that is trained. `score` is of the plain model's graph."""
    return lambda state, batch: score(state.frozen, batch).logp


def frozen(params: nnx.State) -> nnx.State:
    """A copy that outlives the donation of the original."""
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p))(params)


def validation(
    loss: Callable[[nnx.State, Batch], Loss],
    batches: Callable[[], Iterable[Batch]],
    mesh: Mesh,
    *,
    prepare: Callable[[TrainState, Batch], Batch] = lambda state, batch: batch,
) -> Evaluate:
    """Validation over all of `batches()`: exact means, named eval_loss and eval_<metric>."""

    def evaluate(state: TrainState) -> dict[str, float]:
        total = None
        for batch in batches():
            part = loss(state.weights, prepare(state, place(batch, mesh)))
            one = jax.tree_util.tree_map_with_path
            total = part if total is None else one(step.combine, total, part)
        if total is None:
            raise ValueError(
                "the validation split gave no batch; set --eval-every 0 or name shards that have "
                "one in --validation.shards"
            )
        return {f"eval_{k}": x for k, x in metrics.to_host(step.averages(total)).items()}

    return evaluate


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Put this process's rows [A, rows, ...] on the mesh: rows over its data axes."""
    rows = batch.tokens.tokens.shape[1] * jax.process_count()
    where = sharding.row_sharding(mesh, rows, leading=1)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)


def record_numbers(n: int, item: Any) -> list[str]:
    """The places, in update n, of the records of a Batch; of any other item, nothing is known."""
    if not isinstance(item, Batch):
        return []
    numbers = np.unique(item.branches.record)
    return [str(n) for n in numbers[numbers >= 0]]


def _due(n: int, every: int) -> bool:
    return every > 0 and n % every == 0


def _take(stream: Stream, n: int, steps: int) -> tuple[Any, float]:
    """The next item, and the seconds that it was waited for."""
    since = time.perf_counter()
    try:
        return next(stream), time.perf_counter() - since
    except StopIteration:
        raise ValueError(
            f"the data ended before update {n} of {steps}; let the stream repeat, or set --steps "
            f"{n - 1}"
        ) from None


class _Log:
    """Reads metrics, one update late where they are still being computed; averages them over a
    window, writes and prints lines; on a terminal there is a bar below them."""

    def __init__(
        self,
        workdir: pathlib.Path,
        settings: Settings,
        start: int,
        rate: Callable[[Any], Any],
        describe: Callable[[int, Any], list[str]],
        also: Callable[[int, dict[str, float]], None] | None,
    ):
        self.settings, self.rate, self.describe = settings, rate, describe
        self.writer, self.window = metrics.Writer(workdir, start, also), metrics.Window()
        self.pending, self.since = None, time.perf_counter()
        self.top = _best_so_far(workdir, settings)
        self.bar = tqdm.tqdm(
            total=settings.steps,
            initial=start,
            unit="step",
            disable=True if jax.process_index() else None,  # None: unless stderr is a terminal
            dynamic_ncols=True,
        )

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.flush()
        self.bar.close()
        self.writer.close()

    def add(self, n: int, values: dict[str, Any], item: Any, waited: float) -> None:
        """Log update n - 1, and hold n, which was just dispatched after `waited` s for its item.
        One that is done, as in RL, is logged at once: the next one's time is not its own."""
        self.flush()
        self.pending = (n, values, item, waited)
        if not any(isinstance(x, jax.Array) for x in values.values()):
            self.flush()

    def flush(self) -> None:
        """Wait for the update that is held, and log it."""
        if self.pending is None:
            return
        (n, values, item, waited), self.pending = self.pending, None
        values = metrics.to_host(values)
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        if values["skipped"] >= self.settings.patience:
            raise NonFinite(
                f"the loss or its gradient was not finite in {values['skipped']:.0f} updates in a "
                f"row, the last of them update {n} (records {', '.join(self.describe(n, item))}). "
                "Look at those records with `jaxvid validate`, lower --optimizer.lr, or raise "
                "--patience."
            )
        values |= {"step_time": seconds, "perf/throughput": values["num_tokens"] / seconds}
        values |= {"perf/input_wait": waited / max(seconds, waited), **watch.memory()}
        values |= watch.host_memory()
        if flops := values.pop("flops", 0.0):  # in RL of the update alone
            values |= watch.speed(flops, values.get("time/update", seconds))
        if (moved := values.pop("optimizer_step", 0.0)) > 0:  # the rate of the step just made
            values["learning_rate"] = rate = float(self.rate(np.int32(moved - 1)))
            values |= {f"learning_rate/{p}": rate * f for p, f in self.settings.rates}
        self.window.add(values)
        self.bar.update(1)
        if _due(n, self.settings.log_every) or n == self.settings.steps:
            pace = statistics.median(self.window.values["step_time"])  # one of them may compile
            means = self.window.take()
            self.writer.write(n, means)
            self.say(metrics.line(n, self.settings.steps, means, pace))

    def say(self, text: str) -> None:
        """Print a line, once; above the bar if there is one."""
        if self.bar.disable:
            say(text)
        else:
            self.bar.write(text)
            sys.stdout.flush()  # which may be a file, though the bar's stderr is none

    def pause(self, name: str) -> None:
        """What was done since the last update is no part of the next one's time."""
        now = time.perf_counter()
        self.window.add({f"time/{name}": now - self.since})
        self.since = now

    def evaluated(self, n: int, evaluate: Evaluate, state: TrainState) -> dict[str, float]:
        self.flush()
        scores = evaluate(state)
        self.pause("validation")
        if self.settings.best not in scores:
            raise ValueError(
                f"best={self.settings.best!r} is no validation metric; there are {sorted(scores)}"
            )
        self.writer.write(n, scores)
        self.say(f"step {n}: " + "  ".join(f"{k} {x:.4f}" for k, x in scores.items()))
        return scores

    def is_best(self, scores: dict[str, float]) -> bool:
        """Whether these scores beat all before them; remembers them if so."""
        value = scores[self.settings.best] * (1 if self.settings.best_mode == "max" else -1)
        if not value > self.top:
            return False
        self.top = value
        return True


def _best_so_far(workdir: pathlib.Path, settings: Settings) -> float:
    """The best score that the run has logged, larger is better."""
    if not (workdir / "metrics.jsonl").exists():
        return -math.inf
    seen = [line.get(settings.best) for line in metrics.read(workdir)]
    sign = 1 if settings.best_mode == "max" else -1
    return max((sign * x for x in seen if x is not None), default=-math.inf)


class _Stop:
    """Turns SIGTERM and the first Ctrl-C into a question asked after every update."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.flag, self.old = False, {}

    def __enter__(self) -> "_Stop":
        # Under jax.distributed its own handler tells all processes; they must stop at one step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._set) for s in self.SIGNALS}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._restore()

    def requested(self, n: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(n)
        return self.flag

    def _set(self, number: int, frame: Any) -> None:
        self.flag = True
        self._restore()  # a second signal acts at once

    def _restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        self.old = {}

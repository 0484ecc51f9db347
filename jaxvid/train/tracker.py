"""A run's numbers on Weights & Biases, beside metrics.jsonl, where a project is named.

The run there goes by the work folder's name. Its id is in WORKDIR/wandb.json, so that a run that
goes on here goes on there. Who logs in, and whether anything is sent (WANDB_MODE=offline), is
wandb's own affair: no key is read or written here. What goes wrong once training has begun is
said, and ends the log there alone.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax

from jaxvid import files

FILE = "wandb.json"
AXIS = "step"  # of every chart; wandb's own count of steps only grows, ours goes back on resuming
# What is printed stays here; where nothing can be sent, the end waits no longer for it.
SETTINGS = {"console": "off", "finish_timeout": 120.0}
Also = Callable[[int, dict[str, float]], None]  # gets every line of metrics.jsonl too


def check(project: str) -> None:
    """Raises ValueError where a project is named and the package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb {project} needs a package that is not here: pip install 'jaxvid[wandb]'; or "
            "leave --wandb out, metrics.jsonl and tensorboard/ have the same numbers"
        )


@contextlib.contextmanager
def opened(
    project: str, name: str, workdir: pathlib.Path, config: dict[str, Any]
) -> Iterator[Also | None]:
    """Takes lines of numbers while the context lasts; None without a project, and in all processes
    but the first.

    Raises ValueError where wandb says that it cannot be used as it is set up (no key, say).
    """
    check(project)
    board = None
    if project and not jax.process_index():
        board = Board(importlib.import_module("wandb"), project, name, workdir, config)
    done = False
    try:
        yield None if board is None else board.write
        done = True
    finally:
        if board is not None:
            board.close(failed=not done)


class Board:
    """A run there; see `opened`."""

    def __init__(
        self,
        wandb: ModuleType,
        project: str,
        name: str,
        workdir: pathlib.Path,
        config: dict[str, Any],
    ):
        self.run = None
        given = {
            "project": project,
            "name": name,
            "id": _id(workdir, name),
            "resume": "allow",
            "dir": str(workdir),
            "config": config,
        }
        begin = lambda: wandb.init(**given, settings=wandb.Settings(**SETTINGS))
        refusals = wandb.errors.UsageError, wandb.errors.AuthenticationError
        try:
            run = self._try(begin, refusals)
        except refusals as error:
            raise ValueError(
                f"--wandb {project}: {str(error).rstrip('.')}. Log in (`wandb login`, or "
                "WANDB_API_KEY), set WANDB_MODE=offline, or leave --wandb out"
            ) from error
        self.run = run
        self._try(lambda: run.define_metric("*", step_metric=AXIS) if run else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; numbers that are not finite are left out."""
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        if self.run is not None:
            self._try(lambda: self.run.log(finite | {AXIS: step}))

    def close(self, *, failed: bool) -> None:
        if self.run is not None:
            self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _try(self, do: Callable[[], Any], but: tuple[type[Exception], ...] = ()) -> Any:
        """What `do` gives. If it raises, that is said, and nothing is sent any more."""
        try:
            return do()
        except but:
            raise
        except Exception as error:  # of another's service: no reason to lose a run
            self.run = None
            print(
                f"Weights & Biases: {type(error).__name__}: {error}. The run goes on without it; "
                "metrics.jsonl and tensorboard/ have all numbers",
                flush=True,
            )
            return None


def _id(workdir: pathlib.Path, name: str) -> str:
    """The run's id, the same as long as its folder is there. One that is made from the folder's
    name alone would add the next run in a folder of that name to the last one's charts."""
    path = workdir / FILE
    if path.is_file():
        return json.loads(path.read_text())["id"]
    readable = re.sub(r"[^a-zA-Z0-9_-]+", "-", name)[:40].strip("-")
    made = f"{readable or 'run'}-{uuid.uuid4().hex[:8]}"
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps({"id": made}) + "\n")
    return made

"""What to run, whichever machines it runs on: `jaxvid train`, its files, its keys, its price.

The trainer's side of the contract: the same command with the same work folder goes on from the last
checkpoint; exit code 0 says that the last step was reached, 143 that a SIGTERM came and the state
is saved, any other that it failed.
"""

import dataclasses
import pathlib
import re
import shlex
from typing import Annotated

import tyro

SAVED = 143  # exit code of a run that SIGTERM ended, its state saved
# What `jaxvid train` is told where it is one of several processes.
DISTRIBUTED = ("--distributed", "auto")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FOLDER = re.compile(r"([a-z0-9]+://)?[A-Za-z0-9._/=+-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Train by a recipe. What comes after `--` goes to `jaxvid train` as it is."""

    config: tyro.conf.Positional[str]  # recipe, as for jaxvid train
    name: str  # of this job: small letters, digits and dashes
    workdir: str  # of the run; a bucket (gs://...) wherever machines come and go
    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # after `--`
    secrets: tuple[str, ...] = ()  # variables of yours that the job gets, by name: WANDB_API_KEY
    python: str = ""  # interpreter there with the dependencies in it; else one is set up
    failures: int = 3  # restarts after a failure; stopped machines are not counted here
    out: pathlib.Path = pathlib.Path("runs/launch")  # here: what was rendered, and logs
    price: float | None = None  # of a chip for an hour, as your price list says
    hours: float | None = None  # you expect it to take, for the estimate
    dry_run: bool = False  # print what would run, and run nothing

    @property
    def folder(self) -> pathlib.Path:
        return self.out / self.name


def check(job: Job) -> None:
    """Everything that can be known to be wrong before a machine is paid for. Raises ValueError."""
    check_name("--name", job.name)
    fits("--workdir", job.workdir, FOLDER, "a folder or a bucket without blanks or quotes")
    for name in job.secrets:
        fits("--secrets", name, VARIABLE, "the name of a variable, never its value")
    if job.python:
        fits("--python", job.python, FOLDER, "the path of an interpreter")
    if job.failures < 0:
        raise ValueError(f"--failures {job.failures} is negative; 0 restarts after no failure")


def check_recipe(job: Job) -> None:
    """The recipe and the flags behind `--`, as the trainer will read them.

    A wrong flag ends the program with the nearest named: here, not on a slice that is paid for.
    """
    from jaxvid import runs  # jax comes with it, so only where it is needed

    runs.load_config(job.config, list(job.arguments))


def check_bucket(flag: str, folder: str) -> None:
    """Machines that vanish keep nothing, so what they write goes to a bucket."""
    fits(flag, folder, re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[\w.=+/-]*)?"), "gs://BUCKET/FOLDER")


def check_name(flag: str, name: str) -> None:
    fits(flag, name, NAME, "small letters, digits and dashes, a letter first, at most 40")


def fits(flag: str, value: str, pattern: re.Pattern[str], wanted: str) -> None:
    """Raises ValueError unless the whole value fits the pattern."""
    if not pattern.fullmatch(value):
        raise ValueError(f"{flag} {value!r}: it must be {wanted}")


def command(job: Job, config: str, processes: int) -> tuple[str, ...]:
    """The words after `python`, the same in every process. `config`: its path over there."""
    words = ("-m", "jaxvid.main", "train", config, "--workdir", job.workdir, *job.arguments)
    return (*words, *DISTRIBUTED) if processes > 1 else words


def shell(words: tuple[str, ...], env: tuple[str, ...] = ()) -> str:
    """job.sh: the command in the environment that bootstrap.sh made beside it.

    It replaces itself with the trainer, which so gets every signal. `env`: lines before it.
    """
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {shlex.join(('jaxvid', *words[2:]))}",
            "set -euo pipefail",
            'root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
            "if [[ -f $root/secrets.env ]]; then",
            "  set -a",
            "  # shellcheck source=/dev/null",
            '  source "$root/secrets.env"',
            "  set +a",
            "fi",
            'export PYTHONPATH="$root/code" PYTHONUNBUFFERED=1',
            *env,
            'cd "$root/code"',
            f'exec "$(<"$root/python")" {shlex.join(words)}',
            "",
        ]
    )


def estimate(chips: int, price: float | None, hours: float | None, chip: str = "chip") -> str:
    """What it costs, with the arithmetic; without a price, how to be told."""
    many = f"{chips} {chip}{'s' if chips > 1 else ''}"
    if price is None:
        return f"cost: {many} x your price of a {chip}-hour (--price says it, --hours how long)"
    an_hour = chips * price
    told = f"cost: {many} x {price:g} = {an_hour:.2f} an hour"
    if hours is None:
        return f"{told} (--hours gives the sum)"
    return f"{told}; x {hours:g} h = {an_hour * hours:.2f}, waiting and set-up not counted"

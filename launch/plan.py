"""What a launcher does, as data: files to write and commands to run, in order.

A launcher renders a plan from its settings, and nothing else; here it is printed as a shell script
(`--dry-run`) or carried out. Commands are lists of words and never go through a shell here.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Write(NamedTuple):
    """A file with this text."""

    path: pathlib.Path
    text: str


class Secrets(NamedTuple):
    """A file of variables from the user's environment; it is never printed, and not kept.

    `shell` quotes the values for `source`; kubectl reads them as they are.
    """

    path: pathlib.Path
    names: tuple[str, ...]
    shell: bool


class Command(NamedTuple):
    """A program and its arguments. `may_fail`: for what may be gone already."""

    words: tuple[str, ...]
    may_fail: bool = False

    def __str__(self) -> str:
        return shlex.join(self.words)


class Note(NamedTuple):
    """What a reader of the plan should know; a comment in the script."""

    text: str


Step = Write | Secrets | Command | Note


class Done(NamedTuple):
    code: int
    out: str
    err: str


def script(steps: Iterable[Step]) -> str:
    """The plan as a bash script: what would run, word by word, with no secret in it."""
    lines = ["set -euo pipefail"]
    for step in steps:
        if isinstance(step, Note):
            lines += [f"# {line}" for line in step.text.splitlines()]
        elif isinstance(step, Write):
            path = shlex.quote(str(step.path))
            lines += [f"mkdir -p {shlex.quote(str(step.path.parent))}"]
            lines += [f"cat > {path} <<'END_OF_FILE'", step.text.rstrip("\n"), "END_OF_FILE"]
        elif isinstance(step, Secrets):
            lines.append(
                f"# {step.path}, readable by you alone: {', '.join(step.names)} "
                "from your environment; removed once it is sent"
            )
        else:
            lines.append(f"{step} || true" if step.may_fail else str(step))
    return "\n".join(lines) + "\n"


def carry_out(steps: Iterable[Step], *, dry_run: bool) -> None:
    """Print the plan, or do it. Raises SystemExit with the command that failed and its words."""
    if dry_run:
        print(script(steps), end="")
        return
    for step in steps:
        if isinstance(step, Write):
            step.path.parent.mkdir(parents=True, exist_ok=True)
            step.path.write_text(step.text)
        elif isinstance(step, Secrets):
            write_secrets(step)
        elif isinstance(step, Command):
            print(f"+ {step}", flush=True)
            code = subprocess.run(step.words).returncode
            if code and not step.may_fail:
                raise SystemExit(f"this command ended with exit code {code}:\n    {step}")


def call(command: Command, timeout: float | None = None) -> Done:
    """Run a command and keep what it says; code 124 when it took longer than `timeout` seconds."""
    try:
        done = subprocess.run(command.words, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Done(124, "", f"no answer within {timeout:.0f} s")
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), _last(done.stderr))


def _last(said: bytes) -> str:
    return said.decode("utf-8", "replace")[-4000:]


def write_secrets(step: Secrets) -> None:
    """The file, with mode 600 before anything is in it."""
    lines = []
    for name in step.names:
        value = os.environ[name]
        if "\n" in value:
            raise SystemExit(f"the value of {name} has a line break in it; a key has none")
        lines.append(f"{name}={shlex.quote(value) if step.shell else value}")
    step.path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=step.path.parent)  # mode 600
    with open(handle, "w") as file:
        file.write("".join(f"{line}\n" for line in lines))
    os.replace(name, step.path)


def check_secrets(names: Sequence[str]) -> None:
    """Raises SystemExit naming what the environment lacks."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise SystemExit(
            f"--secrets asks for {', '.join(missing)}, which your environment does not set. "
            f"`export {missing[0]}=...` first, or leave it out of --secrets."
        )


def check_program(program: str, remedy: str) -> None:
    """Raises SystemExit with the remedy when a program is not there."""
    if shutil.which(program) is None:
        raise SystemExit(f"no program {program!r} on PATH. {remedy}")

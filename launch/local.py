"""The whole method on this machine: forge, SFT, DPO, duality-normalised RL, evaluation, report.

    WORKDIR/shards            the laptop world (and WORKDIR/footage from --videos)
    WORKDIR/{sft,dpo,dna}     runs; WORKDIR/<stage>/model is a Hugging Face folder
    WORKDIR/<stage>/eval/     replies and results, with the blank and the shuffled control
    WORKDIR/report.html

Each stage is a command that could be typed by hand, run as a process of its own; a stage whose
result is there is not run again, so a second run continues the first.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

from launch.stages import Stage, stages

# The older code generator of XLA's CPU backend: slower loops, made in a third of the time.
SIMPLE = "--xla_cpu_use_fusion_emitters=false"


@dataclasses.dataclass(frozen=True)
class Local:
    """Run the whole method here and print where the report is."""

    workdir: pathlib.Path = pathlib.Path("runs/local")  # everything is kept here
    videos: pathlib.Path | None = None  # a folder of your own clips, as additional footage
    fast: bool = False  # a smoke version of two to three minutes; its figures mean nothing
    seed: int = 0
    workers: int = 2  # processes that render clips


def local(args: Local) -> None:
    """Every stage in order. Raises SystemExit with the failed stage and how to continue."""
    started = time.monotonic()
    args.workdir.mkdir(parents=True, exist_ok=True)
    _same_settings(args)
    for number, stage in enumerate(plan := stages(args), 1):
        head = f"[{number}/{len(plan)}] {stage.name}"
        if stage.done.exists():
            print(f"{head}: done before ({stage.done})", flush=True)
        else:
            print(f"{head}: {stage.what}", flush=True)
            _run(stage, args.workdir, args.fast)
        if stage.finding:
            print(f"    {stage.finding()}", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"\nfinished in {minutes:.1f} min; the report is {args.workdir / 'report.html'}")


def _run(stage: Stage, workdir: pathlib.Path, fast: bool) -> None:
    began = time.monotonic()
    for command in stage.commands:
        with open(workdir / "commands.log", "a") as log:
            log.write(shlex.join(command) + "\n")
        code = subprocess.run(
            [sys.executable, "-m", *command], env=_environment(workdir, fast)
        ).returncode
        if code:
            raise SystemExit(
                f"stage {stage.name!r} stopped with exit code {code}. Its command was\n"
                f"    python -m {shlex.join(command)}\n"
                "Mend what it says above and run the same jaxvid-launch command again: finished "
                "stages are kept and the stopped one continues."
            )
    print(f"    {time.monotonic() - began:.0f} s", flush=True)


def _environment(workdir: pathlib.Path, fast: bool) -> dict[str, str]:
    """Stages share compiled programs; the platform is this machine's own unless already chosen.

    In the fast version compiling takes longer than running, so little is optimised.
    """
    own = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute())}
    if fast:
        own |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": SIMPLE}
    return {**own, "PYTHONUNBUFFERED": "1", **os.environ}


def _same_settings(args: Local) -> None:
    """A work folder belongs to one set of settings; another would mix two runs."""
    path = args.workdir / "local.json"
    now = {
        k: str(v) for k, v in dataclasses.asdict(args).items() if k not in ("workdir", "workers")
    }
    if path.exists():
        before = json.loads(path.read_text())
        if before != now:
            changed = [f"--{k} was {before[k]}, is {now[k]}" for k in now if before[k] != now[k]]
            raise SystemExit(
                f"{args.workdir} holds a run with other settings ({'; '.join(changed)}). Give "
                "another --workdir, or the settings of before."
            )
    else:
        path.write_text(json.dumps(now))

"""GPUs of a SLURM cluster, from its login node.

The batch script runs one process a GPU, as JAX finds it by SLURM's variables. SIGTERM comes to the
processes three minutes before the time limit, or when the job is preempted: they save, end with 143
and the job queues again, as it does after a failure up to `failures` times. The job's folder must
be one that all nodes see; the environment is made in it once, on the login node.
"""

import dataclasses
import pathlib
import re
import shlex

from launch import bundle as bundles
from launch import job as jobs
from launch import plan
from launch.plan import Command, Note, Step, Write

REMEDY = "Run this on a login node of the cluster, where SLURM's commands are."
BEFORE_THE_END = 180  # seconds to save in
TIME = re.compile(r"([0-9]+-)?[0-9]{1,2}:[0-5][0-9]:[0-5][0-9]")
WORD = re.compile(r"[\w.,@:+-]+")
# What a job gets of your environment; keys are named, not written.
KEPT = ("HOME", "USER", "PATH", "LANG")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmTarget:
    """Which job."""

    name: str  # of the job
    root: pathlib.Path  # folder that all nodes see; the job's own is below it
    dry_run: bool = False  # print what would run, and run nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmUp(jobs.Job):
    """Make the environment and queue the job."""

    root: pathlib.Path  # folder that all nodes see; the job's own is below it
    nodes: int = 1
    gpus: int = 8  # of a node, one process each; 0 runs one process a node on the CPU
    time: str = "24:00:00"  # of one run; it saves before and queues again
    cpus: int = 8  # of a process
    memory: str = ""  # of a node, 200G; else the cluster's default
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    before: tuple[str, ...] = ()  # lines of shell before the run, such as "module load cuda"

    def target(self) -> SlurmTarget:
        return SlurmTarget(name=self.name, root=self.root, dry_run=self.dry_run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmStatus(SlurmTarget):
    """How the job stands in the queue, and how it ended before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmLogs(SlurmTarget):
    """Print the log of the job."""

    follow: bool = False  # go on as it grows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmDown(SlurmTarget):
    """Stop the job, saving its state, and delete its folder; the work folder stays."""

    keep: bool = False  # the folder, with logs and environment


def check_target(at: SlurmTarget) -> pathlib.Path:
    """The job's folder. Raises ValueError for what cannot be one."""
    jobs.check_name("--name", at.name)
    jobs.fits("--root", str(at.root), re.compile(r"/[\w./+=-]+"), "an absolute path, no blanks")
    return at.root / at.name


def check(args: SlurmUp) -> pathlib.Path:
    """The job's folder. Raises ValueError for settings that cannot work."""
    jobs.check(args)
    folder = check_target(args.target())
    jobs.fits("--time", args.time, TIME, "HOURS:MINUTES:SECONDS, or DAYS- before it")
    hours, minutes, seconds = (int(n) for n in args.time.rpartition("-")[2].split(":"))
    days = int(args.time.partition("-")[0]) if "-" in args.time else 0
    if days * 86400 + hours * 3600 + minutes * 60 + seconds <= 2 * BEFORE_THE_END:
        raise ValueError(
            f"--time {args.time} leaves no time to train: {BEFORE_THE_END} s of it are for saving"
        )
    if "://" not in args.workdir and not args.workdir.startswith("/"):
        raise ValueError(f"--workdir {args.workdir}: an absolute path, the job runs elsewhere")
    for flag, number, least in (
        ("--nodes", args.nodes, 1),
        ("--gpus", args.gpus, 0),
        ("--cpus", args.cpus, 1),
    ):
        if number < least:
            raise ValueError(f"{flag} {number}: at least {least}")
    for flag, value in (
        ("--partition", args.partition),
        ("--account", args.account),
        ("--qos", args.qos),
        ("--memory", args.memory),
        ("--constraint", args.constraint),
    ):
        if value:
            jobs.fits(flag, value, WORD, "one word of SLURM's")
    return folder


def processes(args: SlurmUp) -> int:
    return args.nodes * max(args.gpus, 1)


def batch(args: SlurmUp, folder: pathlib.Path) -> str:
    """The batch script, of which SLURM keeps a copy: it reads what is in the job's folder."""
    options = {
        "job-name": args.name,
        "nodes": args.nodes,
        "ntasks-per-node": max(args.gpus, 1),
        "gpus-per-node": args.gpus or None,
        "cpus-per-task": args.cpus,
        "mem": args.memory,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "output": f"{folder}/log",
        "open-mode": "append",
        "signal": f"TERM@{BEFORE_THE_END}",
        "export": ",".join((*KEPT, *args.secrets)),
    }
    lines = [f"#SBATCH --{k}={v}" for k, v in options.items() if v]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "#SBATCH --requeue",
            "set -uo pipefail",
            f"root={shlex.quote(str(folder))}",
            f"most={args.failures}",
            *args.before,
            BATCH,
        ]
    )


BATCH = f"""\
codes=$root/codes/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$codes"
echo "--- $(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${{SLURM_RESTART_COUNT:-0}}"
trap ':' TERM # the processes save; this shell waits for them

# Once one process has ended, the others have two minutes: they wait for each other, not for ever.
srun --export=ALL --kill-on-bad-exit=0 --wait=120 --label \\
  bash "$root/code/launch/worker.sh" task "$root" "$codes" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done

done=0 failed=0 stopped=0
for file in "$codes"/*; do
  [[ -f $file ]] || continue
  case $(<"$file") in
    0) ((done += 1)) ;;
    {jobs.SAVED}) ((stopped += 1)) ;;
    *) ((failed += 1)) ;;
  esac
done
echo "--- $(date -Is) of $SLURM_NTASKS: $done done, $stopped stopped, $failed failed"
if ((done == SLURM_NTASKS)); then
  exit 0
fi
if ((failed || !stopped)); then
  count=$(($(cat "$root/failures" 2>/dev/null || echo 0) + 1))
  echo "$count" >"$root/failures"
  if ((count > most)); then
    echo "--- failed $count times; the same jaxvid-launch command goes on from the last checkpoint"
    exit 1
  fi
fi
scontrol requeue "$SLURM_JOB_ID"
"""


def plan_up(args: SlurmUp, folder: pathlib.Path, bundle: bundles.Bundle) -> list[Step]:
    gpus = args.nodes * args.gpus
    given = (args.python,) if args.python else ()
    here = str(folder)
    script = f"{here}/job.sbatch"
    return [
        Note(
            f"{args.nodes} nodes of {args.gpus} GPUs\n"
            f"{jobs.estimate(max(gpus, 1), args.price, args.hours, 'GPU')}"
        ),
        Note(f"{folder / 'bundle.tgz'}: {bundle}; its job.sh"),
        Write(folder / "job.sh", job_script(args)),
        Command(("rm", "-rf", f"{here}/code", f"{here}/recipes", f"{here}/failures")),
        Command(("tar", "-xzf", f"{here}/bundle.tgz", "-C", here)),
        Command(("bash", f"{here}/code/launch/bootstrap.sh", here, *given)),
        Write(folder / "job.sbatch", batch(args, folder)),
        Command(("sbatch", "--test-only", script)),
        Command(("sbatch", "--parsable", script)),
    ]


def job_script(args: SlurmUp) -> str:
    config, _ = bundles.place(args.config)
    return jobs.shell(jobs.command(args, config, processes(args)))


# Verbs -------------------------------------------------------------------------------------------


def up(args: SlurmUp) -> None:
    folder = check(args)
    plan.check_secrets(args.secrets)
    jobs.check_recipe(args)
    _, recipe = bundles.place(args.config)
    bundle = bundles.pack(recipe, "cuda13" if args.gpus else "cpu", job_script(args))
    if not args.dry_run:
        plan.check_program("sbatch", REMEDY)
        if plan.call(_queued(args.target())).out.strip():
            raise SystemExit(
                f"a job {args.name!r} of yours is in the queue already; `jaxvid-launch slurm down "
                f"--name {args.name} --root {args.root} --keep` ends it, or give another --name"
            )
        bundles.save(bundle, folder / "bundle.tgz")
    plan.carry_out(plan_up(args, folder, bundle), dry_run=args.dry_run)


def _queued(at: SlurmTarget) -> Command:
    return Command(("squeue", "--me", f"--name={at.name}", "--noheader", "--format=%i %T %M %R"))


def status(at: SlurmStatus) -> None:
    folder = check_target(at)
    if not at.dry_run:
        plan.check_program("squeue", REMEDY)
    ends = Command(("grep", "--text", "^--- ", str(folder / "log")), may_fail=True)
    plan.carry_out([_queued(at), ends], dry_run=at.dry_run)


def logs(at: SlurmLogs) -> None:
    folder = check_target(at)
    if not at.dry_run and not (folder / "log").is_file():
        raise SystemExit(f"no log {folder / 'log'}: the job has not started, or --root is another")
    follow = ("--follow",) if at.follow else ()
    words = ("tail", "--lines=+1", *follow, str(folder / "log"))
    plan.carry_out([Command(words)], dry_run=at.dry_run)


def down(at: SlurmDown) -> None:
    folder = check_target(at)
    if not at.dry_run:
        plan.check_program("scancel", REMEDY)
    cancel = Command(("scancel", "--me", f"--name={at.name}"))
    remove = [] if at.keep else [Command(("rm", "-rf", str(folder)))]
    plan.carry_out([cancel, *remove], dry_run=at.dry_run)

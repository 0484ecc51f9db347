"""Any cloud that SkyPilot knows: a managed job, which SkyPilot restarts where it finds machines.

A job that ends with 143 is started again without limit, any other failure `failures` times. Hosts
of a TPU slice find each other by themselves; nodes of GPUs by the variables that JAX reads under
SLURM, which SkyPilot's own are put into: one process a node.
"""

import dataclasses
import re
import shlex
from typing import Any

from launch import bundle as bundles
from launch import job as jobs
from launch import manifest, plan, slices
from launch.plan import Command, Note, Step, Write

REMEDY = "`pip install 'skypilot[gcp]'` (or [aws], [lambda], ...), then `sky check`."
ROOT = "~/jaxvid-job"
GPU = re.compile(r"([A-Za-z][A-Za-z0-9-]*)(?::([1-9][0-9]*))?")
CLOUD = re.compile(r"[a-z][a-z0-9]*(/[a-z0-9-]+){0,2}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyTarget:
    """Which job."""

    name: str  # of the job
    dry_run: bool = False  # print what would run, and run nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyUp(jobs.Job):
    """Start the job on the cheapest machines that SkyPilot finds."""

    accelerator: str  # H100:8, A100-80GB:4, v5litepod-16, v6e-8
    nodes: int = 1  # of GPUs; a TPU slice is one
    infra: str = ""  # gcp, aws/us-east-1, kubernetes; else any that `sky check` lists
    spot: bool = False  # cheaper, and may be taken away at any time
    disk: int = 256  # GB of a machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyStatus(SkyTarget):
    """How your managed jobs stand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyLogs(SkyTarget):
    """Print the log of the job."""

    follow: bool = False  # go on as it grows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyDown(SkyTarget):
    """Cancel the job; SkyPilot takes its machines down."""


def check(args: SkyUp) -> tuple[str, int, slices.Slice | None]:
    """(the accelerator, chips of a node, the slice if it is one). Raises ValueError."""
    jobs.check(args)
    if "://" not in args.workdir:
        raise ValueError(f"--workdir {args.workdir}: a bucket, the machines come and go")
    if args.nodes < 1 or args.disk < 50:
        raise ValueError(f"--nodes {args.nodes} --disk {args.disk}: at least 1 and 50")
    if args.nodes > 1:  # of other buckets the trainer would say the same, on machines that are paid
        jobs.check_bucket("--workdir of several --nodes", args.workdir)
    if args.infra:
        jobs.fits("--infra", args.infra, CLOUD, "CLOUD, CLOUD/REGION or CLOUD/REGION/ZONE")
    if re.match(r"(tpu-)?v[0-9]", args.accelerator):
        kind = slices.find(args.accelerator.removeprefix("tpu-"))
        if args.nodes > 1:
            raise ValueError(f"--nodes {args.nodes}: a slice is one node; GKE joins several")
        return f"tpu-{kind.name}:1", kind.chips, kind
    jobs.fits("--accelerator", args.accelerator, GPU, "a GPU such as H100:8, or a TPU slice")
    name, count = GPU.fullmatch(args.accelerator).groups()
    return f"{name}:{count or 1}", int(count or 1), None


def processes(args: SkyUp, kind: slices.Slice | None) -> int:
    return args.nodes if kind is None else kind.hosts


def neighbours(chips: int) -> tuple[str, ...]:
    """Lines of shell that tell JAX of the other nodes, in the variables that it reads of SLURM."""
    ids = ",".join(str(n) for n in range(chips))
    return (
        "if ((${SKYPILOT_NUM_NODES:-1} > 1)); then",
        "  export SLURM_JOB_ID=1 SLURM_LOCALID=0",
        "  export SLURM_STEP_NODELIST=\"${SKYPILOT_NODE_IPS%%$'\\n'*}\"",
        '  export SLURM_NTASKS="$SKYPILOT_NUM_NODES" SLURM_PROCID="$SKYPILOT_NODE_RANK"',
        f"  export JAX_LOCAL_DEVICE_IDS={ids}",
        "fi",
    )


def job_script(args: SkyUp, chips: int, kind: slices.Slice | None) -> str:
    config, _ = bundles.place(args.config)
    lines = () if kind else neighbours(chips)
    return jobs.shell(jobs.command(args, config, processes(args, kind)), lines)


def task(args: SkyUp) -> dict[str, Any]:
    """SkyPilot's YAML, as data."""
    accelerator, _, kind = check(args)
    given = f" {shlex.quote(args.python)}" if args.python else ""
    resources: dict[str, Any] = {
        "accelerators": accelerator,
        "use_spot": args.spot,
        "disk_size": args.disk,
        "job_recovery": {
            "max_restarts_on_errors": args.failures,
            "recover_on_exit_codes": [jobs.SAVED],
        },
    }
    if args.infra:
        resources["infra"] = args.infra
    if kind:
        resources["accelerator_args"] = {"runtime_version": kind.runtime}
    return {
        "name": args.name,
        "resources": resources,
        "num_nodes": args.nodes,
        "file_mounts": {f"{ROOT}/bundle.tgz": str((args.folder / "bundle.tgz").resolve())},
        **({"secrets": {name: None for name in args.secrets}} if args.secrets else {}),
        "setup": (
            f"rm -rf {ROOT}/code {ROOT}/recipes\n"
            f"tar -xzf {ROOT}/bundle.tgz -C {ROOT}\n"
            f"bash {ROOT}/code/launch/bootstrap.sh {ROOT}{given}\n"
        ),
        "run": f"bash {ROOT}/job.sh\n",
    }


def plan_up(args: SkyUp, bundle: bundles.Bundle) -> list[Step]:
    accelerator, chips, kind = check(args)
    file = args.folder / "job.yaml"
    keys = tuple(word for name in args.secrets for word in ("--secret", name))
    unit = "chip" if kind else "GPU"
    return [
        Note(
            f"{args.nodes} x {accelerator}\n"
            f"{jobs.estimate(chips * args.nodes, args.price, args.hours, unit)}\n"
            "SkyPilot's controller of managed jobs is a small machine of its own"
        ),
        Note(f"{args.folder / 'bundle.tgz'}: {bundle}; its job.sh"),
        Write(args.folder / "job.sh", job_script(args, chips, kind)),
        Write(file, manifest.dump(task(args))),
        Command(("sky", "jobs", "launch", "--yes", "--detach-run", *keys, str(file))),
    ]


# Verbs -------------------------------------------------------------------------------------------


def up(args: SkyUp) -> None:
    _, chips, kind = check(args)
    plan.check_secrets(args.secrets)
    jobs.check_recipe(args)
    _, recipe = bundles.place(args.config)
    text = job_script(args, chips, kind)
    bundle = bundles.pack(recipe, "tpu" if kind else "cuda13", text)
    if not args.dry_run:
        plan.check_program("sky", REMEDY)
        bundles.save(bundle, args.folder / "bundle.tgz")
    plan.carry_out(plan_up(args, bundle), dry_run=args.dry_run)


def _sky(at: SkyTarget, *words: str) -> None:
    jobs.check_name("--name", at.name)
    if not at.dry_run:
        plan.check_program("sky", REMEDY)
    plan.carry_out([Command(("sky", "jobs", *words))], dry_run=at.dry_run)


def status(at: SkyStatus) -> None:
    _sky(at, "queue")


def logs(at: SkyLogs) -> None:
    _sky(at, "logs", "--name", at.name, "--follow" if at.follow else "--no-follow")


def down(at: SkyDown) -> None:
    _sky(at, "cancel", "--yes", "--name", at.name)

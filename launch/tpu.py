"""TPU VMs by queued resources: every command of gcloud that this takes, as words.

    request -> (WAITING_FOR_RESOURCES, PROVISIONING) -> ACTIVE -> send, set up, start on all workers
            -> report ... -> all ended with 0: delete
    SUSPENDED (a spot slice was taken away) -> delete, request again, and so on

launch.watch goes through these; one slice a job (several slices: GKE).
"""

import dataclasses
import pathlib
import re
import shlex

from launch import bundle as bundles
from launch import job as jobs
from launch import plan, slices
from launch.plan import Command, Note, Secrets, Step, Write

ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
PROJECT = re.compile(r"[a-z][-a-z0-9.:]{4,61}[a-z0-9]")
WANTED = "https://cloud.google.com/sdk/docs/install"
GCLOUD = ("gcloud", "compute", "tpus")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTarget:
    """Where the slice of a job is."""

    name: str  # of the job
    zone: str  # us-east5-b
    project: str = ""  # else gcloud's own
    out: pathlib.Path = pathlib.Path("runs/launch")  # here: what was rendered, and logs
    dry_run: bool = False  # print what would run, and run nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuUp(jobs.Job):
    """Request a slice, set it up, train, restart what is stopped, fetch the logs, delete it."""

    zone: str  # us-east5-b
    accelerator: str  # v5litepod-8, v6e-16, v5p-32: docs/launch.md has the table
    project: str = ""  # else gcloud's own
    runtime_version: str = ""  # else the one of the generation
    spot: bool = False  # cheaper, and may be taken away at any time
    reserved: bool = False  # out of your reservation
    network: str = ""  # else "default"
    service_account: str = ""  # else the project's; it must be allowed to write the bucket
    preemptions: int = 100  # so often a slice that was taken away is requested again
    poll: float = 30.0  # seconds between looks
    wait: float = 24.0  # hours in the queue before giving up
    keep: bool = False  # the slice, at the end

    def target(self) -> TpuTarget:
        return TpuTarget(
            name=self.name,
            zone=self.zone,
            project=self.project,
            out=self.out,
            dry_run=self.dry_run,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuStatus(TpuTarget):
    """How the slice and its workers stand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLogs(TpuTarget):
    """Fetch the logs of all workers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuDown(TpuTarget):
    """Stop the job, saving its state, and delete the slice."""


def check_target(at: TpuTarget) -> None:
    """Raises ValueError for what cannot be a name, a zone or a project."""
    jobs.check_name("--name", at.name)
    jobs.fits("--zone", at.zone, ZONE, "a zone such as us-east5-b")
    if at.project:
        jobs.fits("--project", at.project, PROJECT, "the id of a project")


def check(args: TpuUp) -> slices.Slice:
    """The slice that is asked for. Raises ValueError for settings that cannot work."""
    jobs.check(args)
    check_target(args.target())
    jobs.check_bucket("--workdir", args.workdir)
    if args.spot and args.reserved:
        raise ValueError("--spot and --reserved exclude each other; a reservation is paid for")
    words = re.compile(r"[\w.@/-]+")
    for flag, value in (
        ("--runtime-version", args.runtime_version),
        ("--network", args.network),
        ("--service-account", args.service_account),
    ):
        if value:
            jobs.fits(flag, value, words, "one word")
    return slices.find(args.accelerator)


# Commands ----------------------------------------------------------------------------------------


def _at(target: TpuTarget) -> tuple[str, ...]:
    project = (f"--project={target.project}",) if target.project else ()
    return (f"--zone={target.zone}", *project)


def request(args: TpuUp, kind: slices.Slice) -> Command:
    return Command(
        (
            *(*GCLOUD, "queued-resources", "create", args.name, *_at(args.target())),
            f"--node-id={args.name}",
            f"--accelerator-type={kind.name}",
            f"--runtime-version={args.runtime_version or kind.runtime}",
            *(("--spot",) if args.spot else ()),
            *(("--reserved",) if args.reserved else ()),
            *((f"--network={args.network}",) if args.network else ()),
            *((f"--service-account={args.service_account}",) if args.service_account else ()),
            "--quiet",
        )
    )


def describe(at: TpuTarget) -> Command:
    words = ("queued-resources", "describe", at.name, *_at(at), "--format=json(state)")
    return Command((*GCLOUD, *words))


def delete(at: TpuTarget) -> Command:
    words = ("queued-resources", "delete", at.name, *_at(at), "--force", "--quiet")
    return Command((*GCLOUD, *words))


def root(at: TpuTarget) -> str:
    """The job's folder on a worker, below its home."""
    return f"jaxvid-{at.name}"


def send(at: TpuTarget, files: tuple[pathlib.Path, ...]) -> Command:
    names = (str(file) for file in files)
    words = ("tpu-vm", "scp", *names, f"{at.name}:{root(at)}/", "--worker=all", *_at(at))
    return Command((*GCLOUD, *words, "--quiet"))


def on_workers(at: TpuTarget, line: str, outputs: pathlib.Path | None = None) -> Command:
    """A shell line on all workers; what worker N says goes to `outputs`/N.log, if given."""
    words = (*GCLOUD, "tpu-vm", "ssh", at.name, "--worker=all", *_at(at), f"--command={line}")
    return Command((*words, *((f"--output-directory={outputs}",) if outputs else ()), "--quiet"))


def make_room(at: TpuTarget) -> Command:
    return on_workers(at, f"mkdir -p {root(at)}")


def set_up(at: TpuTarget, python: str) -> Command:
    here = root(at)
    given = f" {shlex.quote(python)}" if python else ""
    return on_workers(
        at,
        f"rm -rf {here}/code {here}/recipes && tar -xzf {here}/bundle.tgz -C {here} && "
        f"bash {here}/code/launch/bootstrap.sh {here}{given}",
    )


def worker(at: TpuTarget, verb: str, outputs: pathlib.Path | None = None) -> Command:
    """A verb of worker.sh; `absent` where nothing was sent yet."""
    script = f"{root(at)}/code/launch/worker.sh"
    if verb == "report":
        line = f"if [ -f {script} ]; then bash {script} report {root(at)}; "
        return on_workers(at, f"{line}else echo '::jaxvid state absent'; fi", outputs)
    return on_workers(at, f"bash {script} {verb} {root(at)}", outputs)


# Plans -------------------------------------------------------------------------------------------


def pack(args: TpuUp, kind: slices.Slice) -> bundles.Bundle:
    config, recipe = bundles.place(args.config)
    text = jobs.shell(jobs.command(args, config, kind.hosts))
    return bundles.pack(recipe, "tpu", text)


def sending(args: TpuUp) -> list[Step]:
    """From an ACTIVE slice to a running job."""
    at = args.target()
    files: tuple[pathlib.Path, ...] = (args.folder / "bundle.tgz",)
    steps: list[Step] = [make_room(at)]
    if args.secrets:
        secrets = args.folder / "secrets.env"
        steps.append(Secrets(secrets, args.secrets, shell=True))
        files = (*files, secrets)
    return [*steps, send(at, files), set_up(at, args.python), worker(at, "start")]


def whole(args: TpuUp, kind: slices.Slice, bundle: bundles.Bundle) -> list[Step]:
    """What an undisturbed run executes, for a reader; launch.watch does it."""
    at, logs = args.target(), args.folder / "logs" / "1"
    often = f"every {args.poll:g} s"
    estimate = jobs.estimate(kind.chips, args.price, args.hours)
    config, recipe = bundles.place(args.config)
    text = jobs.shell(jobs.command(args, config, kind.hosts))
    return [
        Note(f"{kind.name}: {kind.chips} chips, {kind.hosts} hosts, {kind.topology}\n{estimate}"),
        Note(f"{args.folder / 'bundle.tgz'}: {bundle}; in it"),
        Write(args.folder / "job.sh", text),
        Note("if there is no such slice yet:"),
        describe(at),
        request(args, kind),
        Note(f"{often} until ACTIVE:"),
        describe(at),
        Note("if the job does not run on it yet:"),
        worker(at, "report", logs / "report"),
        *sending(args),
        Note(f"{often} until every worker has ended, with a look at the state of the slice:"),
        describe(at),
        worker(at, "report", logs / "report"),
        Note(
            f"a slice that was taken away is deleted and requested again, up to "
            f"{args.preemptions} times; a failed job is stopped on all workers and started again, "
            f"up to {args.failures} times\nat the end:"
        ),
        worker(at, "log", logs),
        *([] if args.keep else [delete(at)]),
    ]


def check_tools(at: TpuTarget) -> None:
    """Raises SystemExit saying what to install or to set."""
    plan.check_program(
        "gcloud", f"Install the Google Cloud CLI ({WANTED}), then `gcloud auth login`."
    )
    if not _setting("account"):
        raise SystemExit("gcloud has no account. Run `gcloud auth login`.")
    if not (at.project or _setting("project")):
        raise SystemExit(
            "gcloud has no project. Run `gcloud config set project PROJECT`, or give --project."
        )


def check_agent() -> None:
    """gcloud reaches several hosts at once with a key of the agent alone. Raises SystemExit."""
    plan.check_program("ssh-add", "Install OpenSSH's client.")
    if plan.call(Command(("ssh-add", "-l"))).code:
        raise SystemExit(
            "a slice of several hosts needs your key in an ssh agent: `eval $(ssh-agent)`, then "
            "`ssh-add ~/.ssh/google_compute_engine` (the first `gcloud compute ssh` makes it)."
        )


def _setting(name: str) -> str:
    """A setting of gcloud's own, or ""."""
    done = plan.call(Command(("gcloud", "config", "get-value", name, "--quiet")))
    said = done.out.strip()
    return "" if done.code or said == "(unset)" else said

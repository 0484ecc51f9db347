"""TPUs of a GKE cluster: a JobSet, or the same job through XPK.

A JobSet restarts itself in the cluster, nobody has to watch: a pod that is evicted (spot, upkeep)
or that ends with 143 fails its Job by the pod failure policy, and that restarts the set without
limit; any other failure counts against `failures`. Every pod is a bare image: an init container
fetches the archive from the bucket, and the set-up is that of every launcher. Left out: GPUs of GKE
(sky has them).
"""

import dataclasses
import json
import pathlib
import re
import shlex
from typing import Any, Literal

from launch import bundle as bundles
from launch import job as jobs
from launch import manifest, plan, slices
from launch.plan import Command, Note, Secrets, Step, Write

ROOT = "/jaxvid"
LOCKED_KIB = 68719476736  # the TPU's driver locks memory; a pod without privileges must allow it
REMEDY = {
    "kubectl": "`gcloud components install kubectl gke-gcloud-auth-plugin`, then `gcloud container "
    "clusters get-credentials CLUSTER`.",
    "gcloud": "Install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install).",
    "xpk": "`pip install xpk`, or leave out --via xpk.",
}
CONTEXT = re.compile(r"[\w.:@/-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeTarget:
    """Which job of which cluster."""

    name: str  # of the job
    context: str = ""  # of kubectl; else the current one
    namespace: str = "default"
    out: pathlib.Path = pathlib.Path("runs/launch")  # here: what was rendered, and logs
    dry_run: bool = False  # print what would run, and run nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeUp(jobs.Job):
    """Send the code to the bucket and start the job in the cluster."""

    accelerator: str  # v5litepod-16, v6e-16, v5p-32: docs/launch.md has the table
    slices: int = 1  # of them, joined by the data-centre network
    context: str = ""  # of kubectl; else the current one
    namespace: str = "default"
    image: str = "python:3.12-slim-bookworm"  # anything with bash and apt-get will do
    service_account: str = "default"  # of Kubernetes; it must be allowed to use the bucket
    spot: bool = False  # nodes that may be taken away at any time
    chips_per_host: int = 0  # 4 where a node pool has 2x4 slices as two hosts; 0: as Cloud TPU has
    disk: str = "30Gi"  # of a host, for code and environment
    queue: str = ""  # LocalQueue of Kueue, if the cluster has it
    via: Literal["jobset", "xpk"] = "jobset"
    cluster: str = ""  # for XPK
    zone: str = ""  # for XPK
    project: str = ""  # for XPK; else gcloud's own

    def target(self) -> GkeTarget:
        return GkeTarget(
            name=self.name,
            context=self.context,
            namespace=self.namespace,
            out=self.out,
            dry_run=self.dry_run,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeStatus(GkeTarget):
    """How the JobSet and its pods stand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeLogs(GkeTarget):
    """The logs of all pods, of this attempt."""

    follow: bool = False  # go on as they grow


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeDown(GkeTarget):
    """Delete the job and its keys; pods get SIGTERM and save."""


def check_target(at: GkeTarget) -> None:
    """Raises ValueError for what cannot be a name."""
    jobs.check_name("--name", at.name)
    jobs.check_name("--namespace", at.namespace)
    if at.context:
        jobs.fits("--context", at.context, CONTEXT, "a context of kubectl")


def check(args: GkeUp) -> slices.Slice:
    """The slice that is asked for. Raises ValueError for settings that cannot work."""
    jobs.check(args)
    check_target(args.target())
    jobs.check_bucket("--workdir", args.workdir)
    jobs.fits("--image", args.image, re.compile(r"[\w./:@-]+"), "the name of an image")
    jobs.check_name("--service-account", args.service_account)
    jobs.fits("--disk", args.disk, re.compile(r"[1-9][0-9]*[MGT]i"), "a size such as 30Gi")
    if args.queue:
        jobs.check_name("--queue", args.queue)
    if args.slices < 1:
        raise ValueError(f"--slices {args.slices}: at least 1")
    kind = slices.find(args.accelerator)
    if args.chips_per_host:
        if args.chips_per_host > kind.chips or kind.chips % args.chips_per_host:
            raise ValueError(
                f"--chips-per-host {args.chips_per_host} does not divide the {kind.chips} chips of "
                f"{kind.name}"
            )
        kind = kind._replace(hosts=kind.chips // args.chips_per_host)
    if args.via == "xpk":
        for flag, value in (("--cluster", args.cluster), ("--zone", args.zone)):
            if not value:
                raise ValueError(f"--via xpk needs {flag}")
            jobs.check_name(flag, value)
        if args.secrets:
            raise ValueError(
                "XPK writes variables into the manifest, where others of the cluster can read them;"
                " --secrets needs --via jobset, which keeps them in a Secret"
            )
    return kind


# Rendering ---------------------------------------------------------------------------------------


def archive(args: GkeUp, bundle: bundles.Bundle) -> str:
    return f"{args.workdir.rstrip('/')}/code/{bundle.digest}.tgz"


def jobset(args: GkeUp, kind: slices.Slice, bundle: bundles.Bundle) -> dict[str, Any]:
    """The manifest. `name` of a failure rule has no default in older versions of JobSet."""
    metadata: dict[str, Any] = {"name": args.name, "namespace": args.namespace}
    if kind.hosts > 1:  # a slice is a node pool: its pods never end up on two
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    if args.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": args.queue}
    evicted = {"type": "DisruptionTarget", "status": "True"}
    saved = {"containerName": "train", "operator": "In", "values": [jobs.SAVED]}
    template = {
        "spec": {
            "parallelism": kind.hosts,
            "completions": kind.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # a lost process stops all: the set restarts, not the pod
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [evicted]},
                    {"action": "FailJob", "onExitCodes": saved},
                ]
            },
            "template": {"spec": _pod(args, kind, bundle)},
        }
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.failures,
                "rules": [
                    {
                        "name": "stopped",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": template}],
        },
    }


def _pod(args: GkeUp, kind: slices.Slice, bundle: bundles.Bundle) -> dict[str, Any]:
    place = {"name": "jaxvid", "mountPath": ROOT}
    given = f" {shlex.quote(args.python)}" if args.python else ""
    train = (
        f"ulimit -l {LOCKED_KIB}\n"
        f"tar -xzf {ROOT}/bundle.tgz -C {ROOT}\n"
        f"bash {ROOT}/code/launch/bootstrap.sh {ROOT}{given}\n"
        f"exec bash {ROOT}/job.sh\n"
    )
    fetch = {
        "name": "fetch",
        "image": "google/cloud-sdk:slim",
        "command": ["gcloud", "storage", "cp", archive(args, bundle), f"{ROOT}/bundle.tgz"],
        "volumeMounts": [place],
    }
    container: dict[str, Any] = {
        "name": "train",
        "image": args.image,
        "command": ["bash", "-euo", "pipefail", "-c", train],
        "ports": [  # among the hosts of a slice, and among slices
            {"containerPort": port, "protocol": "TCP"} for port in (8471, 8080)
        ],
        "securityContext": {"capabilities": {"add": ["SYS_RESOURCE"]}},  # for ulimit
        "resources": {
            "requests": {"google.com/tpu": kind.chips_per_host},
            "limits": {"google.com/tpu": kind.chips_per_host},
        },
        "volumeMounts": [place],
    }
    if args.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret(args.target())}}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind.label,
        "cloud.google.com/gke-tpu-topology": kind.topology,
    }
    return {
        "restartPolicy": "Never",
        "serviceAccountName": args.service_account,
        "terminationGracePeriodSeconds": 300,  # to save; spot nodes give 15 to 25 seconds of it
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if args.spot else {}),
        "initContainers": [fetch],
        "containers": [container],
        "volumes": [{"name": "jaxvid", "emptyDir": {"sizeLimit": args.disk}}],
    }


# Commands ----------------------------------------------------------------------------------------


def secret(at: GkeTarget) -> str:
    return f"{at.name}-keys"


def kubectl(at: GkeTarget, *words: str, may_fail: bool = False) -> Command:
    context = (f"--context={at.context}",) if at.context else ()
    return Command(("kubectl", *context, f"--namespace={at.namespace}", *words), may_fail)


def _sum(args: GkeUp, kind: slices.Slice) -> Note:
    chips = kind.chips * args.slices
    return Note(
        f"{args.slices} x {kind.name}: {chips} chips, {kind.hosts} hosts a slice, "
        f"{kind.topology}\n{jobs.estimate(chips, args.price, args.hours)}"
    )


def plan_up(args: GkeUp, kind: slices.Slice, bundle: bundles.Bundle) -> list[Step]:
    at, folder = args.target(), args.folder
    steps: list[Step] = [
        _sum(args, kind),
        Note(f"{folder / 'bundle.tgz'}: {bundle}; its job.sh"),
        Write(folder / "job.sh", script(args, kind)),
        Command(("gcloud", "storage", "cp", str(folder / "bundle.tgz"), archive(args, bundle))),
    ]
    if args.secrets:
        keys = folder / "keys.env"
        steps += [
            kubectl(at, "delete", "secret", secret(at), "--ignore-not-found"),
            Secrets(keys, args.secrets, shell=False),
            kubectl(at, "create", "secret", "generic", secret(at), f"--from-env-file={keys}"),
        ]
    file = folder / "jobset.yaml"
    return [
        *steps,
        Write(file, manifest.dump(jobset(args, kind, bundle))),
        kubectl(at, "create", f"--filename={file}"),  # `apply` would leave an ended one ended
    ]


def plan_xpk(args: GkeUp, kind: slices.Slice, bundle: bundles.Bundle) -> list[Step]:
    """XPK makes an image of the base image and of the unpacked archive, and the JobSet itself."""
    folder = args.folder / "image"
    given = f" {shlex.quote(args.python)}" if args.python else ""
    line = f"cd /app && bash code/launch/bootstrap.sh /app{given} && exec bash job.sh"
    words = (
        *("xpk", "workload", "create", f"--cluster={args.cluster}", f"--zone={args.zone}"),
        *((f"--project={args.project}",) if args.project else ()),
        *(f"--workload={args.name}", f"--tpu-type={kind.name}", f"--num-slices={args.slices}"),
        *(f"--base-docker-image={args.image}", f"--script-dir={folder}"),
        *(f"--max-restarts={args.failures}", "--restart-on-exit-codes=1"),
        *(("--spot",) if args.spot else ()),
        *("--termination-grace-period-seconds=300", f"--command={line}"),
    )
    return [
        _sum(args, kind),
        Note(
            f"{args.folder / 'bundle.tgz'}: {bundle}\n"
            "XPK restarts after 1, Python's code of an error, and after 127 to 255; it counts\n"
            "evictions as failures, and --failures bounds both"
        ),
        Command(("mkdir", "-p", str(folder))),
        Command(("tar", "-xzf", str(args.folder / "bundle.tgz"), "-C", str(folder))),
        Command(words),
    ]


def script(args: GkeUp, kind: slices.Slice) -> str:
    config, _ = bundles.place(args.config)
    return jobs.shell(jobs.command(args, config, kind.hosts * args.slices))


# Verbs -------------------------------------------------------------------------------------------


def up(args: GkeUp) -> None:
    kind = check(args)
    plan.check_secrets(args.secrets)
    jobs.check_recipe(args)
    _, recipe = bundles.place(args.config)
    bundle = bundles.pack(recipe, "tpu", script(args, kind))
    steps = (plan_xpk if args.via == "xpk" else plan_up)(args, kind, bundle)
    if not args.dry_run:
        check_tools("xpk" if args.via == "xpk" else "kubectl", "gcloud")
        if args.via == "jobset":
            _check_cluster(args.target())
        bundles.save(bundle, args.folder / "bundle.tgz")
    try:
        plan.carry_out(steps, dry_run=args.dry_run)
    finally:
        if not args.dry_run:
            (args.folder / "keys.env").unlink(missing_ok=True)


def status(at: GkeStatus) -> None:
    check_target(at)
    pods = kubectl(at, "get", "pods", "--output=wide", f"--selector={_selector(at)}")
    if not at.dry_run:
        check_tools("kubectl")
        print(told(at))
    else:
        print(f"{_get(at)}")
    plan.carry_out([pods], dry_run=at.dry_run)


def told(at: GkeTarget) -> str:
    """One line on the JobSet: its condition and how often it restarted."""
    done = plan.call(_get(at))
    if done.code:
        return f"{at.name}: {done.err.strip()}"
    now = json.loads(done.out).get("status", {})
    ended = [c["type"] for c in now.get("conditions", []) if c["status"] == "True"]
    count = now.get("restarts", 0)
    return f"{at.name}: {', '.join(ended) or 'running or waiting for nodes'}, {count} restarts"


def _get(at: GkeTarget) -> Command:
    return kubectl(at, "get", "jobset", at.name, "--output=json")


def _selector(at: GkeTarget) -> str:
    return f"jobset.sigs.k8s.io/jobset-name={at.name}"


def logs(at: GkeLogs) -> None:
    check_target(at)
    words = ("--container=train", "--prefix", "--tail=-1", "--max-log-requests=64")
    follow = ("--follow",) if at.follow else ()
    if not at.dry_run:
        check_tools("kubectl")
    step = kubectl(at, "logs", f"--selector={_selector(at)}", *words, *follow)
    plan.carry_out([step], dry_run=at.dry_run)


def down(at: GkeDown) -> None:
    check_target(at)
    if not at.dry_run:
        check_tools("kubectl")
    plan.carry_out(
        [
            kubectl(at, "delete", "jobset", at.name, "--ignore-not-found", "--wait"),
            kubectl(at, "delete", "secret", secret(at), "--ignore-not-found"),
        ],
        dry_run=at.dry_run,
    )


def check_tools(*programs: str) -> None:
    """Raises SystemExit saying what to install."""
    for program in programs:
        plan.check_program(program, REMEDY[program])


def _check_cluster(at: GkeTarget) -> None:
    """Raises SystemExit when there is no cluster, or no JobSet in it."""
    done = plan.call(kubectl(at, "get", "crd", "jobsets.jobset.x-k8s.io"), timeout=60)
    if done.code and "NotFound" in done.err:
        raise SystemExit(
            "the cluster has no JobSet. Install it: https://jobset.sigs.k8s.io/docs/installation"
        )
    if done.code:
        raise SystemExit(
            f"kubectl reaches no cluster: {done.err.strip()}\n`gcloud container clusters "
            "get-credentials CLUSTER --location ZONE` makes it known, or give --context."
        )

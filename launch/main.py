"""jaxvid-launch: start runs, here or elsewhere.

jaxvid-launch local [--workdir runs/local] [--videos DIR] [--fast]

jaxvid-launch {tpu,gke,slurm,sky} up CONFIG --name NAME --workdir FOLDER ... [-- RECIPE'S FLAGS]

jaxvid-launch {tpu,gke,slurm,sky} {status,logs,down} --name NAME ...

jaxvid-launch preflight CONFIG [--topology v5p:4x4x4] [--search rows]
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, Union

import tyro

from launch import gke, job, sky, slurm, tpu, watch
from launch.local import Local, local
from launch.preflight import Preflight, preflight

VERBS = {  # TpuUp is `tpu up`
    Local: local,
    Preflight: preflight,
    tpu.TpuUp: watch.up,
    tpu.TpuStatus: watch.status,
    tpu.TpuLogs: watch.logs,
    tpu.TpuDown: watch.down,
    gke.GkeUp: gke.up,
    gke.GkeStatus: gke.status,
    gke.GkeLogs: gke.logs,
    gke.GkeDown: gke.down,
    slurm.SlurmUp: slurm.up,
    slurm.SlurmStatus: slurm.status,
    slurm.SlurmLogs: slurm.logs,
    slurm.SlurmDown: slurm.down,
    sky.SkyUp: sky.up,
    sky.SkyStatus: sky.status,
    sky.SkyLogs: sky.logs,
    sky.SkyDown: sky.down,
}
GROUPS = {
    "tpu": "TPU VMs by queued resources of Google Cloud.",
    "gke": "TPUs of a GKE cluster, as a JobSet or through XPK.",
    "slurm": "GPUs of a SLURM cluster.",
    "sky": "Any cloud, by SkyPilot.",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `jaxvid-launch`."""
    words = sys.argv[1:] if argv is None else argv
    behind: tuple[str, ...] = ()
    if "--" in words:
        cut = words.index("--")
        words, behind = words[:cut], tuple(words[cut + 1 :])
    command = tyro.extras.subcommand_cli_from_dict(
        _commands(), prog="jaxvid-launch", description=__doc__, args=words
    )
    if behind:
        if not isinstance(command, job.Job):
            raise SystemExit(f"nothing comes after `--` here, not {' '.join(behind)}")
        command = dataclasses.replace(command, arguments=behind)
    try:
        VERBS[type(command)](command)
    except (ValueError, FileNotFoundError) as error:  # what a user can mend
        raise SystemExit(f"jaxvid-launch: {error}") from None


def _commands() -> dict[str, Callable[..., Any]]:
    """Verbs of one word, and groups of verbs of two."""
    commands: dict[str, Callable[..., Any]] = {}
    groups: dict[str, dict[str, type]] = {}
    for kind in VERBS:
        first, *rest = re.findall("[A-Z][a-z]*", kind.__name__)
        if rest:
            groups.setdefault(first.lower(), {})["-".join(rest).lower()] = kind
        else:
            commands[first.lower()] = kind
    return commands | {name: _group(name, verbs) for name, verbs in groups.items()}


def _group(name: str, verbs: dict[str, type]) -> Callable[..., Any]:
    """What tyro takes as a command whose only argument is another command."""

    def act(action: Any) -> Any:
        return action

    kinds = tuple(Annotated[k, tyro.conf.subcommand(name=verb)] for verb, k in verbs.items())
    act.__annotations__ = {"action": Union[kinds]}  # noqa: UP007  # as many as there are
    act.__doc__ = GROUPS[name]
    return tyro.conf.configure(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)(act)


if __name__ == "__main__":
    main()

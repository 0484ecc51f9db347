"""What GKE and SkyPilot are given, held against their schemas."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
import yaml
from launched import TPU, UP, check_shell

from launch import bundle as bundles
from launch import gke, job, manifest, sky
from launch.main import main

# GKE ---------------------------------------------------------------------------------------------


def rendered(**flags):
    settings = {"accelerator": "v6e-16", "service_account": "trainer", **flags}
    args = gke.GkeUp(**TPU, **settings)
    kind = gke.check(args)
    text = manifest.dump(gke.jobset(args, kind, bundles.Bundle(b"", "abc", ())))
    return yaml.safe_load(text), text


VARIANTS = [
    {},
    {"accelerator": "v5litepod-8", "spot": True},
    {"accelerator": "v5p-32", "slices": 2, "queue": "team", "secrets": ("WANDB_API_KEY",)},
    {"accelerator": "v5litepod-8", "chips_per_host": 4, "python": "/opt/env/bin/python"},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_the_jobset_fits_its_schema(flags):
    """Read by the models of the API: a field that they do not know would be lost on the way."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    value, text = rendered(**flags)
    assert models.JobsetV1alpha2JobSet.from_dict(value).to_dict() == value
    assert "&id" not in text and "|" in text


@pytest.mark.slow
@pytest.mark.parametrize("flags", VARIANTS, ids=str)
def test_the_job_in_the_jobset_fits_the_schema_of_kubernetes(flags):
    validate = pytest.importorskip("kubernetes_validate")
    (group,) = rendered(**flags)[0]["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice-0"}}
    validate.validate(whole | group["template"], "1.33", strict=True)
    with pytest.raises(validate.ValidationError):
        group["template"]["spec"]["paralelism"] = 1
        validate.validate(whole | group["template"], "1.33", strict=True)


def test_what_the_jobset_asks_for():
    value, _ = rendered(**VARIANTS[2])
    (group,) = value["spec"]["replicatedJobs"]
    inner = group["template"]["spec"]
    pod = inner["template"]["spec"]
    assert group["replicas"] == 2 and inner["parallelism"] == inner["completions"] == 4
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "demo-keys"}}]
    # Stopped: without limit. Failed: as often as the user says.
    assert value["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert [r["action"] for r in inner["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    assert inner["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [job.SAVED]
    assert pod["restartPolicy"] == "Never"  # else there is no pod failure policy
    single, _ = rendered(accelerator="v5litepod-8")
    assert "annotations" not in single["metadata"]
    halves, _ = rendered(**VARIANTS[3])
    assert halves["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 2


def test_what_kubectl_is_asked_and_in_which_order(tmp_path, monkeypatch, capsys):
    """All verbs against a kubectl that writes down its words."""
    for program in ("kubectl", "gcloud"):
        file = tmp_path / program
        file.write_text(
            f'#!/bin/sh\necho {program} "$@" >>{tmp_path}/calls\n'
            f'for word; do case $word in --from-env-file=*) cp "${{word#*=}}" {tmp_path}/keys;; '
            'esac; done\necho \'{"status": {"restarts": 2}}\'\n'
        )
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    out = tmp_path / "out"
    main([*UP["gke"], "--secrets", "WANDB_API_KEY", "--out", str(out)])
    main(["gke", "status", "--name", "demo", "--out", str(out)])
    main(["gke", "down", "--name", "demo", "--out", str(out)])
    calls = (tmp_path / "calls").read_text()
    assert [" ".join(line.split()[:4]) for line in calls.splitlines()] == [
        "kubectl --namespace=default get crd",
        f"gcloud storage cp {out}/demo/bundle.tgz",
        "kubectl --namespace=default delete secret",
        "kubectl --namespace=default create secret",
        f"kubectl --namespace=default create --filename={out}/demo/jobset.yaml",
        "kubectl --namespace=default get jobset",
        "kubectl --namespace=default get pods",
        "kubectl --namespace=default delete jobset",
        "kubectl --namespace=default delete secret",
    ]
    assert (tmp_path / "keys").read_text() == "WANDB_API_KEY=a-secret-value\n"
    assert "a-secret-value" not in calls and not (out / "demo" / "keys.env").exists()
    assert "running or waiting for nodes, 2 restarts" in capsys.readouterr().out
    assert yaml.safe_load((out / "demo" / "jobset.yaml").read_text())["kind"] == "JobSet"


XPK = ("--via", "xpk", "--cluster", "mine", "--zone", "us-east5-b")


def test_xpk_gets_the_same_job(monkeypatch, capsys):
    main([*UP["gke"], *XPK, "--dry-run"])
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"] and "--tpu-type=v6e-16" in words
    assert (
        words[-1] == "--command=cd /app && bash code/launch/bootstrap.sh /app && exec bash job.sh"
    )
    monkeypatch.setenv("KEY", "x")
    with pytest.raises(SystemExit, match="--secrets needs --via jobset"):
        main([*UP["gke"], *XPK, "--secrets", "KEY"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("xpk") is None, reason="needs XPK: pip install xpk")
def test_xpk_knows_every_flag(capsys):
    main([*UP["gke"], *XPK, "--spot", "--project", "a-project", "--dry-run"])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    told = subprocess.run([*words[:3], "--help"], capture_output=True, text=True).stdout
    assert all(w.partition("=")[0] in told for w in words[3:])


# SkyPilot ----------------------------------------------------------------------------------------

TASKS = [
    {"accelerator": "H100:8", "nodes": 2, "spot": True, "infra": "aws/us-east-1"},
    {"accelerator": "v5litepod-16", "infra": "gcp", "secrets": ("WANDB_API_KEY",)},
    {"accelerator": "A100-80GB:4"},
]


@pytest.mark.parametrize("flags", TASKS, ids=str)
def test_the_task_of_skypilot(flags, tmp_path):
    args = sky.SkyUp(**TPU, **flags)
    accelerator, chips, kind = sky.check(args)
    value = sky.task(args)
    assert yaml.safe_load(manifest.dump(value)) == value
    assert value["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 3,
        "recover_on_exit_codes": [143],
    }
    assert set(value.get("secrets", {}).values()) <= {None}
    for part in ("setup", "run"):
        check_shell(value[part], tmp_path, f"{part}.sh")
    check_shell(sky.job_script(args, chips, kind), tmp_path, "job.sh")
    assert accelerator == {16: "tpu-v5litepod-16:1", 8: "H100:8", 4: "A100-80GB:4"}[chips]
    assert sky.processes(args, kind) == {16: 4, 8: 2, 4: 1}[chips]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sky") is None, reason="needs SkyPilot: pip install skypilot")
def test_skypilot_reads_the_task(tmp_path):
    """By SkyPilot's own parser, in its own environment; only the bundle has to be there."""
    python = pathlib.Path(shutil.which("sky")).with_name("python")
    read = "import sys, sky; t = sky.Task.from_yaml(sys.argv[1]); print(t.num_nodes, t.resources)"
    for flags in TASKS:
        args = sky.SkyUp(**TPU, **flags, out=tmp_path)
        bundles.save(bundles.Bundle(b"", "", ()), args.folder / "bundle.tgz")
        value = sky.task(args)
        value["secrets"] = dict.fromkeys(value.get("secrets", {}), "x")  # as --secret would
        for wrong in ({}, {"nmae": "x"}):
            (tmp_path / "job.yaml").write_text(manifest.dump(value | wrong))
            done = subprocess.run(
                [str(python), "-c", read, str(tmp_path / "job.yaml")],
                capture_output=True,
                text=True,
                env={**os.environ, "HOME": str(tmp_path)},
            )
            assert (done.returncode != 0) == bool(wrong), done.stderr[-2000:]


def test_jax_finds_the_nodes_of_skypilot_as_those_of_slurm(tmp_path, monkeypatch):
    lines = "\n".join(sky.neighbours(2))
    variables = {
        "PATH": os.environ["PATH"],
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    words = ["bash", "-euo", "pipefail", "-c", f"{lines}\nenv"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    told = dict(x.split("=", 1) for x in done.stdout.splitlines() if "=" in x)
    assert told["JAX_LOCAL_DEVICE_IDS"] == "0,1"
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name in [n for n in told if n.startswith("SLURM_")]:
        monkeypatch.setenv(name, told[name])
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, "1234") == "10.0.0.1:1234"
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (2, 1)
    variables["SKYPILOT_NUM_NODES"] = "1"
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert "SLURM" not in done.stdout

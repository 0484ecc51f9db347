"""The words of the launchers, read by the real programs where a machine has them.

None of it reaches a cloud: gcloud has no account, kubectl no cluster, and both read all their
flags before they find that out. All of it is slow, and skipped without the program.
"""

import os
import shlex
import shutil
import subprocess

import pytest

from launch import slurm
from launch.main import main

pytestmark = pytest.mark.slow
TPU = [
    *("tpu", "up", "tiny_sft", "--name", "demo", "--workdir", "gs://bucket/run"),
    *("--zone", "us-east5-b", "--accelerator", "v6e-16", "--project", "a-project"),
    *("--network", "default", "--service-account", "a@b.iam.gserviceaccount.com"),
]
GKE = ["--name", "demo", "--namespace", "team", "--context", "mine"]
AT = ["--name", "demo", "--zone", "us-east5-b", "--project", "a-project"]


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def printed(words, capsys, program):
    main([*words, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(x.removesuffix(" || true")) for x in lines if x.startswith(f"{program} ")]


def said(words, folder):
    """What the program says in an empty home, to nobody."""
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "CLOUDSDK_CONFIG": str(folder / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "KUBECONFIG": str(folder / "kube"),
    }
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode, words  # there is nobody to answer
    return done.stderr


@needs("gcloud")
@pytest.mark.parametrize(
    "words",
    [[*TPU, "--spot"], [*TPU, "--reserved"], ["tpu", "status", *AT], ["tpu", "down", *AT]],
    ids=lambda w: " ".join(w[1:2] + w[-1:]),
)
def test_gcloud_reads_every_command(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/launch/demo/logs/1/report", "runs/launch/demo/status"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/launch/demo/bundle.tgz").write_text("")
    seen = set()
    for command in printed(words, capsys, "gcloud"):
        if tuple(command[:5]) in seen and "ssh" in command:
            continue  # the same flags again
        seen.add(tuple(command[:5]))
        told = said(command, tmp_path)
        assert "account" in told and "unrecognized" not in told, (command, told)
    assert "unrecognized arguments" in said([*command, "--no-such-flag"], tmp_path)


@needs("kubectl")
@pytest.mark.parametrize("verb", ["up", "status", "logs", "down"])
def test_kubectl_reads_every_command(verb, tmp_path, monkeypatch, capsys):
    (tmp_path / "kube").write_text(
        "apiVersion: v1\nkind: Config\n"
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}]\n"
        "contexts: [{name: mine, context: {cluster: c, user: ''}}]\n"
    )
    monkeypatch.setenv("KEY", "x")
    up = ["tiny_sft", "--workdir", "gs://bucket/run", "--accelerator", "v6e-16", "--secrets", "KEY"]
    flags = {"up": up, "logs": ["--follow"]}.get(verb, [])
    out = ["--out", str(tmp_path)]
    (tmp_path / "demo").mkdir()
    for name in ("keys.env", "jobset.yaml"):
        (tmp_path / "demo" / name).write_text("")
    commands = printed(["gke", verb, *flags, *GKE, *out], capsys, "kubectl")
    assert commands
    for command in commands:
        told = said(command, tmp_path)
        assert "unknown" not in told, (command, told)
        assert "refused" in told or "no objects passed" in told, (command, told)


@pytest.mark.skipif(
    shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="needs a SLURM controller that answers",
)
def test_sbatch_accepts_the_script(tmp_path):
    args = slurm.SlurmUp(
        config="tiny_sft",
        name="demo",
        workdir=str(tmp_path),
        root=tmp_path,
        gpus=0,
        cpus=1,
        time="00:10:00",
    )
    script = tmp_path / "job.sbatch"
    script.write_text(slurm.batch(args, slurm.check(args)))
    done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script.write_text(script.read_text().replace("--requeue", "--requeued"))
    assert subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True).returncode

"""What the launchers render: slices, commands, manifests, scripts; and what they refuse."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib

import pytest
import yaml

from launch import bundle as bundles
from launch import gke, job, manifest, plan, sky, slices, slurm, tpu
from launch.main import main

ROOT = pathlib.Path(__file__).parent.parent
UP = {
    "tpu": [
        *("tpu", "up", "tiny_sft", "--name", "demo", "--workdir", "gs://bucket/run"),
        *("--zone", "us-east5-b", "--accelerator", "v5litepod-16"),
    ],
    "gke": [
        *("gke", "up", "tiny_sft", "--name", "demo", "--workdir", "gs://bucket/run"),
        *("--accelerator", "v6e-16"),
    ],
    "slurm": [
        *("slurm", "up", "tiny_sft", "--name", "demo", "--workdir", "/shared/run"),
        *("--root", "/shared/jobs", "--nodes", "2"),
    ],
    "sky": [
        *("sky", "up", "tiny_sft", "--name", "demo", "--workdir", "gs://bucket/run"),
        *("--accelerator", "H100:8", "--nodes", "2"),
    ],
}
TPU = dict(config="tiny_sft", name="demo", workdir="gs://bucket/run")


def check_shell(text, tmp_path, name):
    file = tmp_path / name
    file.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}")
    subprocess.run(["bash", "-n", str(file)], check=True)
    done = subprocess.run(["shellcheck", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Slices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, topology, chips, hosts, machine",
    [  # rows of Cloud TPU's own tables
        ("v5litepod-1", "1x1", 1, 1, "ct5lp-hightpu-1t"),
        ("v5litepod-8", "2x4", 8, 1, "ct5lp-hightpu-8t"),
        ("v5litepod-16", "4x4", 16, 4, "ct5lp-hightpu-4t"),
        ("v5e-256", "16x16", 256, 64, "ct5lp-hightpu-4t"),
        ("v6e-4", "2x2", 4, 1, "ct6e-standard-4t"),
        ("v6e-8", "2x4", 8, 1, "ct6e-standard-8t"),
        ("v6e-64", "8x8", 64, 16, "ct6e-standard-4t"),
        ("v5p-8", "2x2x1", 4, 1, "ct5p-hightpu-4t"),
        ("v5p-16", "2x2x2", 8, 2, "ct5p-hightpu-4t"),
        ("v5p-128", "4x4x4", 64, 16, "ct5p-hightpu-4t"),
        ("v5p-4096", "8x16x16", 2048, 512, "ct5p-hightpu-4t"),
    ],
)
def test_slices_are_those_of_cloud_tpu(name, topology, chips, hosts, machine):
    found = slices.find(name)
    assert found[1:4] == (topology, chips, hosts) and found.machine == machine
    assert found.chips_per_host * found.hosts == chips


@pytest.mark.parametrize(
    "asked, near",
    [("v5litepod-12", "v5litepod-8"), ("v5e-17", "v5litepod-16"), ("v6-8", "v6e-8")]
    + [("v5p-24", "v5p-16"), ("v6e-big", "v6e-1"), ("", "v")],
)
def test_an_unknown_slice_names_the_nearest(asked, near):
    with pytest.raises(ValueError, match=f"no TPU slice .* nearest are .*{near}"):
        slices.find(asked)


# What is refused ---------------------------------------------------------------------------------

WRONG = [
    ("tpu", ["--name", "Demo"], "--name 'Demo': it must be small letters"),
    ("tpu", ["--name", "a;rm -rf"], "--name"),
    ("tpu", ["--zone", "us-east5"], "--zone 'us-east5': it must be a zone"),
    ("tpu", ["--project", "x y"], "--project"),
    ("tpu", ["--workdir", "runs/a"], "--workdir 'runs/a': it must be gs://BUCKET/FOLDER"),
    ("tpu", ["--workdir", "gs://bucket/$(id)"], "--workdir"),
    ("tpu", ["--accelerator", "v5litepod-9"], "nearest are v5litepod-8"),
    ("tpu", ["--spot", "--reserved"], "exclude each other"),
    ("tpu", ["--failures", "-1"], "is negative"),
    ("tpu", ["--network", "a b"], "--network"),
    ("tpu", ["--python", "/usr/bin/python3; id"], "--python"),
    ("tpu", ["--secrets", "KEY=value"], "name of a variable, never its value"),
    ("tpu", ["--secrets", "NOT_SET_HERE"], "export NOT_SET_HERE=..."),
    ("gke", ["--image", "a b"], "--image"),
    ("gke", ["--slices", "0"], "at least 1"),
    ("gke", ["--chips-per-host", "3"], "does not divide the 16 chips"),
    ("gke", ["--disk", "30"], "a size such as 30Gi"),
    ("gke", ["--via", "xpk"], "needs --cluster"),
    ("gke", ["--context", "a;b"], "--context"),
    ("slurm", ["--root", "jobs"], "an absolute path"),
    ("slurm", ["--workdir", "runs/a"], "an absolute path, the job runs elsewhere"),
    ("slurm", ["--time", "1h"], "HOURS:MINUTES:SECONDS"),
    ("slurm", ["--time", "0:05:00"], "leaves no time to train"),
    ("slurm", ["--partition", "a b"], "--partition"),
    ("slurm", ["--nodes", "0"], "--nodes 0: at least 1"),
    ("sky", ["--workdir", "/data/run"], "a bucket, the machines come and go"),
    ("sky", ["--accelerator", "8xH100"], "a GPU such as H100:8"),
    ("sky", ["--accelerator", "v6e-9"], "nearest are v6e-8"),
    ("sky", ["--accelerator", "v6e-8"], "a slice is one node"),
    ("sky", ["--infra", "aws; id"], "--infra"),
]


@pytest.mark.parametrize("launcher, flags, told", WRONG, ids=lambda x: str(x)[:30])
def test_bad_settings_are_refused_before_anything_runs(launcher, flags, told, monkeypatch):
    monkeypatch.setattr(plan, "carry_out", pytest.fail)
    with pytest.raises(SystemExit, match=re.escape(told)):
        main([*UP[launcher], *flags])


@pytest.mark.parametrize("config, told", [("tiny_sff", "no recipe"), ("mine.py", "no config file")])
def test_a_recipe_that_is_not_there_is_refused(config, told):
    words = [config if w == "tiny_sft" else w for w in UP["tpu"]]
    with pytest.raises(SystemExit, match=told):
        main(words)


def test_a_wrong_flag_of_the_recipe_is_found_here_and_not_on_the_slice(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*UP["tpu"], "--", "--optimizer.lrr", "1"])
    assert stop.value.code == 2 and "--optimizer.lr" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing comes after `--` here"):
        main(["tpu", "down", "--name", "a", "--zone", "us-east5-b", "--", "x"])


@pytest.mark.parametrize(
    "launcher, program, remedy",
    [
        ("tpu", "gcloud", "Install the Google Cloud CLI"),
        ("gke", "kubectl", "gcloud components install kubectl"),
        ("slurm", "sbatch", "login node"),
        ("sky", "sky", "pip install 'skypilot"),
    ],
)
def test_a_tool_that_is_missing_says_how_to_get_it(launcher, program, remedy, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match=f"no program '{program}' on PATH. .*{remedy}"):
        main(UP[launcher])


def test_kubectl_without_a_cluster_and_a_cluster_without_jobset(tmp_path, monkeypatch):
    program = tmp_path / "kubectl"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shutil.copy("/bin/true", tmp_path / "gcloud")
    for said, told in (
        ("The connection to the server was refused", "get-credentials"),
        ("Error from server (NotFound): crd", "has no JobSet. Install it"),
    ):
        program.write_text(f"#!/bin/sh\necho {shlex.quote(said)} >&2; exit 1\n")
        program.chmod(0o755)
        with pytest.raises(SystemExit, match=told):
            main([*UP["gke"], "--out", str(tmp_path)])


# What is printed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", UP)
def test_a_dry_run_prints_a_script_without_a_secret(launcher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-value")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no tool of any cloud is asked for
    monkeypatch.chdir(ROOT)
    flags = ("--secrets", "WANDB_API_KEY", "--price", "1.5", "--hours", "4", "--dry-run")
    main([*UP[launcher], *flags, "--", "--steps", "7"])
    text = capsys.readouterr().out
    assert "a-secret-value" not in text and "WANDB_API_KEY" in text
    assert "16 chips x 1.5 = 24.00 an hour; x 4 h = 96.00" in text.replace("GPUs", "chips")
    assert re.search(r"jaxvid.main train tiny_sft --workdir \S+ --steps 7 --distributed auto", text)
    monkeypatch.undo()
    check_shell(text, tmp_path, "plan.sh")


@pytest.mark.parametrize(
    "words",
    [
        ["gke", "status"],
        ["gke", "logs", "--follow"],
        ["gke", "down"],
        ["slurm", "status", "--root", "/shared/jobs"],
        ["slurm", "logs", "--root", "/shared/jobs"],
        ["slurm", "down", "--root", "/shared/jobs"],
        ["sky", "status"],
        ["sky", "logs"],
        ["sky", "down"],
        ["tpu", "status", "--zone", "us-east5-b"],
        ["tpu", "logs", "--zone", "us-east5-b"],
        ["tpu", "down", "--zone", "us-east5-b"],
    ],
    ids=" ".join,
)
def test_other_verbs_print_what_they_would_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    main([*words, "--name", "demo", "--dry-run"])
    text = capsys.readouterr().out
    assert "demo" in text or words == ["sky", "status"]
    monkeypatch.undo()
    check_shell(text, tmp_path, "plan.sh")


def test_the_arithmetic_of_the_cost():
    assert job.estimate(8, 1.2, 10) == (
        "cost: 8 chips x 1.2 = 9.60 an hour; x 10 h = 96.00, waiting and set-up not counted"
    )
    assert (
        job.estimate(1, 2, None, "GPU") == "cost: 1 GPU x 2 = 2.00 an hour (--hours gives the sum)"
    )
    assert "your price of a chip-hour" in job.estimate(8, None, 10)


def test_scripts_that_are_shipped_pass_shellcheck(tmp_path):
    for file in sorted((ROOT / "launch").glob("*.sh")):
        check_shell(file.read_text(), tmp_path, file.name)


def test_words_reach_the_trainer_as_they_were_typed(tmp_path):
    hostile = ("$(touch x)", "two words", "it's", '"', "`id`", "a\\b", "*", "")
    args = tpu.TpuUp(**TPU, zone="us-east5-b", accelerator="v6e-8", arguments=hostile)
    (tmp_path / "code").mkdir()
    (tmp_path / "job.sh").write_text(job.shell(job.command(args, "tiny_sft", 1)))
    program = tmp_path / "told"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "python").write_text(f"{program}\n")
    (tmp_path / "secrets.env").write_text("")
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], capture_output=True, text=True)
    wanted = ("-m", "jaxvid.main", "train", "tiny_sft", "--workdir", "gs://bucket/run", *hostile)
    assert done.stdout == "".join(f"{w}\n" for w in wanted), done.stderr
    assert not (tmp_path / "code" / "x").exists()
    assert job.command(args, "tiny_sft", 2)[-2:] == job.DISTRIBUTED


def test_secrets_survive_the_shell_and_are_readable_by_their_owner_alone(tmp_path, monkeypatch):
    value = "p$(id)'a\"s s"
    monkeypatch.setenv("KEY", value)
    file = tmp_path / "secrets.env"
    plan.write_secrets(plan.Secrets(file, ("KEY",), shell=True))
    assert file.stat().st_mode & 0o777 == 0o600
    line = f'set -a; source {file}; printf %s "$KEY"'
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == value
    monkeypatch.setenv("KEY", "two\nlines")
    with pytest.raises(SystemExit, match="a key has none"):
        plan.write_secrets(plan.Secrets(file, ("KEY",), shell=False))


# The archive -------------------------------------------------------------------------------------


def test_the_archive_is_the_code_and_the_same_bytes_each_time(tmp_path):
    recipe = tmp_path / "mine.py"
    shutil.copy(ROOT / "configs" / "tiny_sft.py", recipe)
    place, file = bundles.place(f"{recipe}:runlocal")
    assert place == "../recipes/mine.py:runlocal" and file == recipe.resolve()
    first, again = (bundles.pack(file, "tpu", "#!/bin/sh\n") for _ in range(2))
    assert first == again and first.digest != bundles.pack(None, "tpu", "#!/bin/sh\n").digest
    bundles.save(first, tmp_path / "bundle.tgz")
    with tarfile.open(tmp_path / "bundle.tgz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there"
    for name in ("jaxvid/main.py", "launch/bootstrap.sh", "configs/checkpoints/tiny_base"):
        assert (there / "code" / name).exists()
    assert not list(there.rglob("__pycache__")) and not (there / "code" / "tests").exists()
    assert (there / "code" / place.removesuffix(":runlocal")).resolve().is_file()
    assert len(first.data) < 20e6


def test_recipes_of_the_code_keep_their_places(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bundles.place("tiny_sft:runlocal") == ("tiny_sft:runlocal", None)
    assert bundles.place("configs/tiny_sft.py") == ("configs/tiny_sft.py", None)


def test_versions_are_pinned_to_those_that_run_here():
    lines = bundles.pins("cuda13").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(lines) == len(project["dependencies"])
    assert all(re.fullmatch(r"[\w.-]+(\[cuda13\])?==\d[\w.+]*", line) for line in lines), lines
    assert [line for line in lines if line.startswith("jax[cuda13]==")]
    assert "jax[tpu]==" in bundles.pins("tpu") and "jax==" in bundles.pins("cpu")
    with pytest.raises(ValueError, match="no backend 'rocm'"):
        bundles.pins("rocm")


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


# SLURM -------------------------------------------------------------------------------------------


def test_the_batch_script(tmp_path):
    args = slurm.SlurmUp(
        config="tiny_sft",
        name="demo",
        workdir="/shared/run",
        root=tmp_path,
        nodes=2,
        gpus=4,
        partition="gpu",
        memory="200G",
        secrets=("WANDB_API_KEY",),
        before=("module load cuda",),
    )
    text = slurm.batch(args, slurm.check(args))
    lines = text.splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : len(options) + 1] == [f"#SBATCH {o}" for o in options]  # before any command
    for wanted in (
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--mem=200G"),
        *("--signal=TERM@180", "--export=HOME,USER,PATH,LANG,WANDB_API_KEY", "--partition=gpu"),
    ):
        assert wanted in options
    assert "module load cuda" in lines and slurm.processes(args) == 8
    check_shell(text.replace("module load cuda", ":"), tmp_path, "job.sbatch")


class Slurm:
    """srun as local processes, scontrol as a list; the batch script and worker.sh are the real."""

    def __init__(self, folder, monkeypatch, failures=1):
        self.folder = folder / "demo"
        (self.folder / "code").mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.folder / "code" / "launch")
        (folder / "bin").mkdir()
        programs = {
            "srun": "while [[ $1 == --* ]]; do shift; done\n"
            'for n in 0 1; do SLURM_PROCID=$n "$@" & pids+=($!); done\n'
            "trap 'kill \"${pids[@]}\"' USR1\n"
            'worst=0; for p in "${pids[@]}"; do wait "$p" || worst=$?; done; exit "$worst"\n',
            "scontrol": f'echo "$@" >>{folder}/requeued\n',
        }
        for name, text in programs.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
            (folder / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.requeued = folder / "requeued"
        args = slurm.SlurmUp(
            config="x", name="demo", workdir="/x", root=folder, gpus=2, failures=failures
        )
        (self.folder / "job.sbatch").write_text(slurm.batch(args, self.folder))
        self.count = 0

    def run(self, job_line):
        """(exit code, what it said, whether it queues again) of one start."""
        (self.folder / "job.sh").write_text(f"{job_line}\n")
        self.requeued.unlink(missing_ok=True)
        variables = {
            **os.environ,
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_RESTART_COUNT": str(self.count),
        }
        self.count += 1
        done = subprocess.run(
            ["bash", str(self.folder / "job.sbatch")],
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, self.requeued.exists()


def test_slurm_queues_again_what_was_stopped_and_bounds_what_fails(tmp_path, monkeypatch):
    slurm_ = Slurm(tmp_path, monkeypatch, failures=1)
    for _ in range(3):  # stopped: as often as it comes
        code, said, again = slurm_.run("exit 143")
        assert again and "0 done, 2 stopped, 0 failed" in said
    code, said, again = slurm_.run("exit $((SLURM_PROCID == 0 ? 1 : 143))")
    assert again and "1 stopped, 1 failed" in said
    code, said, again = slurm_.run('kill -KILL "$PPID"')  # neither process says how it ended
    assert code == 1 and not again and "failed 2 times" in said
    code, said, again = slurm_.run("exit 0")
    assert code == 0 and not again and "2 done" in said


def test_slurm_gives_the_trainer_time_to_save(tmp_path, monkeypatch):
    """SIGTERM to every process of the step, shells too: the code is the trainer's own."""
    slurm_ = Slurm(tmp_path, monkeypatch)
    trainer = (
        "import os, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5); print('saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    (tmp_path / "trainer.py").write_text(trainer)
    code, said, again = slurm_.run(f"exec /usr/bin/python3 -IS {tmp_path}/trainer.py")
    assert again and said.count("saved") == 2 and "2 stopped, 0 failed" in said


def test_what_slurm_is_asked(tmp_path, monkeypatch, capsys):
    """All verbs against programs that write down their words; the set-up is real."""
    root = tmp_path / "jobs"
    for program in ("sbatch", "squeue", "scancel"):
        file = tmp_path / program
        file.write_text(f'#!/bin/sh\necho {program} "$@" >>{tmp_path}/calls\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = [w if w != "/shared/jobs" else str(root) for w in UP["slurm"]]
    main([*words, "--python", str(ROOT / "tests" / "fake_trainer.py")])
    script = root / "demo" / "job.sbatch"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("squeue --me --name=demo")
    assert calls[1:] == [f"sbatch --test-only {script}", f"sbatch --parsable {script}"]
    assert (root / "demo" / "python").read_text().strip().endswith("fake_trainer.py")
    with pytest.raises(SystemExit, match="the job has not started"):
        main(["slurm", "logs", "--name", "demo", "--root", str(root)])
    (root / "demo" / "log").write_text("--- a start\nstep 1\n")
    main(["slurm", "logs", "--name", "demo", "--root", str(root)])
    main(["slurm", "status", "--name", "demo", "--root", str(root)])
    main(["slurm", "down", "--name", "demo", "--root", str(root)])
    assert not (root / "demo").exists()
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scancel --me --name=demo"


# Set-up ------------------------------------------------------------------------------------------


class Bare:
    """A machine without the libraries, apt-get and uv as programs that write down their words."""

    def __init__(self, folder, monkeypatch, known=""):
        self.root, self.calls = folder / "root", folder / "calls"
        (self.root / "code").mkdir(parents=True)
        (self.root / "requirements.txt").write_text("jax==1\n")
        (self.root / "python-version").write_text("3.12\n")
        (folder / "bin").mkdir()
        stand_in = ROOT / "tests" / "fake_trainer.py"
        programs = {
            "ldconfig": f"printf '%s\\n' {shlex.quote(known)}",
            "apt-get": f'echo apt-get "$@" >>{self.calls}',
            "id": "echo 0",
            "uv": f'echo uv "$@" >>{self.calls}\n'
            f'if [ "$1" = venv ]; then mkdir -p "{self.root}/env/bin" && '
            f'cp {stand_in} "{self.root}/env/bin/python"; fi',
        }
        for name, text in programs.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def run(self, *more):
        self.calls.write_text("")
        words = ["bash", str(ROOT / "launch" / "bootstrap.sh"), str(self.root), *more]
        done = subprocess.run(words, capture_output=True, text=True)
        return done, self.calls.read_text()


BOTH = "\tlibGL.so.1 (libc6) => /x\n\tlibgthread-2.0.so.0 (libc6) => /x"


def test_a_bare_image_is_set_up_once(tmp_path, monkeypatch):
    bare = Bare(tmp_path, monkeypatch)
    done, calls = bare.run()
    assert done.returncode == 0, done.stderr
    assert re.search(r"apt-get .*install -y .*libgl1 libglib2.0-0\n", calls)
    assert f"uv venv -q --python 3.12 {bare.root}/env" in calls
    assert f"-r {bare.root}/requirements.txt" in calls
    assert (bare.root / "python").read_text() == f"{bare.root}/env/bin/python\n"
    done, calls = bare.run()
    assert done.returncode == 0 and "uv" not in calls
    (bare.root / "requirements.txt").write_text("jax==2\n")
    _, calls = bare.run()
    assert "uv venv" in calls


def test_what_is_there_is_not_installed(tmp_path, monkeypatch):
    bare = Bare(tmp_path, monkeypatch, known=BOTH)
    _, calls = bare.run()
    assert "apt-get" not in calls
    given = str(ROOT / "tests" / "fake_trainer.py")
    done, calls = bare.run(given)
    assert done.returncode == 0 and not calls
    assert (bare.root / "python").read_text() == f"{given}\n"
    done, _ = bare.run("/bin/false")
    assert done.returncode == 1 and "/bin/false cannot import cv2, jax and jaxvid" in done.stderr


def test_without_root_the_set_up_says_what_to_ask_for(tmp_path, monkeypatch):
    bare = Bare(tmp_path, monkeypatch)
    for name, text in (("id", "echo 1000"), ("sudo", "exit 1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done, _ = bare.run()
    assert done.returncode == 1
    assert "could not install libgl1 libglib2.0-0; without root, ask" in done.stderr


def test_the_worker_says_how_its_job_stands(tmp_path):
    """start, report, stop and a machine that was started anew, with a job that saves."""

    def call(verb, *more):
        words = ["bash", str(ROOT / "launch" / "worker.sh"), verb, str(tmp_path), *more]
        return subprocess.run(words, capture_output=True, text=True, timeout=30)

    def state():
        return call("report").stdout.splitlines()[0].removeprefix("::jaxvid state ")

    (tmp_path / "bundle.tgz").write_text("")
    (tmp_path / "job.sh").write_text("trap 'echo saved; exit 143' TERM\necho up\nsleep 60 & wait\n")
    assert state() == "absent"
    assert call("start").returncode == 0 and state() == "running"
    first = (tmp_path / "pid").read_text()
    call("start")
    assert (tmp_path / "pid").read_text() == first  # one is enough
    assert call("stop", "20").returncode == 0 and state() == "exit 143"
    assert "saved" in call("log").stdout
    (tmp_path / "code.exit").unlink()
    assert state() == "lost"
    (tmp_path / "job.sh").write_text("trap '' TERM\nsleep 60\n")
    call("start")
    call("stop", "1")
    assert state() == "exit 137"

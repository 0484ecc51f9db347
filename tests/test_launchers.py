"""What the launchers print and ship, and what they refuse."""

import io
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib

import pytest
from launched import ROOT, TPU, UP, check_shell

from launch import bundle as bundles
from launch import job, plan, slices, tpu
from launch.main import main

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
    ("sky", ["--workdir", "s3://bucket/run"], "several --nodes 's3://bucket/run': it must be gs"),
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


def test_what_reads_a_bucket_comes_along():
    """In the version that runs here, or in any that fits."""
    named = lambda text: [re.split("[=>]=", x)[0] for x in bundles.pins("tpu", text).splitlines()]
    plain = named("--workdir /mnt/run")
    assert named("--workdir gs://bucket/run") == [*plain, "gcsfs"]
    assert named("gs://bucket/run s3://bucket/shards") == [*plain, "gcsfs", "s3fs"]
    packed = bundles.pack(None, "tpu", "train tiny_sft --workdir gs://bucket/run")
    with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
        assert b"\ngcsfs" in tar.extractfile("requirements.txt").read()

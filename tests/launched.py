"""Settings that every launcher takes, and a check of what it renders as shell."""

import os
import pathlib
import shutil
import subprocess
import sys

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
    beside = pathlib.Path(sys.executable).parent  # where the dev extra puts it
    found = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    assert found, "no shellcheck: pip install -e '.[dev]'"
    done = subprocess.run([found, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

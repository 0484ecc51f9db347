"""The wheel carries what the two commands need: recipes, the base checkpoint, the programs."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROBE = """
import pathlib, configs, jaxvid
from jaxvid import runs
from jaxvid.models import hf
run = runs.load_config("tiny_sft", [])
assert pathlib.Path(run.model, "model.safetensors").is_file(), run.model
assert hf.read_config(run.model).text.layers
assert ".." not in run.model and str(pathlib.Path(configs.__file__).parent) in run.model
print("ok", configs.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_recipes_checkpoint_and_programs(wheel):
    files = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist()}
    checkpoint = "configs/checkpoints/tiny_base"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert files.get(f"{checkpoint}/{name}"), name
    assert files[f"{checkpoint}/model.safetensors"] <= 8_000_000
    assert {"configs/tiny_dna.py", "jaxvid/eval/report.html", "launch/local.py"} <= set(files)
    assert {"launch/bootstrap.sh", "launch/worker.sh"} <= set(files)
    entry = next(n for n in files if n.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry).decode()
    assert all(p in text for p in ("jaxvid =", "jaxvid-forge =", "jaxvid-launch ="))
    assert not any(n.startswith("tests/") for n in files)


def test_installed_wheel_finds_its_checkpoint(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout

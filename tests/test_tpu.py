"""Kernels compiled ahead of time for the TPUs that we name, on a machine without one."""

import importlib.util
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "compile_kernels.py"
SETTINGS = dict(  # read by libtpu as it is loaded: look for no TPU, and let others be loaded too
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
HERE = (sys.platform, platform.machine()) == ("linux", "x86_64")


@pytest.mark.skipif(not HERE, reason="the TPU compiler is for Linux on x86-64")
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_kernel_compiles(topology):
    """Four chips each. What does not tile, or does not fit fast memory, fails here."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, SCRIPT, topology],
        env=os.environ | SETTINGS | dict(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("op", sorted((ROOT / "jaxvid/ops").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_op_is_among_them(op):
    imported = re.findall(r"^from jaxvid\.ops\.(\w+) import (.*)$", SCRIPT.read_text(), re.M)
    assert op.stem in dict(imported)[op.stem].split(", ")

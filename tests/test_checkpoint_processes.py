"""Checkpoints that two processes write, and two or one go on from, also past a damaged one."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve()


def together(count: int, folder: pathlib.Path, what: str) -> list[str]:
    """What `count` processes of shared.py say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    known = os.environ.get("PYTHONPATH", "")
    env = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{HERE.parent}:{known}"}
    command = [sys.executable, str(HERE.with_name("shared.py")), port, str(count)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    running = [
        subprocess.Popen([*command, str(i), str(folder), what], **pipe) for i in range(count)
    ]
    said = [p.communicate(timeout=240)[0] for p in running]
    assert [p.returncode for p in running] == [0] * count, "\n".join(said)[-4000:]
    return said


@pytest.mark.slow
def test_two_processes_write_and_one_or_two_go_on(tmp_path):
    """What only one of them misses, both pass over."""
    together(2, tmp_path / "a", "save")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    [said] = together(1, tmp_path / "a", "restore")
    assert "went on from step 2, {'taken': 2}, passed []" in said
    for said in together(2, tmp_path / "b", "half"):
        assert "went on from step 1, {'taken': 1}, passed [2]" in said
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["1", "2", "2.damaged"]

"""What runs over there: the batch script of SLURM, the set-up, the worker."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launched import ROOT, UP, check_shell

from launch import slurm
from launch.main import main

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


@pytest.mark.slow
def test_the_trainer_itself_comes_to_its_end_through_slurms_script(tmp_path, monkeypatch):
    """Real set-up, real training of two steps on the CPU; sbatch runs the script at once."""
    shards = tmp_path / "shards"
    sizes = ("--train", "8", "--validation", "4", "--test", "4", "--workers", "0")
    forge = [sys.executable, "-m", "data_gen.build", "procedural", "--out", str(shards), *sizes]
    subprocess.run(forge, cwd=ROOT, check=True)
    Slurm(tmp_path, monkeypatch)  # its srun
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_PROCID=0 exec "$@"\n',
        "squeue": "",
        "sbatch": '[[ $1 == --test-only ]] || SLURM_JOB_ID=1 SLURM_NTASKS=1 bash "$2"\n',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "here")
    shutil.rmtree(tmp_path / "demo")
    main(
        [
            *("slurm", "up", "tiny_sft:runlocal", "--name", "demo", "--root", str(tmp_path)),
            *("--workdir", str(tmp_path / "run"), "--gpus", "0", "--python", sys.executable, "--"),
            *("--data.shards", str(shards), "--validation.shards", str(shards)),
        ]
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "requeued").exists()


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

"""The TPU launcher from request to teardown, on a cloud of files and local processes.

The commands are those of a real run, down to bootstrap.sh and worker.sh; gcloud is
tests/fake_cloud.py and the interpreter that --python names is tests/fake_trainer.py.
"""

import json
import os
import pathlib
import shlex
import signal
import threading
import time

import fake_cloud
import pytest

from launch import bundle as bundles
from launch import watch
from launch.main import main

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 15


class Cloud:
    def __init__(self, folder: pathlib.Path):
        self.folder, self.bucket, self.out = folder / "cloud", folder / "bucket", folder / "out"
        self.path = f"{fake_cloud.install(self.folder)}:{os.environ['PATH']}"

    def words(self, verb="up"):
        at = [verb, "--name", "demo", "--zone", "us-east5-b", "--out", str(self.out)]
        if verb != "up":
            return ["tpu", *at]
        return [
            *("tpu", "up", "tiny_sft", *at[1:], "--accelerator", "v5litepod-8"),
            *("--workdir", "gs://bucket/run", "--spot", "--poll", "0.2"),
            *("--python", str(ROOT / "tests/fake_trainer.py")),
        ]

    def up(self, *flags, secrets=(), steps=STEPS):
        keys = ("--secrets", "BUCKET", *secrets)
        return [*self.words(), *keys, *flags, "--", "--steps", str(steps)]

    def step(self, worker=0):
        file = self.bucket / "run" / f"state-{worker}"
        return int(file.read_text() or 0) if file.exists() else 0

    def log(self, attempt, worker=0):
        file = self.out / "demo" / "logs" / str(attempt) / f"{worker}.log"
        return file.read_text() if file.exists() else ""

    def assert_nothing_is_left(self):
        assert fake_cloud.processes(self.folder) == []
        assert not list((self.folder / "queue").glob("*"))
        assert not list((self.folder / "nodes").glob("*"))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path)
    monkeypatch.setenv("PATH", cloud.path)
    monkeypatch.setenv("BUCKET", str(cloud.bucket))
    yield cloud
    for process in fake_cloud.processes(cloud.folder):
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def small(monkeypatch):
    """An archive of the scripts alone, which is all that the stand-in needs."""
    monkeypatch.setattr(bundles, "ROOMS", ("launch",))


def unique(lines):
    return list(dict.fromkeys(lines))


def test_an_undisturbed_run_is_what_the_dry_run_printed(cloud, capsys):
    main(cloud.up("--dry-run"))
    printed = capsys.readouterr().out
    assert not (cloud.folder / "calls.jsonl").exists() and not cloud.out.exists()
    main(cloud.up())
    assert cloud.step(0) == cloud.step(1) == STEPS
    cloud.assert_nothing_is_left()
    promised = [line for line in printed.splitlines() if line.startswith("gcloud ")]
    made = [shlex.join(("gcloud", *c)) for c in fake_cloud.calls(cloud.folder)]
    asked = [line for line in made if line.startswith("gcloud config get-value ")]
    assert len(asked) == 2 and unique(made[2:]) == unique(promised)
    for worker in (0, 1):
        assert f"step {STEPS}" in cloud.log(1, worker)
    # The key reached the job as a file; no command line, output, log or kept file has its value.
    value = str(cloud.bucket)
    assert value not in printed and value not in (cloud.folder / "calls.jsonl").read_text()
    kept = [f for f in cloud.out.rglob("*") if f.is_file()]
    assert kept and not [f for f in kept if value.encode() in f.read_bytes()]


def test_a_slice_that_is_taken_away_is_requested_again_and_the_job_goes_on(
    cloud, small, monkeypatch, capsys
):
    monkeypatch.setenv("HOLD", "5")

    def take():
        while cloud.step() < 5:
            time.sleep(0.05)
        (cloud.folder / "taken").mkdir()
        mark = cloud.folder / "taken" / "demo"
        while not cloud.log(1).count("step 5"):  # so far the watch has fetched
            time.sleep(0.05)
        mark.touch()
        while mark.exists():
            time.sleep(0.05)
        (cloud.bucket / "run" / "go").touch()

    thief = threading.Thread(target=take)
    thief.start()
    main(cloud.up(secrets=["HOLD"]))
    thief.join()
    said = capsys.readouterr().out
    assert "the slice was taken away; request 2" in said and "demo is done" in said
    assert cloud.step(0) == cloud.step(1) == STEPS
    assert "starts at 0" in cloud.log(1) and "step 5\n" in cloud.log(1)  # fetched while it lived
    assert "starts at 5" in cloud.log(2) and f"step {STEPS}\n" in cloud.log(2)
    made = [c[3] for c in fake_cloud.calls(cloud.folder) if c[2:3] == ["queued-resources"]]
    assert made.count("create") == 2 and made.count("delete") == 2
    cloud.assert_nothing_is_left()


def test_a_failure_is_started_again_on_the_same_slice(cloud, small, monkeypatch, capsys):
    monkeypatch.setenv("FAIL_ONCE", "3")
    (cloud.folder / "away").write_text("3")  # the network, which is no reason to do anything
    main(cloud.up(secrets=["FAIL_ONCE"]))
    assert "failed, restart 1 of 3" in capsys.readouterr().out
    assert "this step fails once" in cloud.log(1) and "starts at 3" in cloud.log(2)
    made = [c[3] for c in fake_cloud.calls(cloud.folder) if c[2:3] == ["queued-resources"]]
    assert made.count("create") == 1 and cloud.step() == STEPS
    assert not (cloud.folder / "away").exists()
    cloud.assert_nothing_is_left()


def test_failures_are_bounded_and_the_slice_does_not_stay(cloud, small, monkeypatch):
    monkeypatch.setenv("FAIL_ONCE", "2")
    with pytest.raises(SystemExit, match="ended as failed, 1 failures .* goes on from the last"):
        main(cloud.up("--failures", "0", secrets=["FAIL_ONCE"]))
    assert "RuntimeError" in cloud.log(1)
    cloud.assert_nothing_is_left()


def test_the_watch_can_end_and_be_taken_up_again_and_down_saves(cloud, small, monkeypatch, capsys):
    outcome = watch.outcome

    def interrupted(workers):
        if cloud.step() >= 2:
            raise KeyboardInterrupt
        return outcome(workers)

    monkeypatch.setattr(watch, "outcome", interrupted)
    with pytest.raises(SystemExit, match="demo goes on and costs"):
        main(cloud.up(steps=400))
    monkeypatch.setattr(watch, "outcome", outcome)
    main(cloud.words("status"))
    said = capsys.readouterr().out
    assert "ACTIVE" in said and "worker 1: running" in said
    with pytest.raises(SystemExit, match="runs another job"):
        main([*cloud.up(steps=400), "--seed", "5"])
    main(cloud.words("logs"))
    assert "starts at 0" in (cloud.out / "demo/logs/fetched/1.log").read_text()
    main(cloud.words("down"))
    assert "nothing is left of demo" in capsys.readouterr().out
    at = cloud.step()
    cloud.assert_nothing_is_left()
    assert 2 <= at < 400
    main(cloud.up(steps=at + 3))  # goes on where it stopped
    last = max(int(f.name) for f in (cloud.out / "demo/logs").glob("[0-9]*"))
    assert f"starts at {at}" in cloud.log(last) and cloud.step() == at + 3
    main(cloud.words("status"))
    assert "there is no such slice" in capsys.readouterr().out


# Parts -------------------------------------------------------------------------------------------


def worker(state, code=None, log=b"", start=0):
    return watch.Worker(state, code, "x", start, log)


@pytest.mark.parametrize(
    "workers, wanted",
    [
        ([worker("running"), worker("running")], "running"),
        ([worker("running"), worker("exit", 0)], "ending"),
        ([worker("running"), worker("exit", 1)], "ending"),
        ([worker("exit", 0), worker("exit", 0)], "done"),
        ([worker("exit", 0), worker("exit", 143)], "stopped"),
        ([worker("exit", 1), worker("exit", 143)], "failed"),
        ([worker("exit", 137), worker("exit", 0)], "failed"),
        ([worker("lost"), worker("exit", 143)], "stopped"),
        ([worker("absent"), worker("exit", 0)], "stopped"),
    ],
)
def test_what_the_workers_say_is_one_outcome(workers, wanted):
    assert watch.outcome(workers) == wanted


def test_logs_are_joined_without_a_gap_or_a_repetition(tmp_path):
    logs = watch.Logs(tmp_path, lambda line: None)
    for start, log in ((0, b"abc"), (0, b"abcdef"), (4, b"efgh"), (12, b"xyz")):
        logs.add([worker("running", log=log, start=start)])
    assert (tmp_path / "0.log").read_bytes() == b"abcdefgh[4 bytes not fetched]\nxyz"


def test_a_report_is_read_from_what_ssh_says_around_it():
    text = (
        b"Warning: x\n::jaxvid state exit 143\n::jaxvid bundle abc\n::jaxvid log 2 5\nab\xff"
        b"::jaxvid end\nbye"
    )
    assert watch.read_report(text) == watch.Worker("exit", 143, "abc", 2, b"ab\xff")
    assert watch.read_report(b"::jaxvid state absent\n") == worker("absent")._replace(bundle="")
    assert watch.read_report(b"Connection refused") is None


def answering(folder, monkeypatch, out="", err="", code=0):
    """A gcloud that says one thing to everything but the question for the account."""
    program = folder / "bin" / "gcloud"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = config ] && echo me@example.com && exit 0\n'
        f"echo {shlex.quote(err)} >&2; echo {shlex.quote(out)}; exit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


UP = [
    *("tpu", "up", "tiny_sft", "--name", "demo", "--zone", "us-east5-b"),
    *("--accelerator", "v6e-8", "--workdir", "gs://bucket/run"),
]


def test_several_hosts_need_a_key_in_the_agent(tmp_path, monkeypatch):
    answering(tmp_path, monkeypatch)
    (tmp_path / "bin" / "ssh-add").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "ssh-add").chmod(0o755)
    with pytest.raises(SystemExit, match="ssh-add ~/.ssh/google_compute_engine"):
        main([*UP, "--accelerator", "v6e-16", "--out", str(tmp_path)])


def test_a_request_that_fails_is_not_repeated(tmp_path, monkeypatch):
    told = json.dumps({"state": {"state": "FAILED", "failedData": {"error": "no quota"}}})
    answering(tmp_path, monkeypatch, out=told)
    with pytest.raises(SystemExit, match="request for v6e-8 in us-east5-b failed: .*no quota"):
        main([*UP, "--out", str(tmp_path)])


def test_what_gcloud_refuses_is_told_in_its_words(tmp_path, monkeypatch):
    answering(tmp_path, monkeypatch, err="PERMISSION_DENIED: TPU API is off", code=1)
    with pytest.raises(SystemExit, match="gcloud refused:(.|\n)*TPU API is off"):
        main([*UP, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "unset, told", [("account", "gcloud auth login"), ("project", "config set project")]
)
def test_gcloud_without_an_account_or_a_project_says_what_to_do(unset, told, tmp_path, monkeypatch):
    program = tmp_path / "gcloud"
    program.write_text(f"#!/bin/sh\n[ \"$3\" = {unset} ] && echo '(unset)' || echo something\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit, match=told):
        main([*UP, "--out", str(tmp_path)])

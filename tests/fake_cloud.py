"""A gcloud in a folder: requests and workers are files, ssh is bash in a worker's home.

`install(folder)` writes a program `gcloud` into folder/bin, for PATH. State, in folder:

    queue/NAME.json       a queued resource: its words, its state, the looks until it is ACTIVE
    nodes/NAME/w/N/       the home of worker N; every process that ssh starts there is known by it
    calls.jsonl           every call, its words
    away                  how many looks get no answer, as if the network were away
    taken/NAME            an empty file: at the next look the slice of that name is taken away

Taken away, as a spot slice is: SIGTERM to what runs on the workers, then the machines vanish with
all their files, and the request is SUSPENDED until it is deleted.
"""

import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

WORKERS = 2
LOOKS = 2  # until a request is ACTIVE


def install(folder: pathlib.Path) -> pathlib.Path:
    """The folder for PATH."""
    program = folder / "bin" / "gcloud"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {folder} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program.parent


def calls(folder: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def processes(folder: pathlib.Path) -> list[int]:
    """Living processes whose HOME is in the folder, whoever started them."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            dead = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # it ended meanwhile
            continue
        homes = [v[5:].decode() for v in variables if v.startswith(b"HOME=")]
        if not dead and any(h.startswith(f"{folder}/nodes/") for h in homes):
            found.append(int(path.name))
    return found


def take(folder: pathlib.Path, name: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes(folder):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        time.sleep(0.3)
    shutil.rmtree(folder / "nodes" / name)


# gcloud ------------------------------------------------------------------------------------------


def flag(words: list[str], name: str, default: str | None = None) -> str | None:
    for word in words:
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return default


def queued(folder: pathlib.Path, verb: str, name: str, words: list[str]) -> int:
    file = folder / "queue" / f"{name}.json"
    if verb == "create":
        if file.exists():
            print("ERROR: ALREADY_EXISTS", file=sys.stderr)
            return 1
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"state": "WAITING_FOR_RESOURCES", "looks": 0, "words": words}))
        return 0
    if not file.exists():
        print(f"ERROR: NOT_FOUND: {name}", file=sys.stderr)
        return 1
    request = json.loads(file.read_text())
    if verb == "delete":
        if (folder / "nodes" / name).exists():
            take(folder, name)
        file.unlink()
        return 0
    away = folder / "away"
    if request["state"] == "ACTIVE" and away.exists():
        left = int(away.read_text()) - 1
        away.write_text(str(left)) if left else away.unlink()
        print("ERROR: Unable to reach the server", file=sys.stderr)
        return 1
    mark = folder / "taken" / name
    request["looks"] += 1
    if request["state"] == "WAITING_FOR_RESOURCES" and request["looks"] >= LOOKS:
        request["state"] = "ACTIVE"
        for number in range(WORKERS):
            (folder / "nodes" / name / "w" / str(number)).mkdir(parents=True)
    elif request["state"] == "ACTIVE" and mark.exists():
        mark.unlink()
        take(folder, name)
        request["state"] = "SUSPENDED"
    file.write_text(json.dumps(request))
    print(json.dumps({"state": {"state": request["state"]}}))
    return 0


def homes(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    return sorted((folder / "nodes" / name / "w").glob("*"))


def ssh(folder: pathlib.Path, name: str, words: list[str]) -> int:
    line, outputs = flag(words, "command"), flag(words, "output-directory")
    if not homes(folder, name):
        print(f"ERROR: NOT_FOUND: {name}", file=sys.stderr)
        return 1
    codes = []
    for home in homes(folder, name):
        variables = {"HOME": str(home), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", "-c", line], cwd=home, env=variables, capture_output=True, check=False
        )
        said = b"Warning: Permanently added '10.0.0.1'.\n" + done.stdout + done.stderr
        if outputs:
            (pathlib.Path(outputs) / f"{home.name}.log").write_bytes(said)
        else:
            sys.stdout.buffer.write(said)
        codes.append(done.returncode)
    return max(codes)


def scp(folder: pathlib.Path, words: list[str]) -> int:
    *sources, target = [w for w in words if not w.startswith("--")]
    name, _, path = target.partition(":")
    for home in homes(folder, name):
        if not (home / path).is_dir():
            print(f"scp: {path}: No such file or directory", file=sys.stderr)
            return 1
        for source in sources:
            shutil.copy(source, home / path)
    return 0


def main() -> int:
    folder, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
    with open(folder / "calls.jsonl", "a") as log:
        log.write(json.dumps(words) + "\n")
    if words[:2] == ["config", "get-value"]:
        print({"account": "somebody@example.com", "project": "a-project"}[words[2]])
        return 0
    _, _, kind, verb, *rest = words
    if kind == "queued-resources":
        return queued(folder, verb, rest[0], rest)
    return ssh(folder, rest[0], rest) if verb == "ssh" else scp(folder, rest)


if __name__ == "__main__":
    sys.exit(main())

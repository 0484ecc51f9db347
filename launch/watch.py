"""A job on a TPU slice from the request to the end, through preemptions and failures.

Everything that matters is on the slice and in the bucket: ended here (Ctrl-C, a closed laptop), the
job goes on, and the same command takes up the watch again.
"""

import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from launch import bundle as bundles
from launch import job as jobs
from launch import plan, slices, tpu
from launch.plan import Command, Secrets

TAKEN = {"SUSPENDING", "SUSPENDED"}
UNKNOWN = "STATE_UNSPECIFIED"  # also ours, where the cloud gave no answer
FINAL = ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT", "credentials", "gcloud auth")
UNREACHABLE = 10  # looks in a row without an answer of an ACTIVE slice before it is given up
REPORT = re.compile(
    rb"::jaxvid state (?P<state>\w+)(?: (?P<code>\d+))?\n"
    rb"(?:::jaxvid bundle (?P<bundle>\w+)\n"
    rb"::jaxvid log (?P<start>\d+) \d+\n(?P<log>.*?)::jaxvid end)?",
    re.S,
)


class Worker(NamedTuple):
    state: str  # running, exit, lost, absent
    code: int | None  # of `exit`
    bundle: str  # digest of the archive that it runs
    start: int  # where in its log `log` begins
    log: bytes


class Watch(NamedTuple):
    """What a watch works with."""

    args: tpu.TpuUp
    kind: slices.Slice
    bundle: bundles.Bundle
    grace: float = 120.0  # seconds for other workers to end once one has, for a state to follow
    say: Callable[[str], None] = lambda line: print(line, flush=True)


def read_report(text: bytes) -> Worker | None:
    """What a worker said, with ssh's own words around it; None if it said nothing."""
    found = REPORT.search(text)
    if found is None:
        return None
    code = int(found["code"]) if found["code"] else None
    bundle = (found["bundle"] or b"").decode()
    return Worker(
        found["state"].decode(), code, bundle, int(found["start"] or 0), found["log"] or b""
    )


def outcome(workers: list[Worker]) -> str:
    """running, done, stopped (saved, to go on) or failed.

    A worker that failed takes the others down with it, so one code other than 0 and 143 decides;
    while others still run it is `ending`.
    """
    states = {w.state for w in workers}
    codes = {w.code for w in workers if w.state == "exit"}
    if "running" in states:
        return "ending" if codes or states & {"lost", "absent"} else "running"
    if codes - {0, jobs.SAVED}:
        return "failed"
    return "done" if codes == {0} and states == {"exit"} else "stopped"


# Looks -------------------------------------------------------------------------------------------


def state(at: tpu.TpuTarget) -> tuple[str, str]:
    """(state of the request or "" if there is none, why).

    A network that is away for a while is UNKNOWN. Raises SystemExit for what no waiting mends.
    """
    done = plan.call(tpu.describe(at), timeout=120)
    if done.code == 0:
        told = json.loads(done.out or "{}").get("state") or {}
        return told.get("state", UNKNOWN), json.dumps(told)
    if "NOT_FOUND" in done.err or "not found" in done.err:
        return "", ""
    if any(word in done.err for word in FINAL):
        raise SystemExit(f"gcloud refused:\n    {tpu.describe(at)}\n{done.err.strip()}")
    return UNKNOWN, done.err


def look(at: tpu.TpuTarget, folder: pathlib.Path) -> list[Worker] | None:
    """All workers, or None if one did not answer."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    done = plan.call(tpu.worker(at, "report", folder), timeout=600)
    if done.code:
        return None
    files = sorted(folder.glob("*.log"), key=lambda f: int(f.stem))
    workers = [read_report(f.read_bytes()) for f in files]
    return None if None in workers or not workers else workers


class Logs:
    """Appends what is new in the reports to one file a worker."""

    def __init__(self, folder: pathlib.Path, say: Callable[[str], None]):
        self.folder, self.say, self.have = folder, say, {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, workers: list[Worker]) -> None:
        for number, worker in enumerate(workers):
            data, have = worker.log, self.have.get(number, 0)
            if worker.start > have:
                data = f"[{worker.start - have} bytes not fetched]\n".encode() + data
            else:
                data = data[have - worker.start :]
            with open(self.folder / f"{number}.log", "ab") as file:
                file.write(data)
            self.have[number] = worker.start + len(worker.log)
            if number == 0 and data.strip():
                self.say(data.decode("utf-8", "replace").rstrip("\n"))


# The life of a job -------------------------------------------------------------------------------


def run(w: Watch) -> None:
    """To the end of the job. Raises SystemExit if it cannot be reached."""
    args, at = w.args, w.args.target()
    taken = failed = 0
    try:
        while True:
            number = _next(args.folder / "logs")
            end = _attempt(w, args.folder / "logs" / str(number))
            if end == "done":
                w.say(f"{args.name} is done; logs in {args.folder / 'logs'}")
                break
            if end == "failed":
                failed += 1
                if failed > args.failures:
                    break
                w.say(f"failed, restart {failed} of {args.failures}")
                plan.call(tpu.worker(at, "stop"), timeout=600)
            else:
                taken += 1
                if taken > args.preemptions:
                    break
                if end == "taken":
                    w.say(f"the slice was taken away; request {taken + 1}")
                    _delete(at, args.poll, w.say)
                else:  # saved by SIGTERM, or its host was started anew
                    w.say("stopped; starting it again")
    except KeyboardInterrupt:
        raise SystemExit(
            f"\nthe watch has ended, {args.name} goes on and costs. The same command watches again;"
            f" `jaxvid-launch tpu down --name {args.name} --zone {args.zone}` ends it."
        ) from None
    if not args.keep:
        _delete(at, args.poll, w.say)
    if end != "done":
        raise SystemExit(
            f"{args.name} ended as {end}, {failed} failures and {taken} preemptions in all. Logs "
            f"are in {args.folder / 'logs'}; the same command goes on from the last checkpoint."
        )


def _next(folder: pathlib.Path) -> int:
    return 1 + max((int(f.name) for f in folder.glob("[0-9]*")), default=0)


def _attempt(w: Watch, folder: pathlib.Path) -> str:
    """Until this attempt is done, failed, stopped or taken."""
    if not _active(w):
        return "taken"
    workers = look(w.args.target(), folder / "report")
    if workers and {x.state for x in workers} == {"running"}:
        if {x.bundle for x in workers} != {w.bundle.digest}:
            raise SystemExit(
                f"{w.args.name} runs another job (other code, recipe or flags). `jaxvid-launch tpu "
                f"down --name {w.args.name} --zone {w.args.zone}` ends it, or give another --name."
            )
        w.say(f"{w.args.name} runs; watching")
    elif not _start(w):
        return "taken" if not _still_active(w) else "failed"
    return _follow(w, folder)


def _active(w: Watch) -> bool:
    """Request the slice if there is none, and wait for it. False if it was taken away."""
    at, told = w.args.target(), ""
    limit = time.monotonic() + w.args.wait * 3600
    while True:
        now, why = state(at)
        if now != told:
            w.say(f"{w.args.name}: {now or 'not requested yet'}")
            told = now
        if now == "ACTIVE":
            return True
        if now in TAKEN:
            return False
        if now == "FAILED":
            raise SystemExit(
                f"the request for {w.kind.name} in {w.args.zone} failed: {why}\nMend that (quota, "
                "zone, runtime version, or no capacity: another zone), then `jaxvid-launch tpu "
                f"down --name {w.args.name} --zone {w.args.zone}` and again."
            )
        if now == "":
            _must(w, tpu.request(w.args, w.kind))
        if time.monotonic() > limit:
            raise SystemExit(
                f"{w.args.name} waited {w.args.wait:g} h in the queue and still does. The same "
                "command waits on, `tpu down` leaves the queue."
            )
        time.sleep(w.args.poll)


def _still_active(w: Watch) -> bool:
    return state(w.args.target())[0] in ("ACTIVE", UNKNOWN)


def _must(w: Watch, command: Command) -> None:
    done = plan.call(command)
    w.say(f"+ {command}")
    if done.code:
        raise SystemExit(f"gcloud refused:\n    {command}\n{(done.err or done.out).strip()}")


def _start(w: Watch) -> bool:
    """Send, set up and start on all workers; False if a worker could not be reached or set up."""
    bundles.save(w.bundle, w.args.folder / "bundle.tgz")
    try:
        for step in tpu.sending(w.args):
            if isinstance(step, Secrets):
                plan.write_secrets(step)
            elif isinstance(step, Command):
                w.say(f"+ {step}")
                done = plan.call(step)
                if done.code:
                    w.say((done.out + done.err).strip()[-4000:])
                    return False
    finally:
        (w.args.folder / "secrets.env").unlink(missing_ok=True)
    return True


def _follow(w: Watch, folder: pathlib.Path) -> str:
    """Reports until the end of the attempt."""
    at, logs, silent = w.args.target(), Logs(folder, w.say), 0
    ending: float | None = None
    while True:
        time.sleep(w.args.poll)
        now, _ = state(at)
        if now == UNKNOWN:  # nothing is known of the slice, so nothing is done to it
            continue
        if now != "ACTIVE":
            return "taken"
        workers = look(at, folder / "report")
        if workers is None:
            silent += 1
            if silent >= UNREACHABLE:
                w.say(f"no answer {silent} times; the slice is given up")
                return "taken"
            continue
        silent = 0
        logs.add(workers)
        end = outcome(workers)
        if end == "running":
            continue
        if end == "ending":  # some have ended, some run: they wait for each other, so not for ever
            ending = ending or time.monotonic()
            if time.monotonic() - ending < w.grace:
                continue
            plan.call(tpu.worker(at, "stop"), timeout=600)
            end = outcome(look(at, folder / "report") or workers)
            end = "failed" if end == "ending" else end
        codes = ", ".join(f"{n}: {x.state} {x.code}" for n, x in enumerate(workers))
        w.say(f"{end} ({codes})")
        plan.call(tpu.worker(at, "log", folder), timeout=600)
        return _whether_taken(w) if end == "stopped" else end


def _whether_taken(w: Watch) -> str:
    """A slice about to be taken stops its workers first; its state follows."""
    limit = time.monotonic() + w.grace
    while time.monotonic() < limit:
        if not _still_active(w):
            return "taken"
        time.sleep(min(w.args.poll, 10.0))
    return "stopped"


def _delete(at: tpu.TpuTarget, poll: float, say: Callable[[str], None]) -> None:
    """Until nothing is left of it."""
    while state(at)[0]:
        say(f"+ {tpu.delete(at)}")
        done = plan.call(tpu.delete(at))
        now, _ = state(at)
        if done.code and now not in ("", UNKNOWN, "DELETING", *TAKEN):
            raise SystemExit(f"could not delete it:\n    {tpu.delete(at)}\n{done.err.strip()}")
        if now:
            time.sleep(min(poll, 10.0))


# Verbs -------------------------------------------------------------------------------------------


def up(args: tpu.TpuUp) -> None:
    kind = tpu.check(args)
    plan.check_secrets(args.secrets)
    jobs.check_recipe(args)
    bundle = tpu.pack(args, kind)
    if args.dry_run:
        print(plan.script(tpu.whole(args, kind, bundle)), end="")
        return
    tpu.check_tools(args.target())
    if kind.hosts > 1:
        tpu.check_agent()
    print(jobs.estimate(kind.chips, args.price, args.hours))
    run(Watch(args, kind, bundle))


def status(at: tpu.TpuStatus) -> None:
    tpu.check_target(at)
    folder = at.out / at.name / "status"
    if at.dry_run:
        steps = [tpu.describe(at), tpu.worker(at, "report", folder)]
        print(plan.script(steps), end="")
        return
    tpu.check_tools(at)
    now, why = state(at)
    print(f"{at.name}: {now or 'there is no such slice'} {why}")
    for number, worker in enumerate(look(at, folder) or [] if now == "ACTIVE" else []):
        code = "" if worker.code is None else f" {worker.code}"
        print(
            f"worker {number}: {worker.state}{code}, {worker.start + len(worker.log)} bytes of log"
        )


def logs(at: tpu.TpuLogs) -> None:
    tpu.check_target(at)
    folder = at.out / at.name / "logs" / "fetched"
    if not at.dry_run:
        tpu.check_tools(at)
        folder.mkdir(parents=True, exist_ok=True)
    plan.carry_out([tpu.worker(at, "log", folder)], dry_run=at.dry_run)


def down(at: tpu.TpuDown) -> None:
    tpu.check_target(at)
    if at.dry_run:
        print(plan.script([tpu.worker(at, "stop"), tpu.delete(at)]), end="")
        return
    tpu.check_tools(at)
    if state(at)[0] == "ACTIVE":  # so that it saves; a slice where nothing runs says nothing
        plan.call(tpu.worker(at, "stop"), timeout=600)
    _delete(at, 10.0, print)
    print(f"nothing is left of {at.name} in {at.zone}; its work folder stays")

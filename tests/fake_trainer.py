#!/usr/bin/python3 -IS
"""An interpreter for --python that stands for one with jaxvid in it: counts instead of training.

Called as job.sh calls Python. It keeps the contract of `jaxvid train`: a state in the work folder
after every step, resumed by the same command; 143 on SIGTERM, its state saved; 0 at the last step.
The work folder gs://bucket/... is the folder that the variable BUCKET of the key file names.
The variable FAIL_ONCE is a step that fails, the first time; after step HOLD it waits until there is
a file `go` in the work folder.
"""

import os
import pathlib
import signal
import sys
import time


def main() -> int:
    if sys.argv[1] == "-c":  # bootstrap.sh asks what can be imported
        print("a stand-in")
        return 0
    words = sys.argv[sys.argv.index("train") + 1 :]
    value = lambda flag, default: words[words.index(flag) + 1] if flag in words else default
    bucket = pathlib.Path(os.environ["BUCKET"])
    work = bucket / value("--workdir", "").removeprefix("gs://bucket/")
    work.mkdir(parents=True, exist_ok=True)
    worker = os.environ.get("SLURM_PROCID", pathlib.Path(os.environ["HOME"]).name)
    state, steps = work / f"state-{worker}", int(value("--steps", "10"))
    step = int(state.read_text()) if state.exists() else 0
    print(f"worker {worker} starts at {step} of {steps}", flush=True)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while step < steps:
        time.sleep(0.05)
        step += 1
        state.write_text(str(step))
        print(f"step {step}", flush=True)
        mark = work / f"failed-{worker}"
        if step == int(os.environ.get("FAIL_ONCE", "0")) and not mark.exists():
            mark.write_text("")
            raise RuntimeError("this step fails once")
        while step == int(os.environ.get("HOLD", "0")) and not (stopped or (work / "go").exists()):
            time.sleep(0.05)
        if stopped:
            print("saved", flush=True)
            return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())

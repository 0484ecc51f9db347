"""SFT, DPO and DNA steps and rollouts of 3B and 7B on one NVIDIA GPU, ours beside torch's.

    pip install -e '.[oracle]' 'jax[cuda13]'           with a torch built for CUDA
    python -m benchmarks.gpu                           all rows: 24 processes, 30 with flash_attn
    python -m benchmarks.gpu --stop 560                the same in pieces: the next call goes on
    python -m benchmarks.gpu --only '3b/*' '7b/dna'    some rows
    python -m benchmarks.gpu --only 'tiny*'            whether it runs, on a card or on CPU

torch's side is `transformers`' Qwen2_5_VLForConditionalGeneration. Each side of a row is a process
of its own, so that its peak memory is its own. Results are lines of JSON appended to --out; what is
there, of the same settings and card, is not measured again. The table of all that is there comes
last.

The same on both sides: the published shapes, and the same number in every weight (weights.py here),
so that the losses printed are of one computation; to each prompt a clip of 16 frames of 448 x 448
(2,048 tokens) and 64 tokens of text; replies of 256; bfloat16 compute, float32 for what is trained;
a frozen tower; every layer of the decoder computed again in the backward pass; AdamW behind a clip
of the gradient's norm. All inputs are on the card before the clock starts.

    sft      4 prompts with a reply each
    dpo      2 prompts, a chosen and a rejected reply each; the reference is computed in the step.
             Ours holds a prompt once, torch has it with each reply, as TRL does
    dna      the policy's update on a pair of prompts with 8 replies each, advantages given
    rollout  one prompt, 8 replies of 256 tokens drawn at temperature 1; tower and prefill included

    jaxvid         XLA alone, what a GPU gets unasked
    jaxvid-cudnn   the decoder's attention by impl="cudnn"
    torch          attention by sdpa; rollouts with the dynamic cache
    torch-flash    by flash-attention 2, where that can be imported
    torch-static   rollouts with the static cache, which is compiled

Bytes: what is trained has 4 a parameter of weight, 8 of AdamW's moments and 4 of gradient, what is
frozen 2. 3B: 3.09e9 parameters of decoder, trained, and 0.67e9 of tower, frozen: 49.4 + 1.3 GB, and
6.2 more for DPO's reference, and as much again in torch for autocast's copies. A 7B trained whole
would have 121.8 + 1.3 GB before any activation, which no 80 GB hold, so it is trained by LoRA of
rank 16 on the decoder's layers: 8.29e9 frozen, 16.6 GB, and 0.04e9 of adapters, 0.6 GB; the
reference is the model without them. A side that runs out of memory says so and the others go on.

Tokens per second are useful ones: each prompt once, and its replies; of a rollout those drawn. MFU
is useful FLOPs (work.py here) over the card's dense bfloat16 peak. Both are one number for both
sides, divided by time: the median after a first step that compiles, beside the least and the most.
"""

import argparse
import dataclasses
import fnmatch
import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import work
from benchmarks.work import Case
from jaxvid import chips

FLASH = "torch-flash"
SIDES = {  # what it runs, and the rows it has
    "jaxvid": ("_gpu_jaxvid", work.KINDS),
    "jaxvid-cudnn": ("_gpu_jaxvid", ("sft", "dpo", "dna")),
    "torch": ("_gpu_torch", work.KINDS),
    FLASH: ("_gpu_torch", ("sft", "dpo", "dna")),
    "torch-static": ("_gpu_torch", ("rollout",)),
}
HALF = ("jaxvid-cudnn", FLASH)  # whose attention wants a card, and no float32
ROWS = tuple(f"{m}/{k}" for m in work.MODELS for k in work.KINDS)
QUERY = "name,driver_version,memory.total,mig.mode.current"
MEMORY = ("out of memory", "resource_exhausted", "outofmemory")  # how both say it
HEAD = (
    "row | side | seconds (least to most) | times torch's speed | tokens/s | MFU | peak, GiB "
    "| loss, first to last | first step, s"
)


@dataclasses.dataclass(frozen=True)
class Card:
    """Of the first GPU, by nvidia-smi; without one, the CPU."""

    name: str = "CPU"
    driver: str = ""
    memory: str = ""
    sliced: bool = False  # a part of a card has a peak of its own

    @property
    def peak(self) -> float | None:
        """Dense bfloat16 FLOPs a second; None of a card that benchmarks/work.py does not know."""
        return None if self.sliced else chips.peak(self.name)


def card() -> Card:
    """What the machine has. Raises RuntimeError where nvidia-smi is there and fails."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return Card()
    if told.returncode:
        raise RuntimeError(f"nvidia-smi failed: {told.stdout}{told.stderr}")
    name, driver, memory, mig = (x.strip() for x in told.stdout.splitlines()[0].split(","))
    return Card(name, driver, memory, mig == "Enabled")


def environment(side: str, on: Card) -> dict[str, str]:
    """JAX takes memory as it needs it, and may have nearly all of it (by default three quarters);
    beside torch it stays off the card."""
    gpu = on != Card()
    jaxs = side.startswith("jaxvid")
    return os.environ | {
        "JAX_PLATFORMS": "cuda" if gpu and jaxs else "cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def run(case: Case, on: Card, limit: float) -> dict[str, Any]:
    """What the side's process tells, or {"failed": why}."""
    module, _ = SIDES[case.side]
    text = json.dumps(dataclasses.asdict(case))
    child = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(case.side, on),
        process_group=0,
    )
    try:
        said, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit:.0f} s"}
    finally:
        if child.poll() is None:  # with its compilers, which hold its pipes open
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if not child.returncode:
        return json.loads(said.strip().splitlines()[-1])
    print(errors[-4000:], file=sys.stderr)
    if any(word in errors.lower() for word in MEMORY):
        return {"failed": "out of memory"}
    last = (errors.strip().splitlines() or [""])[-1]
    return {"failed": f"exit {child.returncode}: {last[:200]}"}


def cases(args: argparse.Namespace, on: Card) -> list[Case]:
    """What is asked for and can be run. Raises ValueError for a pattern that fits no row and for an
    odd --micro, RuntimeError for a row that needs a card where there is none."""
    only = args.only
    if args.micro < 1 or args.micro % 2:
        raise ValueError(f"--micro {args.micro}: a chosen and a rejected reply stand together")
    if bad := [p for p in only if not fnmatch.filter(ROWS, p)]:
        raise ValueError(f"--only {' '.join(bad)} fits no row; there are {', '.join(ROWS)}")
    out = []
    for row in ROWS:
        model, kind = row.split("/")
        if any(fnmatch.fnmatch(row, p) for p in only):
            half = on != Card() and work.MODELS[model].dtype != "float32"
            out += [
                Case(model=model, kind=kind, side=side, repeats=args.repeats, micro=args.micro)
                for side in args.sides
                if kind in SIDES[side][1] and (half or side not in HALF)
            ]
    if on == Card() and any(c.of.base for c in out):
        raise RuntimeError("no NVIDIA card here (no nvidia-smi); on a CPU there is --only 'tiny*'")
    if importlib.util.find_spec("flash_attn") is None and any(c.side == FLASH for c in out):
        print(f"{FLASH} is left out: there is no flash_attn to import")
        out = [c for c in out if c.side != FLASH]
    return out


def told(out: pathlib.Path, on: Card) -> dict[Case, dict[str, Any]]:
    """What the file holds of this card. A line that was cut off is left out."""
    found = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            read = json.loads(line)
        except json.JSONDecodeError:
            continue
        if read["card"] == dataclasses.asdict(on):
            found[Case(**read["case"])] = read["told"]
    return found


# ---- the table


def line(case: Case, result: dict[str, Any], speed: float | None, on: Card) -> str:
    """`speed` is torch's, in steps a second."""
    row = f"{case.model}/{case.kind}"
    if "failed" in result:
        return " | ".join([row, case.side, result["failed"], *[""] * 6])
    cfg = work.config(case)
    grown, taken = work.trees(case, cfg), result["seconds"]
    middle, useful = statistics.median(taken), work.flops(case, cfg, grown)
    peak, losses = result["peak_gib"], result["losses"]
    share = "" if useful is None or on.peak is None else f"{useful / middle / on.peak:.1%}"
    return " | ".join(
        [
            row,
            case.side,
            f"{middle:.3f} ({min(taken):.3f} to {max(taken):.3f})",
            "" if speed is None else f"{1 / middle / speed:.2f}",
            f"{work.tokens(case, grown) / middle:,.0f}",
            share,
            "not known" if peak is None else f"{peak:.1f}",
            f"{losses[0]:.5f} to {losses[-1]:.5f}" if losses else "",
            f"{result['first']:.1f}",
        ]
    )


def table(found: dict[Case, dict[str, Any]], on: Card) -> str:
    """Of all that was measured, under what it was measured on."""
    known = f"{on.peak / 1e12:.0f} TFLOP/s dense bfloat16" if on.peak else "peak not known, no MFU"
    driver = on.driver and f"driver {on.driver}"
    lines = [", ".join(filter(None, [on.name, on.memory, driver, known]))]
    lines += sorted({t["versions"] for t in found.values() if "versions" in t})
    lines += ["", f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1)]
    for case, result in found.items():
        beside = found.get(dataclasses.replace(case, side="torch"), {})
        speed = 1 / statistics.median(beside["seconds"]) if "seconds" in beside else None
        lines.append(f"| {line(case, result, speed, on)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["3b/*", "7b/*"], help=", ".join(ROWS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro", type=int, default=4, help="sequences of one pass of torch")
    parser.add_argument("--limit", type=float, default=240, help="seconds of one process")
    parser.add_argument("--stop", type=float, default=1e9, help="seconds of all")
    parser.add_argument("--again", action="store_true", help="measure anew what failed")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu.jsonl"))
    args = parser.parse_args(argv)
    start, on = time.monotonic(), card()
    wanted = cases(args, on)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found, left = told(args.out, on), 0
    for case in wanted:
        done = found.get(case)
        if done is not None and not (args.again and "failed" in done):
            continue
        if args.stop - (time.monotonic() - start) < args.limit:
            left += 1
            continue
        found[case] = run(case, on, args.limit)
        says = {"card": dataclasses.asdict(on), "case": dataclasses.asdict(case)}
        with args.out.open("a") as file:
            file.write(json.dumps(says | {"told": found[case]}) + "\n")
    order = {case: found[case] for case in sorted(found, key=place)}
    print(table(order, on), end="", flush=True)
    if left:
        print(f"{left} left for want of time: run the same command again")


def place(case: Case) -> tuple[int, int]:
    """Of a line in the table."""
    return ROWS.index(f"{case.model}/{case.kind}"), list(SIDES).index(case.side)


if __name__ == "__main__":
    main()

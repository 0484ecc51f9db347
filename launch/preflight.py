"""Does a recipe fit a TPU slice, and what would a step take there? Said by the TPU compiler, on any
Linux machine, with no TPU: docs/preflight.md.

jaxvid-launch preflight dna_7b_sft --topology v5p:2x2x2 --search rows
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Annotated, Literal

import tyro

from launch.ahead import tell

DOES_NOT_FIT = 3  # exit code


@dataclasses.dataclass(frozen=True)
class Preflight:
    """Compile a recipe's train step and rollout for a TPU slice that is not here, and say whether
    it fits. Exit code 3: it does not, and what to turn is said.

    jaxvid-launch preflight dna_7b_sft --topology v5p:2x2x2 --set data.budget.rows=16
    """

    # A recipe; with `all`, every shipped recipe that names a slice.
    config: Annotated[str, tyro.conf.Positional]
    topology: str = ""  # chip and shape of a slice, such as v5p:4x4x4; "" is the recipe's own
    slices: int = 0  # of that shape, joined by the data centre's network; 0 is the recipe's own
    base: str = ""  # published model whose shapes are taken while the run's folder is not there
    set: tuple[str, ...] = ()  # settings of the recipe, as NAME=VALUE
    search: Literal["", "rows", "tokens"] = ""  # also find the most that fits
    programs: tuple[Literal["train", "rollout"], ...] = ("train", "rollout")
    out: str = ""  # also write what is found here as JSON; with `all`, a folder
    page: str = ""  # with `all`: write the table of that folder into this page


def preflight(args: Preflight) -> None:
    """Raises SystemExit with the code of what was found."""
    if args.config != "all":
        raise SystemExit(_one(args))
    folder, codes = pathlib.Path(args.out or "runs/preflight"), []
    for name in named():
        path = folder / f"{name}.json"
        if path.exists():
            print(f"{name}: done before ({path})", flush=True)
            continue
        codes.append(_one(dataclasses.replace(args, config=name, out=str(path))))
    if args.page:
        page = pathlib.Path(args.page)
        page.write_text(tell.in_page(page.read_text(), tell.table(folder)))
        print(f"wrote the table of {folder} into {page}")
    raise SystemExit(max(codes, default=0))


def named() -> list[str]:
    """The shipped recipes that name a slice."""
    folder = pathlib.Path(__file__).parent.parent / "configs"
    files = sorted(folder.glob("[!_]*.py"))
    return [path.stem for path in files if "\nTOPOLOGY = " in path.read_text()]


def _one(args: Preflight) -> int:
    # As libtpu is loaded: look for no TPU, and let other processes load it too.
    settings = dict(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
    )
    asked = json.dumps(dataclasses.asdict(args))
    command = [sys.executable, "-m", "launch.ahead", asked]
    return subprocess.run(command, env=os.environ | settings).returncode

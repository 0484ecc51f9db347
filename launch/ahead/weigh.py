"""A recipe's programs, compiled for a slice and weighed: does it fit, how long would a step take.

A step takes at least as long as the busiest of products, memory, links of the slice and links
between slices (the roofline model); with nothing overlapped it takes their sum. Both are bounds by
the chip's printed peaks, not measurements.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxvid import config
from launch.ahead import chips, hlo, programs

RESOURCES = ("products", "memory", "ici", "dcn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One program of a recipe on a slice. Bytes, products and seconds are of one chip."""

    program: str  # train, prefill or decode
    fits: bool
    need: float  # bytes of HBM, what stays there while it runs included
    limit: float
    kinds: dict[str, float]  # of `need`; empty where the compiler gave up
    products: float = 0.0  # FLOPs
    useful: float = 0.0  # FLOPs without those made twice to save memory
    moved: float = 0.0  # bytes from and to HBM
    collectives: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by resource
    compiled: float = 0.0  # seconds that the compiler took
    told: str = ""  # what the compiler said where it gave up, or what it would not show

    @property
    def bound(self) -> str:
        """The resource that is busiest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def least(self) -> float:
        return max(self.seconds.values())

    @property
    def most(self) -> float:
        return sum(self.seconds.values())

    def mfu(self, seconds: float) -> float:
        """Useful products over those that the chip could have made in `seconds`."""
        return self.useful / self.products * self.seconds["products"] / seconds


def weigh(program: programs.Program, topology: chips.Topology, mesh: Any) -> Weight:
    """Compile a program and weigh it. What does not fit is an answer, not an error."""
    start, chip = time.perf_counter(), topology.chip
    beside = sum(program.beside.values())
    about = {"program": program.name, "limit": chip.hbm}
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = exhausted(str(error))
        if used is None:
            raise
        took = time.perf_counter() - start
        said = str(error).splitlines()[0][:300]
        return Weight(
            fits=False, need=used + beside, kinds=program.beside, compiled=took, told=said, **about
        )
    took = time.perf_counter() - start
    held = chips.memory(compiled)
    kinds = _kinds(program, held)
    need = held.held + beside
    products, useful = program.trace() / mesh.size, program.useful() / mesh.size
    rates = [chip.flops, chip.memory, chip.ici, chip.dcn]
    try:
        text, told = compiled.as_text(), ""
    except jax.errors.JaxRuntimeError as error:  # some versions cannot print for v5p
        text, told = "", f"the compiler does not show this program: {str(error)[:200]}"
    of = [chips.slice_of(d) for d in mesh.devices.flat]
    found = hlo.traffic(text, of, program.loop) if text else hlo.Traffic(0.0, [], 0)
    busy = [products, found.memory, found.ici, found.dcn]
    return Weight(
        fits=need <= chip.hbm,
        need=need,
        kinds=kinds,
        products=products,
        useful=useful,
        moved=found.memory,
        collectives=tuple(m._asdict() for m in found.collectives),
        seconds={name: x / rate for name, x, rate in zip(RESOURCES, busy, rates)},
        compiled=took,
        told=told,
        **about,
    )


def _kinds(program: programs.Program, held: chips.Memory) -> dict[str, float]:
    """What HBM holds, by kind: arguments by name, temporaries as gradients and rest."""
    kinds = dict(program.kinds)
    known = sum(kinds.values())
    spare = held.temporaries + held.output - held.aliased
    if program.gradients:
        kinds["gradients"] = min(program.gradients, spare)
        spare -= kinds["gradients"]
    kinds["activations"] = spare
    kinds["padding"] = max(held.arguments - known, 0.0)
    return kinds | program.beside


def exhausted(message: str) -> float | None:
    """Bytes that a program would have needed, out of the compiler's refusal; None if it is none."""
    size = r"([\d.]+)([KMGT]?)"
    forms = (f"Used {size} of {size} hbm", rf"required for [^(]*\({size}\) exceeds available HBM")
    found = next((m for form in forms if (m := re.search(form, message))), None)
    if found is None:
        return None
    return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")


def arrays(plan: programs.Plan, count: int = 10) -> list[dict[str, Any]]:
    """The largest arrays of state and batch, with how they are split."""
    leaves = jax.tree_util.tree_leaves_with_path({"state": plan.state, "batch": plan.batch})
    order = sorted(leaves, key=lambda leaf: -programs.whole(leaf[1]))[:count]
    return [
        {
            "name": _name(path),
            "shape": list(x.shape),
            "dtype": np.dtype(x.dtype).name,
            "split": _split(x),
            "bytes": programs.whole(x),
            "chip": programs.bytes_of(x),
        }
        for path, x in order
    ]


def _name(path: tuple[Any, ...]) -> str:
    words = re.findall(r"[A-Za-z_]\w*|\d+", jax.tree_util.keystr(path))
    return ".".join(w for w in words if w not in ("state", "value"))


def _split(x: jax.ShapeDtypeStruct) -> str:
    spec = [] if x.sharding is None else list(x.sharding.spec)
    over = [s if isinstance(s, tuple) else (s,) for s in spec if s is not None]
    named = [
        f"axis {i} over {'+'.join(s if isinstance(s, tuple) else (s,))}"
        for i, s in enumerate(spec)
        if s is not None
    ]
    return ", ".join(named) if over else "not split"


def knobs(run: config.Run, weight: Weight, topology: chips.Topology) -> list[str]:
    """What to turn for a program that does not fit, the cheapest first."""
    kinds, budget, ways = weight.kinds, run.data.budget, topology.size
    over = weight.need - weight.limit
    still = sum(kinds.get(k, 0.0) for k in ("parameters", "optimizer", "gradients", "reference"))
    out = []
    if weight.program != "train":
        if run.rollout.rows == 0 or run.rollout.rows > ways:
            out.append(f"--rollout.rows {ways}: fewer prompts, and their caches, at a time")
        out.append("--rollout.group, --rollout.sampling.max-tokens: fewer or shorter replies")
    else:
        if run.compute.remat not in ("full", "offload"):
            out.append("--compute.remat full: keeps nothing of a layer but its input")
        if run.compute.ffn_parts == 1:
            out.append("--compute.ffn-parts 4: a quarter of an MLP in memory at a time")
        if budget.rows > ways // max(run.tensor * run.context, 1):
            out.append(
                f"--data.budget.rows {budget.rows // 2}: smaller micro-batches, more of them"
            )
        if run.compute.remat == "full":
            out.append("--compute.remat offload: inputs of layers go to the host's memory")
    if "reference" in kinds and kinds["reference"]:
        out.append("--sidecar FOLDER (`jaxvid score`): the reference is scored once, and not held")
    if run.tensor == 1 and still < 0.5 * weight.limit:
        out.append("--tensor 2: activations of heads and ffn over two chips")
        if weight.program == "train" and run.context == 1:
            out.append("--context 2: the tokens of a row over two chips")
    out.append(
        f"--data.budget.tokens below {budget.tokens}: shorter rows (fewer or smaller frames)"
    )
    if still + over > 0.5 * weight.limit or still > 0.5 * weight.limit:
        out.append("a larger --topology: weights, moments and gradients are split over all chips")
    if not run.lora.rank and still > 0.5 * weight.limit:
        out.append("--lora.rank 64 --frozen-dtype bfloat16: no moments of the frozen weights")
    return out


def search(
    need: Callable[[int], float], start: int, step: int, limit: float, tries: int = 6
) -> tuple[int, dict[int, float]]:
    """(the largest multiple of `step` that needs at most `limit`, all that was tried).

    Memory grows nearly as a straight line, so two points say about where it ends. 0: none fits.
    """
    tried = {n: need(n) for n in (start, 2 * start)}
    while len(tried) < tries:
        fitting = max((n for n, x in tried.items() if x <= limit), default=0)
        above = min((n for n, x in tried.items() if x > limit), default=0)
        if above and above - fitting <= step:
            break
        (a, x), (b, y) = sorted(tried.items())[-2:] if not above else _around(tried, limit)
        slope = (y - x) / (b - a)
        guess = int(a + (limit - x) / slope) if slope > 0 else 2 * b
        guess = max(guess // step, 1) * step
        guess = max(guess, fitting + step)
        if above:
            guess = min(guess, above - step)
        tried[guess] = need(guess)
    return max((n for n, x in tried.items() if x <= limit), default=0), tried


def _around(tried: dict[int, float], limit: float) -> Sequence[tuple[int, float]]:
    """Two points to draw the line through: the last that fits and the first that does not."""
    order = sorted(tried.items())
    at = next(i for i, (_, x) in enumerate(order) if x > limit)
    return order[at - 1 : at + 1] if at else order[:2]

"""TPU slices by the name that Cloud TPU gives them: chips, hosts, topology, labels of GKE.

v5e and v6e are counted in chips, v5p in TensorCores, two a chip. Up to eight chips of v5e or v6e
are one host; larger slices have hosts of four chips, as every v5p has. Left out: v4 and older, and
7x, which Cloud TPU's queued resources do not give.
"""

import difflib
import math
from typing import NamedTuple


class Generation(NamedTuple):
    runtime: str  # software version of a TPU VM
    label: str  # cloud.google.com/gke-tpu-accelerator
    machine: str  # machine type of a GKE node, before the number of its chips
    cores: int  # what the number in the name counts, for each chip
    topologies: tuple[str, ...]


class Slice(NamedTuple):
    name: str  # accelerator type of Cloud TPU, "v5litepod-16"
    topology: str
    chips: int
    hosts: int
    runtime: str
    label: str
    machine: str

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x12", "8x8x16", "8x12x16", "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
)
GENERATIONS = {
    "v5litepod": Generation(
        "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", 1, FLAT
    ),
    "v5p": Generation("v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", 2, DEEP),
    "v6e": Generation("v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", 1, FLAT),
}
CHIPS_OF_A_HOST = 4  # of every slice that has several hosts


def _slices() -> dict[str, Slice]:
    known = {}
    for prefix, kind in GENERATIONS.items():
        for topology in kind.topologies:
            chips = math.prod(int(n) for n in topology.split("x"))
            one = chips <= (8 if kind.topologies is FLAT else CHIPS_OF_A_HOST)
            hosts = 1 if one else chips // CHIPS_OF_A_HOST
            name = f"{prefix}-{chips * kind.cores}"
            machine = f"{kind.machine}-{chips // hosts}t"
            known[name] = Slice(name, topology, chips, hosts, kind.runtime, kind.label, machine)
    return known


SLICES = _slices()


def find(name: str) -> Slice:
    """The slice of a name; `v5e-N` is `v5litepod-N`. Raises ValueError naming the nearest."""
    asked = name.replace("v5e-", "v5litepod-", 1)
    if asked in SLICES:
        return SLICES[asked]
    near = difflib.get_close_matches(asked, SLICES, 3, cutoff=0.0)
    prefix = asked.partition("-")[0]
    if prefix in GENERATIONS:  # the nearest in size, of the same generation
        own = [s for s in SLICES if s.startswith(f"{prefix}-")]
        number = asked.partition("-")[2]
        if number.isdigit():
            near = sorted(own, key=lambda s: abs(int(s.partition("-")[2]) - int(number)))[:3]
        else:
            near = own[:3]
    kinds = ", ".join(f"{p}-N" for p in GENERATIONS)
    raise ValueError(
        f"no TPU slice {name!r}; the nearest are {', '.join(near)}. Known are {kinds} "
        "(v5litepod and v6e count chips, v5p counts TensorCores, two a chip)."
    )

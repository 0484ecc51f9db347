"""TPU chips and slices: what a chip has, and meshes of slices that are not here.

Needs libtpu (`pip install jax[tpu]`). No program runs: memory is the compiler's figure for each
chip, true of what it would allocate; its estimates of time are not read.
"""

import contextlib
import difflib
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from jaxvid.chips import PEAKS
from jaxvid.sharding import AXES
from launch.slices import DEEP, FLAT

GIB = 2**30


class Chip(NamedTuple):
    """What one chip has, in SI units. Of what it sends, one direction counts."""

    hbm: float  # bytes that a program may use, by the compiler
    flops: float  # bfloat16 products a second
    memory: float  # bytes a second from and to HBM
    ici: float  # bytes a second to other chips of its slice, over all its links
    dcn: float  # bytes a second to other slices


# Rates are Google's, cloud.google.com/tpu/docs/v5e, /v5p and /v6e, read in 2026 (peaks too):
# HBM GB/s, half of the bidirectional ICI GB/s, and the data centre network a chip
# (of a pod for v5e and v6e, 6.4 and 25.6 Tbit/s over 256 chips; 50 Gbit/s for v5p). HBM is what
# the compiler of libtpu 0.0.42 says is there for a program.
CHIPS = {
    "v5e": Chip(15.75 * GIB, PEAKS["TPU v5e"], 800e9, 200e9, 25e9 / 8),
    "v5p": Chip(95.74 * GIB, PEAKS["TPU v5p"], 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip(31.25 * GIB, PEAKS["TPU v6e"], 1600e9, 400e9, 100e9 / 8),
}
SHAPES = {"v5e": FLAT, "v5p": DEEP, "v6e": FLAT}


class Topology(NamedTuple):
    """Some slices of one shape."""

    kind: str  # a key of CHIPS
    shape: str  # "4x4x4"
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Chips, of all slices."""
        return self.slices * math.prod(map(int, self.shape.split("x")))

    def __str__(self) -> str:
        one = f"{self.kind}:{self.shape}"
        return one if self.slices == 1 else f"{self.slices} x {one}"


def read(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as "v5p:4x4x4". Raises ValueError naming the nearest."""
    known = [f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes]
    if name not in known:
        found = re.fullmatch(r"(\w+):([\dx]+)", name)
        own = [k for k in known if found and k.startswith(f"{found[1]}:")]
        near = own or difflib.get_close_matches(name, known, 4, cutoff=0.3) or known
        raise ValueError(
            f"no slice {name!r}. A slice is its chip and its shape: of {', '.join(CHIPS)}; "
            f"such as {', '.join(near[:15])}"
        )
    if slices < 1:
        raise ValueError(f"{slices} slices of {name}; give at least 1")
    return Topology(*name.split(":"), slices)


class Memory(NamedTuple):
    """Bytes of HBM on each chip."""

    arguments: int
    temporaries: int
    output: int
    aliased: int  # of the output, what lies in donated arguments
    peak: int  # the most that is live at any time, arguments and output included

    @property
    def held(self) -> int:
        """What has to be there: arguments, temporaries, and outputs with memory of their own."""
        return self.arguments + self.temporaries + self.output - self.aliased


def versions() -> dict[str, str]:
    """Of JAX and, where it is installed, the TPU compiler."""
    found = {"jax": jax.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["libtpu"] = importlib.metadata.version("libtpu")
    return found


def installed() -> bool:
    """Whether the TPU compiler is here."""
    return "libtpu" in versions()


def mesh(topology: str, *, devices: int = 0, tensor: int = 1) -> Mesh:
    """The mesh (replica 1, fsdp, tensor, context 1) of a topology such as "v5p:4x4x4", or of its
    first `devices` chips.

    Raises ImportError without libtpu.
    """
    chips = _devices(topology, 1)
    chips = np.array(chips[: devices or len(chips)])
    return Mesh(chips.reshape(1, -1, tensor, 1), AXES, axis_types=(AxisType.Auto,) * 4)


def sizes(topology: Topology, asked: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a mesh's axes over a topology; -1 takes what the others leave.

    Raises ValueError where they do not multiply to its chips, or where a slice would be cut.
    """
    if list(asked.values()).count(-1) > 1:
        raise ValueError(f"mesh {dict(asked)}: at most one axis may be -1")
    known = math.prod(n for n in asked.values() if n != -1)
    found = {a: topology.size // known if n == -1 else n for a, n in asked.items()}
    if math.prod(found.values()) != topology.size:
        raise ValueError(
            f"mesh {dict(asked)} does not divide the {topology.size} chips of {topology}. Set the "
            f"axes so that their product is {topology.size}, one of them to -1."
        )
    if found["replica"] % topology.slices:
        raise ValueError(
            f"replica {found['replica']} does not divide over the {topology.slices} slices of "
            f"{topology}: of the axes it alone crosses slices. Set replica to a multiple of "
            f"{topology.slices}"
        )
    return found


def mesh_of(topology: Topology, asked: Mapping[str, int]) -> Mesh:
    """The mesh of a run on slices that are not here; `replica` goes over the slices first.

    Raises ValueError as `sizes` does, ImportError without libtpu.
    """
    found = sizes(topology, asked)
    one = [found["replica"] // topology.slices, *list(found.values())[1:]]
    chips = np.array(_devices(f"{topology.kind}:{topology.shape}", topology.slices))
    parts = chips.reshape(topology.slices, -1)  # the topology lists slice by slice
    cut = topology.kind == "v5e"  # as jax.make_mesh: elsewhere no side of a slice is cut in two
    lay = lambda part: mesh_utils.create_device_mesh(one, list(part), allow_split_physical_axes=cut)
    try:
        laid = [lay(part) for part in parts]
    except NotImplementedError:
        raise ValueError(
            f"mesh {dict(zip(found, one))} does not lie on a slice of {topology.shape}: each axis "
            "must be the product of some of its sides. Set --tensor to one of them, or to 1"
        ) from None
    return Mesh(np.concatenate(laid), tuple(found), axis_types=(AxisType.Auto,) * len(found))


def slice_of(device: Any) -> int:
    """The slice of a chip; topologies of one slice do not number it."""
    try:
        return device.slice_index
    except AttributeError:
        return 0


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler allocates on each chip."""
    m = compiled.memory_analysis()
    return Memory(
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.peak_memory_in_bytes,
    )


def _devices(topology: str, slices: int) -> Sequence[Any]:
    if not installed():
        raise ImportError(
            "the TPU compiler is not installed; `pip install 'jax[tpu]'` (Linux on x86-64). A "
            "benchmark leaves this part out with --skip-tpu"
        )
    several = {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several)
    return found.devices

"""Compile ahead of time for a TPU slice that is not there, and read what the compiler says of it.

Needs libtpu (`pip install jax[tpu]`). No program runs: memory is the compiler's figure for each
chip, true of what it would allocate; its estimates of time are not read.
"""

import importlib.metadata
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxvid.sharding import AXES


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


def installed() -> bool:
    """Whether the TPU compiler is here."""
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def mesh(topology: str, *, devices: int = 0, tensor: int = 1) -> Mesh:
    """The mesh (replica 1, fsdp, tensor) of a topology such as "v5p:4x4x4", or of its first
    `devices` chips.

    Raises ImportError without libtpu.
    """
    if not installed():
        raise ImportError(
            "the TPU compiler is not installed; `pip install 'jax[tpu]'`, or leave this part out "
            "with --skip-tpu"
        )
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    chips = np.array(chips[: devices or len(chips)])
    return Mesh(chips.reshape(1, -1, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


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

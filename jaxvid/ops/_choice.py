"""Which implementation `impl=None` means."""

from typing import Literal

import jax

Impl = Literal["xla", "pallas", "interpret"]


def choose(impl: Impl | None, fits: bool = True) -> Impl:
    """Pallas on a TPU where the shape fits and one device holds the arrays, else XLA.

    The compiler cannot split a kernel over devices: outside shard_map it would gather its operands.
    """
    if impl is not None:
        return impl
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    return "pallas" if jax.default_backend() == "tpu" and fits and alone else "xla"

"""Which implementation `impl=None` means."""

from typing import Literal

import jax

Impl = Literal["xla", "pallas", "interpret"]


def platform() -> str:
    """Of the devices of the mesh in context, which need not be here (compiling ahead of time);
    without a mesh, of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(impl: Impl | None, fits: bool = True) -> Impl:
    """Pallas on TPUs where the shape fits, else XLA.

    Several devices need a mesh in context, over which an op spreads its kernel: the compiler cannot
    split a kernel by itself.
    """
    if impl is not None:
        return impl
    placed = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
    return "pallas" if platform() == "tpu" and fits and placed else "xla"

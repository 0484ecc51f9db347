"""Which implementation `impl=None` means."""

from typing import Literal, get_args

import jax

Impl = Literal["xla", "pallas", "interpret"]


def platform() -> str:
    """Of the devices of the mesh in context, which need not be here (compiling ahead of time);
    without a mesh, of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(impl: str | None, fits: bool = True) -> Impl:
    """Pallas on TPUs where the shape fits, else XLA.

    Several devices need a mesh in context, over which an op spreads its kernel: the compiler cannot
    split a kernel by itself. Raises ValueError for a name that is none of these.
    """
    if impl is None:
        placed = jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty
        return "pallas" if platform() == "tpu" and fits and placed else "xla"
    if impl not in get_args(Impl):
        raise ValueError(f"no impl={impl!r} here; there are {get_args(Impl)}, and None chooses")
    return impl

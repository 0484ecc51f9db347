"""The same random weights in JAX and in torch, without a file: a number is a hash of its place.

Of the weight that files call NAME, row i and column j (outputs and inputs as files have them):

    bits = 24 bits of a hash of (NAME, i, j)        w = (bits / 2^24 - 1/2) scale

uniform and of a linear layer's usual size: standard deviation 1 / sqrt(inputs), 0.02 in tables.
Norms are 1 and biases 0. All in int32, which wraps alike in both, and exact in float32, so that
both sides have the same numbers to the bit, made where they lie.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid.models import hf
from jaxvid.models.family import Place

ADAPTER = ".lora_A"  # of a layer's adapter, after the layer's name
TABLES = ("embed_tokens.weight", "lm_head.weight")


def seed(name: str) -> int:
    """Of a weight, as an int32."""
    return (zlib.crc32(name.encode()) ^ 2**31) - 2**31


def scale(name: str, inputs: int) -> float:
    """Width of the range of a weight's numbers; of an adapter's, as PEFT draws them."""
    if name.endswith(ADAPTER):
        return 2 * inputs**-0.5
    return math.sqrt(12) * (0.02 if name.endswith(TABLES) else inputs**-0.5)


def mixed(i: Any, j: Any, start: Any) -> Any:
    """24 bits for each pair of int32 arrays that broadcast, of JAX or of torch."""
    x = i * 0x1E3779B1 + j * 0x45EBCA6B + start
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor  # both copy the sign: mask it
    return (x >> 8) & 0xFFFFFF


def fill(cfg: Any, shapes: nnx.State, kind: Callable[[tuple[str, ...]], str]) -> nnx.State:
    """Numbers for the weights that `shapes` holds (adapters too, whose b is 0), `kind` being the
    dtype by path. One program, which makes each where it is to lie."""
    where, flat = hf.family_of(cfg).places(cfg), list(nnx.to_flat_state(shapes))
    make = jax.jit(lambda: [_one(where, path, v.shape, kind(path)) for path, v in flat])
    return nnx.from_flat_state([(path, v.replace(x)) for (path, v), x in zip(flat, make())])


def _one(where, path, shape, dtype):
    if path[-2:] == ("lora", "b"):
        return jnp.zeros(shape, dtype)
    if path[-2:] == ("lora", "a"):
        layer = where[*path[:-2], "w"]
        place = Place(layer.name.removesuffix(".weight") + ADAPTER, layer.inputs)
    else:
        place = where[path]
    bias, stacked = place.name.endswith(".bias"), "{}" in place.name
    own = shape[1:] if stacked else shape
    if bias or len(own) == 1:
        return jnp.full(shape, 0.0 if bias else 1.0, dtype)
    many, n = shape[0] if stacked else 1, math.prod(own[: place.inputs or 1])
    sizes = (many, n, math.prod(own) // n)
    at = [jax.lax.broadcasted_iota(jnp.int32, sizes, d) for d in (1, 2)]
    (column, row), (inputs, outputs) = at, sizes[1:]
    if not place.inputs:  # a table lies here as in the files, a matrix the other way round
        (row, column), (outputs, inputs) = at, sizes[1:]
    seeds = np.array([seed(place.name.format(i)) for i in range(many)], np.int32)
    bits = mixed(row + place.part * outputs, column, seeds[:, None, None])
    x = (bits.astype(jnp.float32) * 2**-24 - 0.5) * scale(place.name, inputs)
    return x.astype(dtype).reshape(shape)

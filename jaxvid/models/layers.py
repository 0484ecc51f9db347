"""The layers every model here is made of. A weight says its shape and its logical axes once."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxvid import sharding
from jaxvid.ops._cast import cast

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

# What of a layer is kept for the backward pass, by name; its input always is.
_POLICIES = jax.checkpoint_policies
REMAT = {
    "none": None,  # everything is kept, nothing computed again
    "full": _POLICIES.nothing_saveable,  # nothing is kept: least memory, one more forward pass
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,  # products with weights are kept
    # Attention's outputs are kept: for rows of over 2,048 tokens, and for kernels; shorter ones
    # have to make most of it again.
    "attention": _POLICIES.save_only_these_names("attention"),
    "offload": _POLICIES.save_and_offload_only_these_names(  # as "full", the input kept by the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model runs; nothing here changes what it computes, only precision, memory and time."""

    dtype: str = "float32"  # of activations; weights stay float32
    remat: str = "full"  # what is kept of a layer: none (all), full, dots, attention or offload
    unroll: int = 1  # layers per iteration of the scan
    ffn_parts: int = 1  # of an MLP, summed one after the other: one is in memory at a time

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; choose one of {DTYPES}")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is not known; choose one of {tuple(REMAT)}")
        if self.unroll < 1:
            raise ValueError(f"unroll={self.unroll} must be at least 1")
        if self.ffn_parts < 1:
            raise ValueError(
                f"ffn_parts={self.ffn_parts} must be at least 1, which takes all at once"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*R I"], w: Array, axes: tuple[str, ...]) -> Float[Array, "*R O"]:
    """x w in x's dtype; w[inputs + outputs] has the logical `axes`. Its derivative is written out
    because the automatic one multiplies transposed copies on CPU (1.7x the time of an MLP), to have
    w's gradient in w's type, and to leave it where w lies. On a mesh w is gathered as it is
    multiplied, in x's dtype; rows fewer than w is wide, as in decoding, go to w's parts instead.
    Where w is not differentiated, x is not kept and no gradient of w is computed."""
    return _product(x, w, axes)


def _product(x, w, axes):
    on = sharding.splits(dict(zip(axes, w.shape)))
    if not on.get("embed") or math.prod(x.shape[:-1]) >= w.shape[axes.index("embed")]:
        return x @ _whole(w, axes, x.dtype).reshape(x.shape[-1], -1)
    w = sharding.pin_weight(cast(w, x.dtype), axes, whole=False).reshape(x.shape[-1], -1)
    if axes[0] == "embed":
        return sharding.sent(x, w, axes[1] if on[axes[1]] else None)
    inside = (None,) * (x.ndim - 2)
    y = sharding.fit(x, "sent", *inside, axes[0] if on[axes[0]] else None) @ w
    return sharding.fit(sharding.fit(y, "sent", *inside, "embed"), "rows", *inside, None)


def _whole(w, axes, dtype):
    return sharding.pin_weight(cast(w, dtype), axes, whole=True)


def _matmul_forward(x, w, axes):
    # The plain product: policies of rematerialisation know it, and `matmul` they do not.
    return _product(x.value, w.value, axes), (x.value if w.perturbed else None, w.value)


def _matmul_backward(axes, kept, dy):
    x, w = kept
    dx, dw = dy @ _whole(w, axes, dy.dtype).reshape(-1, dy.shape[-1]).T, None
    if x is not None:
        rows = tuple(range(x.ndim - 1))
        dims = ((rows, rows), ((), ()))
        dw = jax.lax.dot_general(x, dy, dims, preferred_element_type=w.dtype)
        dw = sharding.pin_weight(dw.reshape(w.shape), axes, whole=False)
    return dx, dw


def flat(x: Array, last: int = 1) -> Array:
    """x as a matrix whose rows are the `last` dimensions. Where tokens are split over devices the
    dimensions before those stay: a split of rows and one of tokens cannot be put into one."""
    lead, width = x.shape[: x.ndim - last], math.prod(x.shape[x.ndim - last :])
    return x.reshape(*(lead if sharding.context() > 1 else (-1,)), width)


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


class Linear(nnx.Module):
    """y = x w + b over the trailing `inputs` of x: w[inputs + outputs], b[outputs].

    `lora` is None or what models/lora.py attaches: a function of x to be added.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: str,
        *,
        bias: bool = False,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.contracted = len(inputs)
        self.axes = names = tuple(axes.split())
        std = scale / math.sqrt(math.prod(inputs))  # LeCun's: the output has the input's variance
        w = std * jax.random.normal(rngs.params(), inputs + outputs, jnp.float32)
        self.w = nnx.Param(w, axes=names)
        if bias:
            self.b = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=names[len(inputs) :])
        else:
            self.b = None
        self.lora = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        w, n = self.w[...], self.contracted
        rows = flat(x, n)
        y = matmul(rows, w, self.axes)
        if self.lora is not None:
            y = y + self.lora(rows)
        if self.b is not None:
            y = y + self.b[...].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.reshape(*x.shape[: x.ndim - n], *w.shape[n:])


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Rows of the token table, in `dtype`.

    On a mesh the table stays where it is: each device looks up the tokens of all the devices that
    share its rows' table, in its own part of the width and of the vocabulary, and sends every
    device its own. What crosses devices is as large as the result, and the gradient is added in the
    table's type where the table lies.
    """
    on = sharding.splits({"rows": len(tokens), "vocab": table.shape[0], "embed": table.shape[1]})
    if not set(on["embed"]) <= set(on["rows"]):
        on["embed"] = ()

    def find(table, tokens):
        table, width, vocab = sharding.at_rest(table), on["embed"], on["vocab"]
        if width:
            tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocab:
            tokens = tokens - jax.lax.axis_index(vocab) * table.shape[0]
            mine = (tokens >= 0) & (tokens < table.shape[0])
            x = jnp.where(mine[..., None], table[jnp.where(mine, tokens, 0)], 0).astype(dtype)
        else:
            x = table[tokens].astype(dtype)
        if width:
            x = jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocab) if vocab else x

    out = ("rows", None, None)
    return sharding.spread(find, (("vocab", "embed"), ("rows", None)), out, on)(table, tokens)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the statistics in float32."""

    def __init__(self, width: int, *, eps: float, axis: str = "embed"):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (y.astype(x.dtype) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias, the statistics in float32."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        wide = (1,) * (x.ndim - 1) + (-1,)
        y = y * self.scale[...].reshape(wide) + self.bias[...].reshape(wide)
        return y.astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(
        self, width: int, ffn: int, *, bias: bool = False, out_scale: float = 1.0, rngs: nnx.Rngs
    ):
        self.gate = Linear((width,), (ffn,), "embed ffn", bias=bias, rngs=rngs)
        self.up = Linear((width,), (ffn,), "embed ffn", bias=bias, rngs=rngs)
        self.down = Linear((ffn,), (width,), "ffn embed", bias=bias, scale=out_scale, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows D"], parts: int = 1) -> Float[Array, "*rows D"]:
        """With `parts`, as the sum over so many stretches of the ffn, each of whose activations and
        gathered weights are alone in memory, in both passes. The products are the same, and so is
        what crosses devices. Raises ValueError where the ffn does not divide."""
        if parts > 1:
            return self._in_parts(x, parts)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def _in_parts(self, x, parts):
        ffn = self.down.w.shape[0]
        ways = sharding.ways(sharding.splits({"ffn": ffn})["ffn"])
        if ffn % (parts * ways) or self.gate.b is not None:
            raise ValueError(
                f"an ffn of {ffn} over {ways} devices does not divide into {parts} parts without "
                "bias; set ffn_parts to a divisor, or to 1"
            )
        if self.down.lora is not None and self.down.lora.noise is not None:
            raise ValueError(
                "dropout before mlp.down needs all of the ffn at once; set ffn_parts to 1, "
                "lora.dropout to 0, or leave mlp.down out of lora.targets"
            )

        def cut(w, axis):
            """[parts, ...]: of every device's stretch of the ffn, one part."""
            shape = w.shape[:axis] + (ways, parts, ffn // parts // ways) + w.shape[axis + 1 :]
            part = w.shape[:axis] + (ffn // parts,) + w.shape[axis + 1 :]
            return jnp.moveaxis(w.reshape(shape), axis + 1, 0).reshape(parts, *part)

        rows = flat(x)
        given, into = (self.gate, self.up), self.down  # in parts of their outputs; of its inputs
        low = [None if m.lora is None else m.lora.reduce(rows) for m in given]

        @jax.checkpoint
        def part(sums, weights):
            whole, (y, z) = [], sums
            for m, r, (w, b) in zip(given, low, weights[:2]):
                out = matmul(rows, w, m.axes)
                whole.append(out if r is None else out + m.lora.expand(r, b))
            inside = jax.nn.silu(whole[0]) * whole[1]
            w, a = weights[2]
            y = y + matmul(inside, w, into.axes).astype(y.dtype)
            return (y, z if a is None else z + into.lora.reduce(inside, a).astype(z.dtype)), None

        def cuts(m, axis, side):
            return cut(m.w[...], axis), None if m.lora is None else cut(side(m.lora)[...], axis)

        weights = [cuts(m, 1, lambda lora: lora.b) for m in given]
        weights.append(cuts(into, 0, lambda lora: lora.a))
        z = None
        if into.lora is not None:
            z = jnp.zeros((*rows.shape[:-1], into.lora.rank), jnp.float32)
        (y, z), _ = jax.lax.scan(part, (jnp.zeros(rows.shape, jnp.float32), z), weights)
        if z is not None:
            y = y + into.lora.expand(z.astype(x.dtype)).astype(y.dtype)
        return y.reshape(x.shape).astype(x.dtype)


class MLP(nnx.Module):
    """out(activation(hidden x)); `widths` are those of x, of the inside and of the result."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        activation: str,
        *,
        bias: bool = True,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        x, ffn, y = widths
        self.activation = activation
        self.hidden = Linear((x,), (ffn,), "embed ffn", bias=bias, rngs=rngs)
        self.out = Linear((ffn,), (y,), "ffn embed", bias=bias, scale=out_scale, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows W"]) -> Float[Array, "*rows D"]:
        return self.out(ACTIVATIONS[self.activation](self.hidden(x)))


def stack(build, layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules made by `build(rngs)` as one, every weight with a leading layer axis."""
    return nnx.split_rngs(splits=layers)(nnx.vmap(build))(rngs)


def scan(body, carry, modules: nnx.Module, extras, compute: Compute):
    """Run `body(carry, module, extra) -> (carry, out)` over stacked modules; trace it once.

    `extras` is a pytree whose leaves have a leading layer axis. Returns (carry, stacked outs).
    """
    graph, weights = nnx.split(modules)

    def layer(carry, scanned):
        w, extra = scanned
        return body(checkpoint_name(carry, "layer"), nnx.merge(graph, w), extra)

    if compute.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[compute.remat])
    return jax.lax.scan(layer, carry, (weights, extras), unroll=compute.unroll)

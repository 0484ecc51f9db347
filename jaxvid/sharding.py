"""Logical axis names -> mesh axes. The only file that knows the mesh."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Names = tuple[str | None, ...]  # logical names of an array's dimensions; None is not split

AXES = ("replica", "fsdp", "tensor", "context")

# Weights W[D_fsdp, F_tensor]; activations x[B_(replica, fsdp), T_context, D]. An axis absent from
# the rules is an error.
RULES = {
    "rows": ("replica", "fsdp"),
    "sent": "replica",  # rows that were sent to where the parts of a weight lie
    "tokens": "context",
    "embed": "fsdp",
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "patch": None,
    "merged": None,
    "head": None,
    "rank": None,
    "layers": None,
}


def make_mesh(replica: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1) -> Mesh:
    """Mesh (replica, fsdp, tensor, context) over all devices; -1 takes what the others leave.

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices, sizes = jax.devices(), [replica, fsdp, tensor, context]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {dict(zip(AXES, sizes))}: at most one axis may be -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices; there are "
            f"{len(devices)}. Set the axes so that their product is {len(devices)}."
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: tuple[str, ...], rules=RULES) -> P:
    """PartitionSpec of an array whose dimensions carry the logical names `axes`."""
    unknown = [a for a in axes if a not in rules]
    if unknown:
        raise ValueError(f"no sharding rule for axes {unknown} of {axes}; known: {sorted(rules)}")
    return P(*(rules[a] for a in axes))


def _fitting(shape: tuple[int, ...], names: Names, mesh: Mesh | AbstractMesh, rules) -> P:
    """The spec of an array; a dimension that does not divide over its mesh axis is replicated."""
    splits = lambda d, n: n is not None and mesh.shape[n] > 1 and d % mesh.shape[n] == 0
    fits = [n if splits(d, n) else None for d, n in zip(shape, spec(names, rules))]
    while fits and fits[-1] is None:  # as the compiler writes it, so that layouts compare equal
        fits.pop()
    return P(*fits)


def parameter_shardings(params: nnx.State, mesh: Mesh | AbstractMesh, rules=RULES) -> nnx.State:
    """Shardings of an (abstract) parameter tree. Axes missing on the left are stacked layers.

    A dimension that does not divide over its mesh axis is replicated.
    """

    def of(path, v):
        axes = v.get_metadata()["axes"]
        missing = len(v.shape) - len(axes)
        if missing not in (0, 1):
            raise ValueError(f"{jax.tree_util.keystr(path)}: shape {v.shape} but axes {axes}")
        names = ("layers",) * missing + axes
        return v.replace(NamedSharding(mesh, _fitting(v.shape, names, mesh, rules)))

    return jax.tree.map_with_path(of, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def pin_weight(w: jax.Array, axes: tuple[str, ...], *, whole: bool, rules=RULES) -> jax.Array:
    """A weight (or its gradient) where it lies; `whole`: gathered over the width, for a product.

    Left to itself the compiler turns the product of split weights into a loop of sends, which holds
    several copies of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return w
    if whole:
        rules = rules | {"embed": None}
    return jax.lax.with_sharding_constraint(w, _fitting(w.shape, axes, mesh, rules))


def row_sharding(mesh: Mesh, rows: int, leading: int = 0, rules=RULES) -> NamedSharding:
    """Sharding of batch leaves whose axis `leading` is rows.

    Raises ValueError if `rows` does not divide over the mesh's data axes.
    """
    ways = data_shards(mesh, rules)
    if rows % ways:
        raise ValueError(
            f"a batch of {rows} rows does not divide over the mesh's {ways} data shards "
            f"({dict(mesh.shape)}). Set rows to a multiple of {ways}, or use a smaller mesh."
        )
    return NamedSharding(mesh, P(*(None,) * leading, rules["rows"]))


def fit(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an array's sharding by logical axes (None: not split); a dimension that does not divide
    over its mesh axes is not split. Outside a mesh, no-op."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    on = [splits({a: n})[a] if a else () for a, n in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, P(*(over or None for over in on)))


def splits(sizes: Mapping[str, int], rules=RULES) -> dict[str, tuple[str, ...]]:
    """The mesh axes over which dimensions of these logical names and sizes are split in the mesh in
    context; none for one that does not divide, and none without a mesh or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()

    def axes(name, size):
        if mesh.empty or mesh.manual_axes or rules[name] is None:
            return ()
        named = rules[name] if isinstance(rules[name], tuple) else (rules[name],)
        over = tuple(a for a in named if mesh.shape.get(a, 1) > 1)
        return over if size % int(np.prod([mesh.shape[a] for a in over])) == 0 else ()

    return {name: axes(name, size) for name, size in sizes.items()}


def context() -> int:
    """Into how many parts the mesh in context splits the tokens of a row."""
    return ways(splits({"tokens": 0})["tokens"])


def check_tokens(mesh: Mesh, tokens: int) -> None:
    """ValueError unless rows of so many tokens can be dealt out over the mesh's `context`."""
    parts = 2 * mesh.shape["context"]
    if parts > 2 and tokens % parts:
        raise ValueError(
            f"a row of {tokens} tokens does not divide into the {parts} pieces of a mesh with "
            f"context {parts // 2}. Set --data.budget.tokens to a multiple of {parts}"
        )


def deal(x: jax.Array, axis: int = 1) -> jax.Array:
    """Rows as the devices of `context` hold them: tokens in another order, split over `axis`.

    A token sees those before it, so each device gets a piece from the front of the row and one
    from its back: 0 7 | 1 6 | 2 5 | 3 4. No-op where rows are not split, or do not divide so.
    """
    parts = pieces(x.shape[axis])
    if not parts:
        return x
    x = jnp.moveaxis(x, axis, 0)
    cut = x.reshape(parts, -1, *x.shape[1:])
    paired = jnp.stack([cut[: parts // 2], cut[parts // 2 :][::-1]], axis=1)
    names = ["rows", *(None,) * (x.ndim - 1)]
    names[axis] = "tokens"
    return fit(jnp.moveaxis(paired.reshape(x.shape), 0, axis), *names)


def collect(x: jax.Array) -> jax.Array:
    """Dealt rows [B, T, ...] whole again on every device of `context`, and in order."""
    x = fit(x, "rows", *(None,) * (x.ndim - 1))
    parts = pieces(x.shape[1])
    if not parts:
        return x
    paired = jnp.moveaxis(x, 1, 0).reshape(parts // 2, 2, -1, len(x), *x.shape[2:])
    cut = jnp.concatenate([paired[:, 0], paired[::-1, 1]])
    return jnp.moveaxis(cut.reshape(x.shape[1], len(x), *x.shape[2:]), 0, 1)


def pieces(tokens: int) -> int:
    """Into how many pieces a row is dealt out; 0 is not at all."""
    parts = 2 * context()
    return parts if parts > 2 and tokens % parts == 0 else 0


def data_shards(mesh: Mesh | AbstractMesh, rules=RULES) -> int:
    """Ways in which the mesh cuts rows."""
    return int(np.prod([mesh.shape[a] for a in rules["rows"]]))


def ways(axes: tuple[str, ...]) -> int:
    """Into how many parts the mesh in context splits what lies over these mesh axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[a] for a in axes]))


def spread(
    f: Callable,
    ins: Sequence[Names],
    outs: Sequence[Names] | Names,
    placed: Mapping[str, tuple[str, ...]],
) -> Callable:
    """`f` run by each device on its own part of the arguments; `f` itself where there is no mesh.

    `ins` and `outs` name the dimensions of each array (or of every array of an argument that is a
    tree of them), `placed` (from `splits`) says over which
    mesh axes a name is split. An axis that no name is split over does the same work twice. What
    crosses devices is what `f` itself sends.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.size == 1:
        return f
    spec = lambda names: P(*(placed.get(n) or None for n in names))
    many = lambda x: not all(n is None or isinstance(n, str) for n in x)
    out_specs = tuple(map(spec, outs)) if many(outs) else spec(outs)
    return jax.shard_map(f, in_specs=tuple(map(spec, ins)), out_specs=out_specs, check_vma=False)


def sent(x: jax.Array, w: jax.Array, out: str | None, dtype: object = None) -> jax.Array:
    """x[rows, ..., embed] w[embed, out]: the rows go to the parts of w, and the sums of a device's
    own rows come back. For rows that are fewer than w is wide: w itself stays where it lies. `out`
    is the logical name of w's other dimension, `dtype` the result's if it is not x's."""
    rows, inside = x.shape[0], (None,) * (x.ndim - 2)
    names = {"rows": rows, "sent": rows, "embed": w.shape[0]} | ({out: w.shape[1]} if out else {})
    on = splits(names)
    own = set(on["embed"]) <= set(on["rows"])  # else every device gets the sums of all rows

    def product(x, w):
        y = jnp.matmul(x, w, preferred_element_type=dtype)
        if not (own and on["embed"]):
            return jax.lax.psum(y, on["embed"])
        # As a reduce-scatter, of which the TPU compiler makes an all-reduce: twice the bytes.
        parts = y.reshape(ways(on["embed"]), -1, *y.shape[1:])
        parts = jax.lax.all_to_all(parts, on["embed"], split_axis=0, concat_axis=0, tiled=True)
        return parts.sum(axis=0, dtype=jnp.float32).astype(y.dtype)

    ins = (("sent", *inside, "embed"), ("embed", out))
    return spread(product, ins, ("rows" if own else "sent", *inside, out), on)(x, w)


def at_rest(x: jax.Array) -> jax.Array:
    """Pin one device's part of a matrix, and of its gradient, to the memory layout that TPUs keep
    such arguments in: the side that fills lanes of 128 lies innermost. No-op on other platforms.

    A sparse gradient comes laid out otherwise; unpinned, the compiler copies the parameter and both
    moments to that layout and back instead of the gradient alone (0.7 GiB of a 7B step).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "tpu":
        return x
    filled = x.shape[1] % 128 == 0 or x.shape[0] % 128 != 0
    return with_layout_constraint(x, Layout((0, 1) if filled else (1, 0)))

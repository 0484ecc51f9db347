"""LoRA (https://arxiv.org/abs/2106.09685): y = x w + scale drop(x) a b; a and b alone are trained.

Ours, because qwix and flax's own LoRA wrap layers whose product they know, and here it is a written
derivative over stacked, scanned layers whose weights carry logical axes and are gathered in use.
Adapters are modules inside the linear layers they belong to, stacked as those are, so that scans,
meshes, optimizers and checkpoints meet them as they meet any other weight. PEFT's files are
models/peft.py's.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jaxvid import paths, sharding
from jaxvid.models.layers import Linear, matmul

TRAINED = ("lora",)  # the pattern of what a LoRA run trains


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters in place of training the weights, which stay frozen. Rank 0: none."""

    rank: int = 0
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on an adapter's input, in training steps alone
    targets: tuple[str, ...] = ("decoder",)  # patterns of the linear layers that get one
    rank_stabilised: bool = False  # alpha / sqrt(rank) instead (https://arxiv.org/abs/2312.03732)

    def __post_init__(self):
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; wanted are a "
                "rank of at least 0, an alpha above 0 and a dropout of at least 0 and below 1"
            )
        rest = {f.name: f.default for f in dataclasses.fields(self) if f.name != "rank"}
        if not self.rank and any(vars(self)[name] != value for name, value in rest.items()):
            raise ValueError("lora: settings are given and rank is 0, which is none; set lora.rank")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Noise(nnx.Variable):
    """The key of an adapter's dropout in one step: no weight, never stored."""


class Adapter(nnx.Module):
    """scale drop(x) a b for x [..., I]; a[inputs + (rank,)] and b[(rank,) + outputs]."""

    def __init__(self, cfg: LoRA, linear: Linear):
        axes, n = linear.axes, linear.contracted
        self.rank, self.scale, self.dropout = cfg.rank, cfg.scale, cfg.dropout
        shape, dims = linear.w.shape, len(axes)
        layers, shape = shape[: len(shape) - dims], shape[len(shape) - dims :]
        self.stacked = bool(layers)
        self.axes = (axes[:n] + ("rank",), ("rank",) + axes[n:])
        a = jnp.zeros(layers + shape[:n] + (cfg.rank,), jnp.float32)
        b = jnp.zeros(layers + (cfg.rank,) + shape[n:], jnp.float32)
        self.a = nnx.Param(a, axes=self.axes[0])
        self.b = nnx.Param(b, axes=self.axes[1])
        self.noise = nnx.data(None)

    def __call__(self, x: Float[Array, "*R I"]) -> Float[Array, "*R O"]:
        return self.expand(self.reduce(x))

    def reduce(self, x: Float[Array, "*R I"], a: Array | None = None) -> Float[Array, "*R r"]:
        """drop(x) a; `a` is a part of its inputs, or all of it."""
        if self.noise is not None:
            kept = jax.random.bernoulli(self.noise[...], 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return matmul(x, self.a[...] if a is None else a, self.axes[0])

    def expand(self, low: Float[Array, "*R r"], b: Array | None = None) -> Float[Array, "*R O"]:
        """scale low b; `b` is a part of its outputs, or all of it."""
        return matmul(low, self.b[...] if b is None else b, self.axes[1]) * self.scale


def adapters(model: nnx.Module) -> list[tuple[str, Adapter]]:
    """Every adapter with the path of its linear layer."""
    found = [(path[:-1], m) for path, m in nnx.iter_modules(model) if isinstance(m, Adapter)]
    return [(paths.join(path), m) for path, m in found]


def attach(
    graph: nnx.GraphDef, params: nnx.State, cfg: LoRA, seed: int, *, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model with adapters on the linear layers that `cfg.targets` name, and its weights: the
    arrays given, and adapters that change nothing yet (b is 0; a is uniform, as PEFT draws it).

    Raises ValueError for a target that no linear layer has.
    """

    def adapted():
        model = nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params))
        linears = {paths.join(p): m for p, m in nnx.iter_modules(model) if isinstance(m, Linear)}
        for name in paths.chosen(cfg.targets, list(linears), "lora.targets"):
            linears[name].lora = Adapter(cfg, linears[name])
        return model

    graph, shapes = nnx.split(nnx.eval_shape(adapted))
    shapes, _ = nnx.split_state(shapes, _is_adapter, ...)

    def draw(key):
        def one(path, v):
            name = paths.join(k.key for k in path)
            if name.endswith(".b"):
                return v.replace(jnp.zeros(v.shape, v.dtype))
            bound = math.prod(v.shape[-len(v.get_metadata()["axes"]) : -1]) ** -0.5
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return v.replace(jax.random.uniform(own, v.shape, v.dtype, -bound, bound))

        return jax.tree.map_with_path(one, shapes, is_leaf=lambda v: isinstance(v, nnx.Variable))

    out = None if mesh is None else sharding.parameter_shardings(shapes, mesh)
    fresh = jax.jit(draw, out_shardings=out)(jax.random.key(seed))
    return graph, nnx.merge_state(params, fresh)


def _is_adapter(path, _) -> bool:
    return "lora" in path


def drop(model: nnx.Module, key: Key[Array, ""]) -> None:
    """Switch dropout on, with masks drawn from `key`; each adapter and layer has its own.

    A mask depends on the place of a row in its micro-batch and on nothing of the mesh.
    """
    for name, adapter in adapters(model):
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        own = jax.random.split(own, adapter.a.shape[0]) if adapter.stacked else own
        adapter.noise = Noise(own)


def merge(params: nnx.State, cfg: LoRA) -> nnx.State:
    """The weights of the plain model, w + scale a b: the same outputs without adapters. A changed
    weight is float32, the others are the arrays given."""
    flat = dict(nnx.to_flat_state(params))
    for path in [path for path in flat if path[-2:] == ("lora", "a")]:
        at = (*path[:-2], "w")
        flat[at] = flat[at].replace(_merged(flat[at], flat[path], flat[*path[:-1], "b"], cfg.scale))
    return nnx.from_flat_state({p: v for p, v in flat.items() if not _is_adapter(p, v)})


def _merged(w: nnx.Variable, a: nnx.Variable, b: nnx.Variable, scale: float) -> Array:
    dims, rank = len(w.get_metadata()["axes"]), a.shape[-1]
    layers = w.shape[: w.ndim - dims]

    def add(w, a, b):
        product = jnp.matmul(
            a.reshape(*layers, -1, rank), b.reshape(*layers, rank, -1), precision="highest"
        )
        return w.astype(jnp.float32) + scale * product.reshape(w.shape)

    return jax.jit(add, out_shardings=w[...].sharding)(w[...], a[...], b[...])

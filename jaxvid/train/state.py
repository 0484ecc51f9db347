"""What one training step reads and writes, and where it lies on the mesh."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxvid import sharding


class TrainState(NamedTuple):
    """Donated to every step. `skipped` counts the non-finite steps in a row."""

    step: Int[Array, ""]
    params: nnx.State
    opt_state: Any
    skipped: Int[Array, ""]
    skipped_total: Int[Array, ""]


def create(
    params: nnx.State, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """A fresh state. `params` are donated to it: copy them first if they are needed again."""

    def new(params):
        zero = jnp.zeros((), jnp.int32)
        # Zeros depend on no input, so nothing else tells the compiler where the moments belong.
        return constrain(TrainState(zero, params, tx.init(params), zero, zero))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(new, donate_argnums=0)(params)


def shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shardings of an (abstract) state: a moment lies as its parameter does, a counter everywhere.

    A leaf of the optimizer belongs to the parameter whose path ends its own, if shapes agree.
    """
    placed = sharding.parameter_shardings(state.params, mesh)
    shapes = jax.tree_util.tree_leaves_with_path(state.params)
    places = jax.tree.leaves(placed, is_leaf=lambda s: isinstance(s, NamedSharding))
    table = {path: (x.shape, place) for (path, x), place in zip(shapes, places, strict=True)}
    everywhere = NamedSharding(mesh, P())

    def of(path, x):
        for i in range(len(path)):
            shape, place = table.get(path[i:], (None, None))
            if shape == x.shape:
                return place
        return everywhere

    return jax.tree_util.tree_map_with_path(of, state)


def constrain(state: TrainState) -> TrainState:
    """Pin a state to its place inside a jitted function; outside a mesh, no-op.

    Without it the compiler may hand a step's output back laid out otherwise than its input, and the
    next step would compile anew and could not reuse the donated memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))

"""What one training step reads and writes, and where it lies on the mesh.

What is trained and what is frozen are two trees: only the first has gradients and an optimizer
state, which hold float32 whatever the model computes in. Frozen weights may be bfloat16.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxvid import paths, sharding

NONE = nnx.State({})  # no weights: of a model that is trained whole, the frozen ones


class TrainState(NamedTuple):
    """Donated to every step. `skipped` counts the non-finite steps in a row."""

    step: Int[Array, ""]
    params: nnx.State  # the weights that are trained
    opt_state: Any
    skipped: Int[Array, ""]
    skipped_total: Int[Array, ""]
    frozen: nnx.State = NONE  # the others

    @property
    def weights(self) -> nnx.State:
        """All of the model's; no copy."""
        return nnx.merge_state(self.params, self.frozen)


def create(
    params: nnx.State,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    frozen: nnx.State = NONE,
) -> TrainState:
    """A fresh state. `params` and `frozen` are donated to it: copy what is needed again."""

    def new(params, frozen):
        zero = jnp.zeros((), jnp.int32)
        # Zeros depend on no input, so nothing else tells the compiler where the moments belong.
        return constrain(TrainState(zero, params, tx.init(params), zero, zero, frozen))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(new, donate_argnums=(0, 1))(params, frozen)


def split(
    params: nnx.State, *, freeze: Sequence[str] = (), train: Sequence[str] = ()
) -> tuple[nnx.State, nnx.State]:
    """(what is trained, what is frozen) by patterns over paths: frozen is what one of `freeze` fits
    and, where `train` is given, what none of `train` fits. The arrays are shared.

    Raises ValueError for a pattern that fits no weight and where nothing is left to train.
    """
    there = paths.names(params)
    still = paths.chosen(freeze, there, "freeze")
    if train:
        still |= set(there) - paths.chosen(train, there, "train")
    if still == set(there):
        raise ValueError(f"freeze={tuple(freeze)} leaves no weight to train; name fewer parts")
    return nnx.split_state(params, lambda path, _: paths.join(path) not in still, ...)


def shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shardings of an (abstract) state: a moment lies as its parameter does, a counter everywhere.

    A leaf of the optimizer belongs to the parameter whose path ends its own, if shapes agree.
    """
    weights = state.weights
    placed = sharding.parameter_shardings(weights, mesh)
    shapes = jax.tree_util.tree_leaves_with_path(weights)
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

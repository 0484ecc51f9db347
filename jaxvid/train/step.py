"""One training step for every objective: score, loss, update. And scoring alone, for references."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from jaxvid import score
from jaxvid.batch import Batch, Loss, Scores
from jaxvid.train import state as states
from jaxvid.train.state import TrainState

Objective = Callable[[Scores, Batch], Loss]
Metrics = dict[str, Float[Array, ""]]
Drop = Callable[[nnx.Module, Key[Array, ""]], None]
Work = Callable[[Batch], Float[Array, ""]]
DROPOUT = 1  # sets the keys of dropout apart from others of the run's seed


def make_step(
    graph: nnx.GraphDef,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    temperature: float = 1.0,
    drop: Drop | None = None,
    seed: int = 0,
    work: Work | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch with a leading axis of micro-batches) -> (state, metrics); state is donated.

    Micro-batches add numerators and denominators, so how rows are cut into them changes nothing.
    The state's frozen weights get no gradient, and none is computed. `drop` switches a model's
    dropout on: its keys come from (seed, step, micro-batch), so a resumed run draws the same masks.
    A step whose loss or gradient is not finite leaves parameters and optimizer as they were.
    `work` gives the metric "flops": what a step on this batch is for the model (train/work.py).
    """
    gradient = jax.value_and_grad(make_loss(graph, objective, temperature, drop), has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def micro_batch(params, micro):
            (_, loss), grads = gradient(params, micro[0], state.frozen, micro[1])
            return grads, loss

        keys = None
        if drop is not None:
            key = jax.random.fold_in(jax.random.key(seed), DROPOUT)
            key = jax.random.fold_in(key, state.step)
            keys = jax.random.split(key, batch.tokens.tokens.shape[0])
        grads, loss = sum_over(micro_batch, state.params, (batch, keys))
        grads = jax.tree.map(lambda g: g / loss.denominator, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.numerator)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        kept = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state)
        )
        bad = jnp.int32(~finite)
        skipped = (state.skipped + 1) * bad
        total = state.skipped_total + bad
        state = TrainState(state.step + 1, *kept, skipped, total, state.frozen)
        metrics = averages(loss) | {
            "grad_norm": norm,
            "num_tokens": (batch.tokens.end > 0).sum(),
            "optimizer_step": state.step - state.skipped_total,  # skipped ones do not move it
            "skipped": skipped,
            "skipped_total": state.skipped_total,
        }
        metrics |= {} if work is None else {"flops": work(batch)}
        return states.constrain(state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval(
    graph: nnx.GraphDef, objective: Objective, *, temperature: float = 1.0
) -> Callable[[nnx.State, Batch], Loss]:
    """(weights, batch with a leading axis of micro-batches) -> summed Loss, for validation."""
    loss = make_loss(graph, objective, temperature)
    return jax.jit(lambda params, batch: sum_over(lambda p, b: loss(p, b)[1], params, batch))


def make_score(
    graph: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[nnx.State, Batch], Scores]:
    """(weights, batch) -> Scores, without dropout, shaped as the batch is: one micro-batch, or a
    leading axis."""

    def one(params, *inputs):
        return score.score(nnx.merge(graph, params), *inputs, temperature=temperature)

    def scores(params, batch):
        inputs = (batch.tokens, batch.vision, batch.audio)
        if batch.tokens.tokens.ndim == 2:
            return one(params, *inputs)
        return jax.lax.map(lambda each: one(params, *each), inputs)

    return jax.jit(scores)


def make_loss(
    graph: nnx.GraphDef, objective: Objective, temperature: float, drop: Drop | None = None
):
    """(params, micro-batch, frozen weights, key of dropout) -> (numerator, Loss): what is
    differentiated, and all of it."""

    def loss(params, micro, frozen=states.NONE, key=None):
        model = nnx.merge(graph, params, frozen)
        if drop is not None and key is not None:
            drop(model, key)
        scores = score.score(
            model, micro.tokens, micro.vision, micro.audio, temperature=temperature
        )
        value = objective(scores, micro)
        return value.numerator, value

    return loss


def sum_over(f: Callable, params: nnx.State, batch: Any):
    """Sum of f(params, micro) over the leading axis of a tree, one micro-batch in memory; of what
    is named .../max, which is never below 0, the largest."""
    if jax.tree.leaves(batch)[0].shape[0] == 1:  # a sum of one holds no second copy of the gradient
        return f(params, jax.tree.map(lambda x: x[0], batch))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, params, first))

    def add(total, micro):
        return jax.tree_util.tree_map_with_path(combine, total, f(params, micro)), None

    return jax.lax.scan(add, zeros, batch)[0]


def combine(path: tuple[Any, ...], a: Array, b: Array) -> Array:
    """Two micro-batches' share of a gradient, a loss or a metric as that of both."""
    largest = any(
        isinstance(k, jax.tree_util.DictKey) and f"{k.key}".endswith("/max") for k in path
    )
    return jnp.maximum(a, b) if largest else a + b


def averages(loss: Loss) -> Metrics:
    """The loss and every metric as sum / count; a metric nothing counted for is nan."""
    named = {name: total / count for name, (total, count) in loss.metrics.items()}
    return {"loss": loss.numerator / loss.denominator} | named

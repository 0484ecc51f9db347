"""One training step for every objective: score, loss, update. And scoring alone, for references."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxvid import score
from jaxvid.batch import Batch, Loss, Scores
from jaxvid.train import state as states
from jaxvid.train.state import TrainState

Objective = Callable[[Scores, Batch], Loss]
Metrics = dict[str, Float[Array, ""]]


def make_step(
    graph: nnx.GraphDef,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    temperature: float = 1.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch with a leading axis of micro-batches) -> (state, metrics); state is donated.

    Micro-batches add numerators and denominators, so how rows are cut into them changes nothing.
    A step whose loss or gradient is not finite leaves parameters and optimizer as they were.
    """
    gradient = jax.value_and_grad(make_loss(graph, objective, temperature), has_aux=True)

    def micro_batch(params, micro):
        (_, loss), grads = gradient(params, micro)
        return grads, loss

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, loss = sum_over(micro_batch, state.params, batch)
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
        state = TrainState(state.step + 1, *kept, skipped, state.skipped_total + bad)
        metrics = averages(loss) | {
            "grad_norm": norm,
            "num_tokens": (batch.tokens.end > 0).sum(),
            "optimizer_step": state.step - state.skipped_total,  # skipped ones do not move it
            "skipped": skipped,
            "skipped_total": state.skipped_total,
        }
        return states.constrain(state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval(
    graph: nnx.GraphDef, objective: Objective, *, temperature: float = 1.0
) -> Callable[[nnx.State, Batch], Loss]:
    """(params, batch with a leading axis of micro-batches) -> summed Loss, for validation."""
    loss = make_loss(graph, objective, temperature)
    return jax.jit(lambda params, batch: sum_over(lambda p, b: loss(p, b)[1], params, batch))


def make_score(
    graph: nnx.GraphDef, *, temperature: float = 1.0
) -> Callable[[nnx.State, Batch], Scores]:
    """(params, batch) -> Scores, shaped as the batch is: one micro-batch, or a leading axis."""

    def one(params, *inputs):
        return score.score(nnx.merge(graph, params), *inputs, temperature=temperature)

    def scores(params, batch):
        inputs = (batch.tokens, batch.vision, batch.audio)
        if batch.tokens.tokens.ndim == 2:
            return one(params, *inputs)
        return jax.lax.map(lambda each: one(params, *each), inputs)

    return jax.jit(scores)


def make_loss(graph: nnx.GraphDef, objective: Objective, temperature: float):
    """(params, micro-batch) -> (numerator, Loss): what is differentiated, and all of it."""

    def loss(params, micro):
        model = nnx.merge(graph, params)
        scores = score.score(
            model, micro.tokens, micro.vision, micro.audio, temperature=temperature
        )
        value = objective(scores, micro)
        return value.numerator, value

    return loss


def sum_over(f: Callable, params: nnx.State, batch: Batch):
    """Sum of f(params, micro) over the leading axis of `batch`, one micro-batch in memory."""
    if batch.tokens.tokens.shape[0] == 1:  # a sum of one holds no second copy of the gradient
        return f(params, jax.tree.map(lambda x: x[0], batch))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, params, first))

    def add(total, micro):
        return jax.tree.map(jnp.add, total, f(params, micro)), None

    return jax.lax.scan(add, zeros, batch)[0]


def averages(loss: Loss) -> Metrics:
    """The loss and every metric as sum / count; a metric nothing counted for is nan."""
    named = {name: total / count for name, (total, count) in loss.metrics.items()}
    return {"loss": loss.numerator / loss.denominator} | named

"""Optimizers as small frozen dataclasses, so that a saved config says which one ran.

Each has `rate(steps)`, the learning rate by optimizer step, and `build(steps, params)`, the optax
transformation, clipped by global norm first. Weight decay falls on matrices alone, never on norms,
biases or the token table. `scaled` gives parts of the model a learning rate of their own.
"""

import dataclasses
from typing import Literal

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from jaxvid import paths

Rates = tuple[tuple[str, float], ...]
Schedule = Literal["cosine", "constant", "linear"]

# Axes that together make one side of a matrix: q[D, (N, H)] and o[(N, H), D].
GROUPED = ({"heads", "head"}, {"kv_heads", "head"})


def _schedule(opt: "AdamW | Muon | Adafactor", steps: int) -> optax.Schedule:
    """Linear warmup to `lr`, then the named decay to `final * lr` at `steps`."""
    if opt.schedule not in ("cosine", "constant", "linear"):
        raise ValueError(
            f"schedule {opt.schedule!r} is none of cosine, constant, linear; set "
            "--optimizer.schedule to one of them"
        )
    if opt.warmup and opt.warmup >= steps:
        raise ValueError(
            f"warmup of {opt.warmup} steps leaves nothing of a run of {steps}; set "
            "--optimizer.warmup below --steps"
        )
    rest = steps - opt.warmup
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(opt.lr, rest, opt.final),
        "linear": lambda: optax.linear_schedule(opt.lr, opt.lr * opt.final, rest),
        "constant": lambda: optax.constant_schedule(opt.lr),
    }[opt.schedule]()
    if not opt.warmup:
        return decay
    # The first step already moves: a rate of 0 would waste the batch.
    warm = optax.linear_schedule(opt.lr / opt.warmup, opt.lr, max(opt.warmup - 1, 1))
    return optax.join_schedules([warm, decay], [opt.warmup])


def _clipped(clip: float, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def _names(v: nnx.Variable) -> tuple[str, ...]:
    """One logical name per dimension; the layer axis of a stacked weight is named `layers`."""
    axes = tuple(v.get_metadata()["axes"])
    return ("layers",) * (v.ndim - len(axes)) + axes


def matrix_axes(v: nnx.Variable) -> MuonDimensionNumbers | None:
    """Which dimensions of a weight are its input and which its output; None: not a matrix.

    The token table counts as none: its rows are vectors, looked up one by one.
    """
    names = _names(v)
    groups: list[list[int]] = []
    for i, name in enumerate(names):
        if name == "layers":
            continue
        if groups and {names[groups[-1][-1]], name} in GROUPED:
            groups[-1].append(i)
        else:
            groups.append([i])
    if "vocab" in names or len(groups) < 2:
        return None
    output = tuple(i for g in groups[1:] for i in g)
    return MuonDimensionNumbers(reduction_axis=tuple(groups[0]), output_axis=output)


def _over_variables(f, params: nnx.State) -> nnx.State:
    return jax.tree.map(
        lambda v: v.replace(f(v)), params, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )


def _decayed(params: nnx.State) -> nnx.State:
    return _over_variables(lambda v: matrix_axes(v) is not None, params)


def scaled(
    tx: optax.GradientTransformation, rates: Rates, params: nnx.State
) -> optax.GradientTransformation:
    """`tx` with a learning rate of its own for parts of `params`, the weights that are trained.

    `rates` are (pattern over paths, factor). The last pattern that fits a weight multiplies its
    whole update, decay included; a weight that none fits keeps the plain rate. Raises ValueError
    for a pattern that fits nothing and for a factor that is not above 0.
    """
    if not rates:
        return tx
    if bad := [(pattern, factor) for pattern, factor in rates if not factor > 0]:
        raise ValueError(f"rates {bad}: a factor must be above 0; to keep a part still, freeze it")
    paths.check([pattern for pattern, _ in rates], paths.names(params), "rates")

    def factor(path, v):
        name = paths.join(path)
        return v.replace(next((f for p, f in reversed(rates) if paths.fits(p, name)), 1.0))

    flat = [(path, factor(path, v)) for path, v in nnx.to_flat_state(params)]
    factors = nnx.from_flat_state(flat)
    times = lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)
    return optax.chain(tx, optax.stateless(times))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv:1711.05101)."""

    lr: float = 1e-5
    warmup: int = 0
    schedule: Schedule = "cosine"
    final: float = 0.0  # the last learning rate, as a fraction of lr
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm; 0 = none
    b1: float = 0.9
    b2: float = 0.95

    def rate(self, steps: int) -> optax.Schedule:
        return _schedule(self, steps)

    def build(self, steps: int, params: nnx.State) -> optax.GradientTransformation:
        tx = optax.adamw(
            self.rate(steps),
            self.b1,
            self.b2,
            weight_decay=self.weight_decay,
            mask=_decayed(params),
        )
        return _clipped(self.clip, tx)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Newton-Schulz orthogonalised momentum) on matrices, AdamW with Nesterov momentum on
    everything else.

    Stacked weights are orthogonalised layer by layer, and the (heads, head) axes of attention as
    one. `consistent_rms` > 0 scales updates as in arXiv:2502.16982 (0.2 matches AdamW's size, and
    then one learning rate serves both); 0 scales by sqrt(max(1, out / in)).
    """

    lr: float = 2e-3
    warmup: int = 0
    schedule: Schedule = "cosine"
    final: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.95  # momentum of the matrices
    b2: float = 0.95  # second moment of the AdamW part
    adam_lr: float = 0.0  # peak rate of the AdamW part; 0 = lr
    consistent_rms: float = 0.0

    def rate(self, steps: int) -> optax.Schedule:
        return _schedule(self, steps)

    def build(self, steps: int, params: nnx.State) -> optax.GradientTransformation:
        schedule, factor = self.rate(steps), (self.adam_lr or self.lr) / self.lr
        tx = muon(
            schedule,
            beta=self.b1,
            weight_decay=self.weight_decay,
            adam_b2=self.b2,
            adam_learning_rate=lambda count: factor * schedule(count),
            muon_weight_dimension_numbers=_over_variables(matrix_axes, params),
            consistent_rms=self.consistent_rms or None,
        )
        return _clipped(self.clip, tx)


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv:1804.04235): second moments of matrices as a row and a column."""

    lr: float = 1e-5
    warmup: int = 0
    schedule: Schedule = "cosine"
    final: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.0  # 0 = no first moment, the memory Adafactor is chosen for
    b2: float = 0.8  # exponent of its decay schedule

    def rate(self, steps: int) -> optax.Schedule:
        return _schedule(self, steps)

    def build(self, steps: int, params: nnx.State) -> optax.GradientTransformation:
        # Plain rates, not Adafactor's own scaling by the size of the parameter.
        tx = optax.adafactor(
            self.rate(steps),
            decay_rate=self.b2,
            multiply_by_parameter_scale=False,
            momentum=self.b1 or None,
            weight_decay_rate=self.weight_decay or None,
            weight_decay_mask=_decayed(params),
        )
        return _clipped(self.clip, tx)

"""Log-probs without logits in memory: `ops.logprob` against a softmax over all logits.

    python -m benchmarks.logprob            about 3 minutes; --skip-tpu leaves the compiler out

Value and gradient with respect to hidden states and table. Memory is the TPU compiler's for one
v5e chip (S = 8192 scored tokens, the table of a 7B model in float32): temporaries beside arguments
and results. Time is on CPU in float32, the median of runs in turns, against two baselines:
log_softmax of the full logits, and the same recomputed in the backward pass, chunk by chunk or
whole, whichever is faster.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.measure import MIB, Row
from jaxvid.ops.logprob import logprob, logprob_ref
from launch.ahead import chips

CHUNKS = 4  # of the rematerialised baseline


def full(hidden, table, targets):
    """log_softmax of [1, S, V] logits, and nothing else."""
    logits = jnp.einsum("BSD,VD->BSV", hidden, table)
    every = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]


def remat(hidden, table, targets):
    """`full` with its logits computed again in the backward pass."""
    return jax.checkpoint(full)(hidden, table, targets)


def chunked(hidden, table, targets):
    """`remat` over chunks of the scored tokens."""
    split = lambda x: x.reshape(CHUNKS, 1, -1, *x.shape[2:])
    step = lambda _, x: (None, remat(x[0], table, x[1]))
    return jax.lax.scan(step, None, (split(hidden), split(targets)))[1].reshape(targets.shape)


def op(hidden, table, targets):
    """As training calls it."""
    return logprob(hidden, table, targets)[0]


def definition(hidden, table, targets):
    """The op's reference."""
    return logprob_ref(hidden, table, targets)[0]


def gradient(f):
    """(weighted sum, gradient of hidden states and table)."""
    loss = lambda hidden, table, targets, weight: (f(hidden, table, targets) * weight).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def on_tpu(scored: int, vocab: int, width: int, dtype: str) -> list[Row]:
    """Temporaries of one v5e chip, by the compiler."""
    mesh = chips.mesh("v5e:2x2", devices=1)
    here = NamedSharding(mesh, PartitionSpec())
    held = {}
    for name, f in (("op", op), ("full", definition)):
        like = functools.partial(jax.ShapeDtypeStruct, sharding=here)
        args = like((1, scored, width), jnp.dtype(dtype)), like((vocab, width), jnp.float32)
        facts = like((1, scored), jnp.int32), like((1, scored), jnp.float32)
        with jax.set_mesh(mesh):
            held[name] = chips.memory(gradient(f).lower(*args, *facts).compile())
    of = {name: m.temporaries for name, m in held.items()}
    at = f"v5e, S = {scored}, V = {vocab}, D = {width}, {dtype}"
    sizes = f"{of['op'] / MIB:.0f} / {of['full'] / MIB:.0f}"
    return [
        Row(f"{at}: temporaries, MiB, op / full logits", sizes),
        measure.at_most("temporaries, op / full logits", of["op"] / of["full"], 1 / 20, "{:.4f}"),
    ]


def on_cpu(scored: int, vocab: int, width: int, repeats: int) -> list[Row]:
    """Time of value and gradient against the baselines."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    args = draw(1, scored, width), draw(vocab, width) * width**-0.5
    args += (jnp.asarray(rng.integers(0, vocab, (1, scored)), jnp.int32), draw(1, scored))
    fs = {"op": op, "full": full, "remat": remat, "chunked": chunked}
    fs = {name: gradient(f).lower(*args).compile() for name, f in fs.items()}
    runs = {name: functools.partial(f, *args) for name, f in fs.items()}
    pairs = zip(jax.tree.leaves(runs["op"]()), jax.tree.leaves(runs["full"]()), strict=True)
    off = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    took = measure.seconds(runs, repeats)
    best = min(took["remat"], took["chunked"])
    at = f"CPU, S = {scored}, V = {vocab}, D = {width}"
    times = " / ".join(f"{took[name]:.3f}" for name in runs)
    return [
        Row(f"{at}: time, s, op / full / recomputed whole / in chunks", times),
        measure.at_most("time, op / full logits", took["op"] / took["full"], 1.5),
        measure.at_most("time, op / faster recomputed", took["op"] / best, 1.1),
        measure.at_most("value and gradients, largest relative difference", off, 1e-4, "{:.1e}"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scored", type=int, default=512, help="S on CPU")
    parser.add_argument("--vocab", type=int, default=16384, help="V on CPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024], help="D on CPU")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip-tpu", action="store_true", help="do without the TPU compiler")
    parser.add_argument("--out", default="", help="file to write the table to")
    args = parser.parse_args(argv)
    rows = []
    if not args.skip_tpu:
        for dtype in ("bfloat16", "float32"):
            rows += on_tpu(8192, 152064, 3584, dtype)
    for width in args.widths:
        rows += on_cpu(args.scored, args.vocab, width, args.repeats)
    measure.table(rows, args.out)


if __name__ == "__main__":
    main()

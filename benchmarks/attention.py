"""Attention of a long row under a tree mask, on CPU: `ops.attention` against the dense mask.

    python -m benchmarks.attention          about 3 minutes and 8 GB

The row is a prompt and 16 branches that fill the other half. Forward and backward, float32: memory
is the compiler's plan of temporaries, time the median of runs in turns. Last, a row twice as long
runs in a process of its own, which holds no dense mask, and its peak resident memory is read.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import GIB, MIB, Row
from jaxvid.ops.attention import attention, attention_ref

BRANCHES = 16


def row(tokens: int) -> np.ndarray:
    """`end` [1, T] of a prompt of half the row and its branches."""
    P, R = tokens // 2, tokens // 2 // BRANCHES
    at = np.arange(tokens)
    return np.where(at < P, tokens, P + ((at - P) // R + 1) * R)[None].astype(np.int32)


def compiled(op, tokens: int, heads: int, kv_heads: int, head: int):
    """(gradient of a weighted sum of `op`, compiled; its arguments)."""
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(1, tokens, n, head)), jnp.float32)
    args = draw(heads), draw(kv_heads), draw(kv_heads)
    end, weight = jnp.asarray(row(tokens)), draw(heads)
    loss = lambda q, k, v, end, weight: (op(q, k, v, end=end) * weight).sum()
    args = (*args, end, weight)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile(), args


def tree(q, k, v, end):
    """The op as every platform but a TPU runs it."""
    return attention(q, k, v, end=end, impl="xla")


def compare(args) -> list[measure.Row]:
    """The op against the dense mask in one process."""
    shape = (args.tokens, args.heads, args.kv_heads, args.head)
    (ours, data), (dense, _) = compiled(tree, *shape), compiled(attention_ref, *shape)
    held = {n: measure.temporaries(f) for n, f in (("ours", ours), ("dense", dense))}
    gradients = zip(ours(*data), dense(*data), strict=True)
    off = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in gradients)
    runs = {"ours": lambda: ours(*data), "dense": lambda: dense(*data)}
    took = measure.seconds(runs, args.repeats)
    name = f"T = {args.tokens}"
    return [
        Row(f"{name}: temporaries, MiB, op / dense", _pair(held, MIB)),
        measure.at_most("memory, op / dense", held["ours"] / held["dense"], 1 / 8, "{:.4f}"),
        Row(f"{name}: time, s, op / dense", _pair(took, 1)),
        measure.at_most("time, op / dense", took["ours"] / took["dense"], 1.0),
        measure.at_most("gradients, largest relative difference", off, 1e-4, "{:.1e}"),
    ]


def _pair(of, unit):
    return f"{of['ours'] / unit:.2f} / {of['dense'] / unit:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--long", type=int, default=16384, help="tokens of the row run alone")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="run the op on --tokens, no table")
    parser.add_argument("--out", default="", help="file to write the table to")
    args = parser.parse_args(argv)
    if args.alone:
        run, data = compiled(tree, args.tokens, args.heads, args.kv_heads, args.head)
        jax.block_until_ready(run(*data))
        return
    sizes = {"--tokens": args.long, "--heads": args.heads, "--kv-heads": args.kv_heads}
    sizes |= {"--head": args.head}
    flags = [str(x) for pair in sizes.items() for x in pair]
    peak = measure.peak_resident("benchmarks.attention", "--alone", *flags)
    rows = compare(args)
    what = f"T = {args.long}: peak resident memory of the process, GiB"
    measure.table([*rows, measure.at_most(what, peak / GIB, 4.0)], args.out)


if __name__ == "__main__":
    main()

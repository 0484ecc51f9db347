"""Every kernel of jaxvid/ops, forward and backward, through the compiler of one kind of TPU.

    python tests/compile_kernels.py v5e:2x2

No TPU is needed; test_tpu.py starts this in a process of its own, with the settings that libtpu
reads as it is loaded. Shapes are those of a model of 7B. No `impl` is named, so the devices of the
mesh choose. Prints, for each case, how many kernels are in the compiled program, and seconds.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid import sharding
from jaxvid.ops.attention import attention
from jaxvid.ops.duality import duality
from jaxvid.ops.logprob import kl, logprob
from jaxvid.ops.policy_loss import policy_loss
from jaxvid.ops.rope import rope

V, D, T, N, K, H = 152_064, 3584, 8192, 28, 4, 128
VISION = dict(B=4, T=1024, N=16, K=16, H=80)  # patches and heads of the vision tower
HALF = jnp.bfloat16
KERNEL = 'custom_call_target="tpu_custom_call"'
# XLA's own search for a fast program is most of the time; a kernel is compiled the same without.
QUICK = dict(exec_time_optimization_effort=-1.0)


def array(dtype, *dims, names=()):
    """A shape on the mesh in context; `names` are the logical names of its first dimensions."""
    spec = P(*(None if n is None else sharding.RULES[n] for n in names))
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(jax.sharding.get_mesh(), spec))


rows = functools.partial(array, names=("rows",))
heads = functools.partial(array, names=("rows", None, "heads"))


def squares(*arrays):
    return sum((x.astype(jnp.float32) ** 2).sum() for x in arrays)


# Each gives (a loss, the arrays it is differentiated by, its other arrays).


def attended(mask, B=1, T=T, N=N, K=K, H=H):
    def loss(q, k, v, at, depth):
        facts = {
            "tree": dict(end=at),
            "window": dict(end=at, depth=depth, window=4096),
            "segment": dict(segment=at),
        }
        return squares(attention(q, k, v, **facts[mask]))

    qkv = [heads(HALF, B, T, n, H) for n in (N, K, K)]
    return loss, qkv, [rows(jnp.int32, B, T)] * 2


def scored(B=1, T=T, dtype=HALF):
    loss = lambda x, table, targets: squares(*logprob(x, table, targets))
    table = array(jnp.float32, V, D, names=("vocab", "embed"))
    return loss, [rows(dtype, B, T, D), table], [rows(jnp.int32, B, T)]


def compared():
    """No gradient flows: `one` is there for the loss to have a derivative."""
    loss = lambda one, x, other, table: one * squares(kl(x, other, table))
    table = array(jnp.float32, V, D, names=("vocab", "embed"))
    return loss, [array(jnp.float32)], [rows(HALF, 1, T, D), rows(HALF, 1, T, D), table]


def turned(interleaved, B=1, T=T, N=N, K=K, dtype=HALF):
    sections = (24, 20, 20) if interleaved else (16, 24, 24)
    turn = functools.partial(rope, sections=sections, theta=1e6, interleaved=interleaved)
    loss = lambda q, k, positions: squares(*turn((q, k), positions))
    return loss, [heads(dtype, B, T, n, H) for n in (N, K)], [rows(jnp.int32, B, 3, T)]


def clipped(sampler):
    def loss(logp, old, adv, sampled):
        more = dict(sampled=sampled, importance_cap=2.0) if sampler else {}
        clip = dict(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        return squares(policy_loss(logp, old, adv, **clip, **more))

    tokens = rows(jnp.float32, 8, 2048)
    return loss, [tokens], [tokens] * 3


def balanced(scope):
    """No gradient flows: `one` is there for the loss to have a derivative."""

    def loss(one, rewards, valid, correct):
        return one * squares(*duality(rewards, valid, correct, scope=scope, pair_reward=0.5)[:3])

    flags = rows(jnp.bool_, 64, 2, 16)
    return loss, [array(jnp.float32)], [rows(jnp.float32, 64, 2, 16), flags, flags]


of = functools.partial
ALONE = {  # on one device: what it is, and how many kernels it takes forward and backward
    "attention, tree": (of(attended, "tree"), 3),
    "attention, window": (of(attended, "window"), 3),
    "attention, vision tower": (of(attended, "segment", **VISION), 3),
    "logprob": (scored, 2),
    "logprob, float32": (of(scored, T=2048, dtype=jnp.float32), 2),
    "kl": (compared, 1),
    "rope, contiguous": (of(turned, False), 2),
    "rope, interleaved": (of(turned, True), 2),
    "rope, most heads": (of(turned, False, N=40, K=8, dtype=jnp.float32), 2),
    "rope, more heads": (of(turned, False, N=64, K=8, dtype=jnp.float32), 0),
    "policy_loss": (of(clipped, False), 1),
    "policy_loss, weighted": (of(clipped, True), 1),
    "duality, pair": (of(balanced, "pair"), 1),
    "duality, batch": (of(balanced, "batch"), 1),
}
SPREAD = {  # on four chips: the kernels lie in shard_map
    "attention": (of(attended, "window", B=4), 3),
    "logprob": (of(scored, B=4), 2),
    "rope": (of(turned, False, B=4), 2),
    "policy_loss": (of(clipped, True), 1),
    "duality": (of(balanced, "batch"), 1),
}


def main(topology):
    """Raises where a case does not compile, or not to the kernels it should have."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices, short = np.array(described.devices), []
    for cases, shape in ((ALONE, (1, 1, 1, 1)), (SPREAD, (-1, 2, 2, 1))):
        chosen = devices[:1] if cases is ALONE else devices
        mesh = Mesh(chosen.reshape(shape), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
        for name, (make, kernels) in cases.items():
            start = time.monotonic()
            with jax.set_mesh(mesh):
                loss, inputs, data = make()
                run = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs)))))
                compiled = run.lower(*inputs, *data).compile(compiler_options=QUICK)
            found, seconds = compiled.as_text().count(KERNEL), time.monotonic() - start
            print(f"{chosen.size} x {name}: {found} kernels, {seconds:.1f} s", flush=True)
            if found != kernels:
                short.append(f"{chosen.size} x {name}: {found} kernels, expected {kernels}")
    if short:
        raise SystemExit("\n".join(short))


if __name__ == "__main__":
    main(sys.argv[1])

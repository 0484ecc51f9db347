"""Memory and compile time of one real training step of a 7B text stack, by the TPU compiler.

The step is `train.step.make_step` on Qwen2.5-VL's own classes: 28 layers of 3584, 28/4 heads, ffn
18,944, 152,064 words; float32 parameters and AdamW moments, bfloat16 compute, every layer
rematerialised, weights split over all chips, one row per chip, every token scored. The vision
tower is cut to one narrow block, as the figures it stands beside are of text. Nothing runs.

    python -m benchmarks.step                    # six steps, 1 to 2 minutes each on two cores
    python -m benchmarks.step --only v5e:4x4 --objectives sft
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxvid import sharding
from jaxvid.batch import AudioBatch, Batch, Branches, TokenBatch, VisionBatch
from jaxvid.models import decoder, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.train import state, step
from launch.ahead import chips

GIB = 2**30
# topology -> (tokens of a row, the least that the peers need there, what we want to stay below)
SLICES = {"v5e:4x4": (5120, 11.69, 11.0), "v5p:2x2x2": (16384, 22.92, 20.0)}
PARTS = 4  # of the MLP, one after the other
OBJECTIVES = {"sft": (SFT(), 1), "dpo": (DPO(), 2), "policy": (Policy(), 8)}


def config(layers: int = 28, parts: int = 1) -> qwen25vl.Config:
    """The 7B text stack."""
    text = decoder.Config(
        layers=layers,
        width=3584,
        ffn=18944,
        heads=28,
        kv_heads=4,
        vocab=152064,
        rope_sections=(16, 24, 24),
    )
    tower = vision.Config(layers=1, width=64, ffn=64, heads=4, out=3584, full=(0,))
    return qwen25vl.Config(
        text=text, vision=tower, compute=Compute(dtype="bfloat16", ffn_parts=parts)
    )


def abstract_batch(mesh: Mesh, rows: int, tokens: int, scored: int, branches: int) -> Batch:
    """One micro-batch of text rows, as shapes placed on the mesh."""
    place = sharding.row_sharding(mesh, rows, 1)
    leaf = lambda kind, *shape: jax.ShapeDtypeStruct((1, rows, *shape), kind, sharding=place)
    whole, real = jnp.int32, jnp.float32
    row, some = leaf(whole, tokens), leaf(whole, scored)
    place_of = TokenBatch(row, leaf(whole, 3, tokens), row, row, row, some, some, some)
    none = VisionBatch(leaf(jnp.uint8, 0, 4, 1176), leaf(whole, 0, 4, 2), leaf(whole, 0, 4))
    still = AudioBatch(leaf(real, 0, 0, 0), leaf(whole, 0), leaf(whole, 0))
    reals = ("weight", "advantage", "value")
    table = Branches(
        *(leaf(real if name in reals else whole, branches) for name in Branches._fields)
    )
    return Batch(place_of, none, still, table, *(leaf(real, scored),) * 3)


def lower(mesh: Mesh, cfg: qwen25vl.Config, objective, batch: Batch) -> jax.stages.Lowered:
    """The step, lowered on shapes alone; the state is donated."""
    tx = optax.adamw(1e-5)
    with nnx.use_eager_sharding(False), jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: qwen25vl.Qwen25VL(cfg, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(model)
        zero = jax.ShapeDtypeStruct((), jnp.int32)
        whole = state.TrainState(zero, params, jax.eval_shape(tx.init, params), zero, zero)
        places = state.shardings(whole, mesh)
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        whole = jax.tree.map(place, whole, places)
        return step.make_step(graph, objective, tx).lower(whole, batch)


def measure(topology: str, name: str, parts: int) -> str:
    """One row of the table."""
    tokens, peers, wanted = SLICES[topology]
    objective, branches = OBJECTIVES[name]
    mesh = chips.mesh(topology)
    batch = abstract_batch(mesh, mesh.size, tokens, tokens, branches)
    lowered = lower(mesh, config(parts=parts), objective, batch)
    start = time.perf_counter()
    used = chips.memory(lowered.compile())
    took = time.perf_counter() - start
    both = used.arguments + used.temporaries
    figures = (used.arguments, used.temporaries, both, used.peak)
    cells = " | ".join(f"{x / GIB:.2f}" for x in figures)
    return f"| {name} | {topology} | {tokens:,} | {cells} | {wanted} | {peers} | {took:.0f} |"


def main(args: list[str] | None = None) -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SLICES, help="one slice")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--parts", type=int, default=PARTS, help="Compute.ffn_parts")
    parser.add_argument("--out", type=pathlib.Path, help="also write the table here")
    chosen = parser.parse_args(args)
    lines = [
        "| step | slice | tokens per chip | arguments | temporaries | together | most at one time "
        "| wanted together | best peer together | compile, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for topology in [chosen.only] if chosen.only else SLICES:
        for name in chosen.objectives:
            lines.append(measure(topology, name, chosen.parts))
            print(lines[-1], flush=True)
    if chosen.out:
        chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

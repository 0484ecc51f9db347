"""Our side of one row of benchmarks/gpu.py, in a process of its own. Prints one line of JSON."""

import contextlib
import functools
import json
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import measure, rollout, weights, work
from benchmarks.work import Case
from jaxvid.models import decoder, hf, lora, qwen25vl
from jaxvid.objectives.policy import Policy
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.ops.attention import attention
from jaxvid.train import state as states
from jaxvid.train import step, watch
from jaxvid.train.optimizers import AdamW

OBJECTIVES = {
    "sft": SFT(),
    "dpo": DPO(beta=work.BETA),
    "dna": Policy(clip_low=work.LOW, clip_high=work.HIGH, dual_clip=None),
}


def model(case: Case, cfg: qwen25vl.Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, what is trained in float32, what is frozen in the type of what is computed)."""
    graph, shapes = hf.abstract(cfg)
    dtype = case.of.dtype
    if case.of.rank:
        still = weights.fill(cfg, shapes, lambda path: dtype)
        graph, both = lora.attach(graph, still, case.lora, 0)
        trained, still = states.split(both, train=lora.TRAINED)
        return graph, weights.fill(cfg, trained, lambda path: "float32"), still
    kind = lambda path: dtype if path[0] == "tower" else "float32"
    return graph, *states.split(weights.fill(cfg, shapes, kind), freeze=("tower",))


def reference(case: Case, cfg: qwen25vl.Config, graph: nnx.GraphDef, trained: nnx.State):
    """state, batch -> the batch with the log-probs of where training starts: without adapters
    where there are any, else those of a copy in the type of what is computed."""
    if case.of.rank:
        score, weights_of = step.make_score(hf.abstract(cfg)[0]), lambda state: state.frozen
    else:
        copy = lambda x: jnp.copy(x).astype(case.of.dtype)  # steps donate the original
        kept = jax.jit(lambda params: jax.tree.map(copy, params))(trained)
        score = step.make_score(graph)
        weights_of = lambda state: nnx.merge_state(kept, state.frozen)
    return lambda state, batch: batch._replace(ref=score(weights_of(state), batch).logp)


def steps(case: Case, cfg: qwen25vl.Config, grown: list) -> tuple[list[float], list[float]]:
    """(seconds, loss) of each step, the one that compiles first."""
    graph, trained, still = model(case, cfg)
    prepare = lambda state, batch: batch
    if case.kind == "dpo":
        prepare = reference(case, cfg, graph, trained)
    b1, b2 = work.BETAS
    tx = AdamW(lr=work.RATE, schedule="constant", clip=work.CLIP, b1=b1, b2=b2)
    tx = tx.build(1 + case.repeats, trained)
    advance = step.make_step(graph, OBJECTIVES[case.kind], tx)
    now = states.create(trained, tx, frozen=still)
    batch = jax.device_put(work.batch(grown))

    def run():
        nonlocal now
        now, metrics = advance(now, prepare(now, batch))
        return metrics["loss"]

    taken, losses = measure.laps(run, case.repeats)
    return taken, [float(x) for x in losses]


def rollouts(case: Case, cfg: qwen25vl.Config, grown: list) -> tuple[list[float], list[float]]:
    """(seconds of each rollout, no loss)."""
    graph, shapes = hf.abstract(cfg)
    params = weights.fill(cfg, shapes, lambda path: case.of.dtype)
    run, _ = rollout.ours(case.sizes.job, nnx.merge(graph, params), grown[0])
    return measure.laps(run, case.repeats)[0], []


def measured(case: Case) -> dict[str, Any]:
    if case.side == "jaxvid-cudnn":  # nobody gets it unasked
        decoder.attention = functools.partial(attention, impl="cudnn")
    cfg = work.config(case)
    grown = work.trees(case, cfg)
    with jax.set_mesh(measure.one_device()):
        run = rollouts if case.kind == "rollout" else steps
        taken, losses = run(case, cfg, grown)
    told, device = watch.memory(), jax.devices()[0]
    cuda = (
        "" if device.platform == "cpu" else f", {' '.join(device.client.platform_version.split())}"
    )
    return {
        "first": taken[0],
        "seconds": taken[1:],
        "losses": losses,
        "peak_gib": told["perf/memory_peak_gib"] if told else None,
        "on": device.device_kind,
        "versions": f"jax {jax.__version__}{cuda}, flax {flax.__version__}",
    }


def main(text: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        told = measured(Case(**json.loads(text)))
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])

"""One process of a crew that trains, samples and evaluates together, by the real entry points.

python tests/crew.py FOLDER OUT PORT I N [sft dpo dna eval probe endless breaks ...]

Eight devices over N processes. FOLDER has shards and a model folder "ready". OUT/<kind> gets what
the run writes. "endless" is SFT that goes on; in "breaks" the data of the last process then fail.
"""

import dataclasses
import pathlib
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)

from jaxvid import config, hosts, runs  # noqa: E402
from jaxvid.data import layout, media, pipeline  # noqa: E402
from jaxvid.models.layers import Compute  # noqa: E402
from jaxvid.rewards import Function  # noqa: E402
from jaxvid.rollout.sampler import Sampling  # noqa: E402
from jaxvid.train.optimizers import AdamW  # noqa: E402

DEVICES, STEPS = 8, 2


def pay(case, text: str) -> dict[str, float]:
    """Something that differs between the replies of a model that knows nothing."""
    return {"correct": float(len(text) % 2)}


def run_of(kind: str, folder: str) -> config.AnyRun:
    data = lambda *tasks: pipeline.Data(
        shards=(f"{folder}/shards",),
        split="train",
        tasks=tasks,
        pairs=4,
        microbatches=2,
        sampling=media.Sampling(frames=4, height=16, width=16),
        budget=layout.Budget(rows=8, tokens=192, scored=96, branches=16, frames=8, patches=16),
    )
    common = {"model": f"{folder}/ready", "compute": Compute(remat="none"), "tensor": 2}
    trained = {"steps": STEPS, "log_every": 1, "optimizer": AdamW(lr=1e-2, warmup=0)}
    trained |= {"export_dtype": "float32"}
    match kind:
        case "endless" | "breaks":
            return dataclasses.replace(run_of("sft", folder), steps=10**6)
        case "sft":
            return config.SFTRun(data=data("sft"), **common, **trained)
        case "dpo":
            return config.PreferenceRun(data=data("preference"), **common, **trained)
        case "dna":
            return config.PolicyRun(
                data=data("policy"),
                reward=Function(path=f"{__file__}:pay"),
                rollout=config.Rollout(
                    group=3, sampling=Sampling(max_tokens=5), rows=8, minibatches=2, table_every=1
                ),
                ask=None,
                **common,
                **trained,
            )
        case "eval":
            ask = config.Ask(max_tokens=6, rows=8, samples=2)
            return config.EvalRun(data=data("policy"), ask=ask, **common)
        case "probe":
            ask = config.Probe(max_tokens=6, rows=8, limit=9)
            return config.ProbeRun(data=data("policy"), ask=ask, **common)
    raise ValueError(f"no run {kind!r}")


def break_data() -> None:
    """Every batch after this one fails, as a record can that is found to be too long."""

    def broken(self, update):
        raise ValueError("record 'r' is broken")

    pipeline._Pack.__call__ = broken


def main(folder: str, out: str, port: str, process: str, processes: str, *kinds: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES // int(processes))
    hosts.SILENCE = 10
    if int(processes) > 1:
        hosts.start(f"localhost:{port},{process},{processes}")
    do = {"eval": runs.evaluate, "probe": runs.probe}
    for kind in kinds:
        if kind == "breaks" and int(process) == int(processes) - 1:
            break_data()
        do.get(kind, runs.train)(run_of(kind, folder), pathlib.Path(out, kind))


if __name__ == "__main__":
    main(*sys.argv[1:])

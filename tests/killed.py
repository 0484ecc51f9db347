"""A policy run that is killed where it is told to be, or runs to its end.

python tests/killed.py FOLDER WORKDIR [rollout|update|save N]
"""

import os
import pathlib
import signal
import sys

import jax

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

import numpy as np  # noqa: E402
import policies  # noqa: E402

from jaxvid.train import checkpoint, groups  # noqa: E402


def main(folder: str, workdir: str, where: str = "", when: str = "0") -> None:
    run = policies.Run(pathlib.Path(folder))
    settings = {"updates": 2, "minibatches": 2, "table_every": 1}
    parts = run.parts(**settings)._replace(workdir=pathlib.Path(workdir))
    draw, save = groups.sampler.generate_all, checkpoint.Checkpoints.save

    def kill(place: str) -> None:
        if place == where and parts.stream.counts["updates"] == int(when):
            os.kill(os.getpid(), signal.SIGKILL)

    def drawn(*args, **kwargs):
        out = draw(*args, **kwargs)
        kill("rollout")
        return out

    def stepped(state, batch):
        out = run.train_step(state, batch)
        kill("update")
        return out

    def saved(self, *args):
        save(self, *args)  # which goes on writing in the background
        kill("save")

    groups.sampler.generate_all, checkpoint.Checkpoints.save = drawn, saved
    result = run.train(pathlib.Path(workdir), 4, every=1, parts=parts._replace(train_step=stepped))
    leaves = jax.device_get(jax.tree.leaves(result.state))
    np.savez(pathlib.Path(workdir) / "end.npz", *leaves)


if __name__ == "__main__":
    main(*sys.argv[1:])
